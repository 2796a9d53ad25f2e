"""Encoders: where a model comes from, and the student that is trained."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, JsonValue, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from clusterlib.artifacts import hub
from clusterlib.artifacts.config import Config
from clusterlib.artifacts.digests import of_files
from clusterlib.errors import StrataError

_PACKAGE = "package:"

# What is in a model's folder and nobody reads: documentation, records of its training, weights in
# other formats.
_UNREAD = (
    *("*.md", "LICENSE*", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.pdf", ".*", "*/.*"),
    *("*.py", "*.pyc", "training_args*", "trainer_state.json", "checkpoint-*", "runs/*", "*.csv"),
    *("*.log", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.ot", "*.gguf"),
    *("*.tflite", "*.onnx", "*.onnx_data", "onnx/*", "openvino/*", "coreml/*"),
)


class ModelRef(Config):
    """Where an encoder comes from. Only safetensors weights are read; remote code is never run."""

    name: str = Field(
        ...,
        description="a local folder, a Hugging Face hub name, or package:MODULE/FOLDER for a model "
        "that an installed Python package carries",
    )
    revision: str | None = Field(
        None,
        description="commit, branch or tag of a hub model; by default the commit its main branch "
        "is at when the run starts. Pin a commit to repeat a result",
    )
    sha256: str | None = Field(
        None,
        pattern="^[0-9a-f]{64}$",
        description="SHA-256 that model.safetensors (a tokenizer's tokenizer.json) must have",
    )

    _read: ClassVar[tuple[str, ...]] = ("*",)
    _first: ClassVar[tuple[str, ...]] = ("config.json", "modules.json")
    _needed: ClassVar[str] = "*.safetensors"
    _stated: ClassVar[str] = "model.safetensors"
    _has_weights: ClassVar[bool] = True

    def located(self, folder: str) -> Self:
        path = Path(self.name).expanduser()
        if path.is_dir() or self.name.startswith(("./", "../", "~")):
            return self.model_copy(update={"name": str(path.absolute())})
        return self

    def pinned(self) -> Self:
        if self._local_folder() is not None:
            return self
        return self.model_copy(
            update={"revision": hub.commit(self.name, self.revision) or self.revision}
        )

    def content(self) -> dict[str, Any]:
        """The digest of every file that shapes the output, by its path in the folder; a hub model's
        name and revision.

        Raises:
            StrataError: as `folder`; a hub model is not fetched.
        """
        folder = self._local_folder()
        if folder is not None:
            return {"files": self._checked(folder)}
        content = {"name": self.name, "revision": self.revision}
        if self.sha256 and not hub.is_commit(self.revision):
            content["sha256"] = self.sha256
        return content

    def folder(self) -> Path:
        """The model's local folder; a hub model is downloaded first.

        Raises:
            StrataError: there is no such model, it is not whole, has no safetensors weights or
                weights of another digest.
        """
        folder = self._local_folder()
        if folder is None:
            from huggingface_hub import snapshot_download

            try:
                folder = Path(
                    snapshot_download(
                        self.name,
                        revision=self.revision,
                        allow_patterns=list(self._read),
                        ignore_patterns=list(_UNREAD),
                    )
                )
            except (OSError, ValueError) as error:
                raise StrataError(
                    f"{self.name}: neither a local folder nor a model that could be fetched from "
                    f"the hub ({type(error).__name__}: {_first_line(error)})"
                ) from error
        self._checked(folder)
        return folder

    def _checked(self, folder: Path) -> dict[str, str]:
        """Path in the folder -> SHA-256 of what is read there."""
        # Some other folder, such as / or a home, may hold more than can be walked.
        if not any((folder / name).is_file() for name in self._first):
            raise StrataError(
                f"{folder}: no {' or '.join(self._first)} in it; it is not a complete model folder"
            )
        found, pickled = {}, []
        for parent, _, names in os.walk(folder, followlinks=True):
            for name in names:
                path = Path(parent, name)
                inside = path.relative_to(folder).as_posix()
                if _matches(inside, self._read) and not _matches(inside, _UNREAD):
                    found[inside] = path
                elif name == "pytorch_model.bin" and not any(
                    other.endswith(".safetensors") for other in names
                ):
                    pickled.append(path)
        if not fnmatch.filter(found, self._needed):
            raise StrataError(
                f"{folder}: no {self._needed} in it; it is not a complete model folder"
            )
        if pickled and self._has_weights:
            raise StrataError(
                f"{pickled[0]}: pickled weights are not read; convert them to safetensors"
            )
        found = dict(sorted(found.items()))
        try:
            digests = dict(zip(found, of_files(list(found.values())), strict=True))
        except OSError as error:
            raise StrataError(f"{error.filename}: cannot be read ({error.strerror})") from error
        for inside, path in found.items():
            _check(path, digests[inside])
        if self.sha256 and digests.get(self._stated) != self.sha256:
            raise StrataError(
                f"{folder}: {self._stated} has SHA-256 {digests.get(self._stated)}, not "
                f"{self.sha256}"
            )
        return digests

    def _local_folder(self) -> Path | None:
        if self.name.startswith(_PACKAGE):
            return self._in_package()
        path = Path(self.name).expanduser()
        if path.is_dir():
            return path
        if path.is_absolute() or self.name.startswith(("./", "../")) or self.name.count("/") > 1:
            raise StrataError(f"{self.name}: no such model folder")
        return None

    def _in_package(self) -> Path:
        module, _, inside = self.name.removeprefix(_PACKAGE).partition("/")
        top, *below = module.split(".")
        try:  # of `top` alone: for a dotted name it would import the packages that hold it
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):
            spec = None
        places = (spec.submodule_search_locations if spec else None) or ()
        folders = (Path(place, *below) for place in places)
        package = next((folder for folder in folders if folder.is_dir()), None)
        if package is None:
            raise StrataError(
                f"{self.name}: no Python package {module!r} with a folder of its own is installed"
            )
        if not (package / inside).is_dir():
            raise StrataError(f"{self.name}: no such model folder in {package}")
        return package / inside


class TokenizerRef(ModelRef):
    """Where a tokenizer comes from; its folder needs no weights, and other weights make no other
    tokenizer.
    """

    # Where tokenizer_config.json names no class, the model's config.json tells which it is.
    _read: ClassVar[tuple[str, ...]] = (
        *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
        *("config.json", "*.model", "*.spm", "*.tiktoken"),
    )
    _first: ClassVar[tuple[str, ...]] = ("tokenizer.json",)
    _needed: ClassVar[str] = "tokenizer.json"
    _stated: ClassVar[str] = "tokenizer.json"
    _has_weights: ClassVar[bool] = False

    def load(self) -> Any:
        """The fast tokenizer.

        Raises:
            StrataError: there is none.
        """
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder(), trust_remote_code=False, use_fast=True)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    """As snapshot_download understands patterns: `*` takes slashes too."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


@functools.cache
def _check(path: Path, digest: str) -> None:
    """Raise StrataError for a file that is damaged as a whole; once for each content."""
    try:
        if path.suffix == ".safetensors":
            kind = "safetensors"
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix == ".json":
            kind = "JSON"
            json.loads(path.read_bytes())
    except (SafetensorError, OSError, ValueError) as error:
        raise StrataError(
            f"{path}: no whole {kind} file ({_first_line(error)}); fetch it again"
        ) from error


def _cls(states: Tensor, mask: Tensor) -> Tensor:
    return states[:, 0]


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).float()
    return (states * weights).sum(dim=1) / weights.sum(dim=1)


# Token states float32 [b, T, D] under a mask int64 [b, T] -> vectors [b, D]; by the names that
# sentence-transformers has, which reads them in exported models.
POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cls": _cls, "mean": _mean}

if TYPE_CHECKING:
    PoolingName = str
else:
    PoolingName = Literal[tuple(POOLINGS)]


def load_embedder(folder: Path, device: str | None = None, **model_kwargs: Any) -> Any:
    """The sentence-transformers model in a folder; a plain encoder there is pooled by the mean.

    Args:
        device: by default a GPU where there is one.
        model_kwargs: of the encoder, such as dtype.

    Raises:
        StrataError: the weights are not those of its architecture, or not finite.
    """
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel

    with _weights_must_fit(folder):
        model = SentenceTransformer(
            str(folder),
            device=device,
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs={"use_safetensors": True, **model_kwargs},
        )
    for encoder in (getattr(part, "auto_model", None) for part in model):
        if isinstance(encoder, PreTrainedModel):
            # sentence-transformers does not hand on what transformers says of the weights.
            _load_encoder(type(encoder), Path(encoder.name_or_path), config=encoder.config)
    _check_finite(model, folder)
    return model


def _load_encoder(loader: Any, folder: Path, **settings: Any) -> Any:
    """What transformers loads from a folder; all of its weights must be there.

    Raises:
        StrataError: some are not, and would be random, or their shapes are others.
    """
    with _weights_must_fit(folder):
        encoder, found = loader.from_pretrained(
            folder,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **settings,
        )
    missing = sorted(name for name in found["missing_keys"] if "pooler" not in name)
    if missing:
        raise StrataError(
            f"{folder}: its weights lack {missing[0]}, one of {len(missing)} that its config.json "
            "asks for, which would be random; fetch it again"
        )
    return encoder


@contextlib.contextmanager
def _weights_must_fit(folder: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "mismatched_sizes" not in str(error):  # what transformers says there, and its log more
            raise
        raise StrataError(
            f"{folder}: its weights have other shapes than its config.json asks for; fetch it again"
        ) from error


def _check_finite(model: nn.Module, folder: Path) -> None:
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise StrataError(
                f"{folder}: its weight {name} holds values that are not finite; fetch it again, or "
                "take an earlier checkpoint of it"
            )


class StudentConfig(Config):
    """The encoder that is trained."""

    model: ModelRef | None = Field(None, description="start from these weights")
    architecture: dict[str, JsonValue] | None = Field(
        None,
        description="start from random weights: a transformers configuration (model_type, "
        "hidden_size, ...); vocab_size and pad_token_id are the tokenizer's",
    )
    pooling: PoolingName = Field(
        "mean",
        description="how token states become one vector, by its name in sentence-transformers",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.model is None) == (self.architecture is None):
            raise ValueError("set exactly one of model and architecture")
        return self


class Encoder(nn.Module):
    """Text to unit vectors: a transformers backbone, pooling, normalisation."""

    def __init__(self, backbone: Any, pooling: PoolingName) -> None:
        super().__init__()
        drop_pooler(backbone)
        self.backbone = backbone
        self.pooling = pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Unit vectors float32 [b, D] of token ids int64 [b, T] under a mask int64 [b, T]."""
        states = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return F.normalize(POOLINGS[self.pooling](states.float(), attention_mask), dim=-1)


def drop_pooler(backbone: Any) -> None:
    """Take out BERT's pooler, whose weights no gradient reaches and no embedding uses."""
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None


def student_architecture(config: StudentConfig, tokenizer: Any, max_tokens: int) -> Any:
    """The student's transformers configuration, checked against the shards it is to learn from.

    Raises:
        StrataError: it is no transformers configuration, has a decoder beside its encoder, or too
            few tokens or positions.
    """
    from transformers import AutoConfig, AutoModel

    try:
        if config.model is not None:
            architecture = AutoConfig.from_pretrained(
                config.model.folder(), trust_remote_code=False
            )
        else:
            settings = {
                "vocab_size": len(tokenizer),
                "pad_token_id": tokenizer.pad_token_id,
                **(config.architecture or {}),
            }
            architecture = AutoConfig.for_model(settings.pop("model_type", None), **settings)
        with torch.device("meta"):  # its modules without their weights
            backbone = AutoModel.from_config(architecture)
    except (ValueError, TypeError, OSError) as error:
        raise StrataError(f"train.student: {error}") from error
    if architecture.is_encoder_decoder:
        raise StrataError(
            f"train.student: {architecture.model_type} is an encoder with a decoder; take an "
            "encoder or a decoder alone, such as bert or qwen3"
        )
    if getattr(architecture, "vocab_size", None) is None:
        raise StrataError(
            f"train.student: {architecture.model_type} takes no tokens; take an encoder of text"
        )
    if architecture.vocab_size < len(tokenizer):
        raise StrataError(
            f"train.student: it knows {architecture.vocab_size} tokens and the tokenizer of the "
            f"shards {len(tokenizer)}; set shard.tokenizer to the student's own"
        )
    positions = _num_positions(backbone)
    if positions is not None and positions < max_tokens:
        raise StrataError(
            f"train.student: it takes at most {positions} tokens and the shards hold up to "
            f"{max_tokens}; lower shard.query_max_tokens and shard.passage_max_tokens"
        )
    return architecture


def _num_positions(backbone: Any) -> int | None:
    """How many tokens a backbone takes; None where nothing limits them."""
    for name, module in backbone.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            # RoBERTa and its like give padding the position `padding_idx`, and number the tokens
            # from the next.
            return int(module.weight.shape[0]) - padding - 1
    positions = getattr(backbone.config, "max_position_embeddings", None)
    return positions if positions is not None and positions > 0 else None  # XLNet says -1


def build_student(
    config: StudentConfig,
    tokenizer: Any,
    max_tokens: int,
    seed: int,
    gradient_checkpointing: bool = False,
    compiled: bool = False,
) -> Encoder:
    """The student before its first step, ready to train; random weights depend on `seed` alone."""
    from transformers import AutoModel

    if config.model is not None:
        folder = config.model.folder()
        backbone = _load_encoder(AutoModel, folder, dtype=torch.float32)
        _check_finite(backbone, folder)
    else:
        torch.manual_seed(seed)
        backbone = AutoModel.from_config(student_architecture(config, tokenizer, max_tokens))
    if gradient_checkpointing:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
    if compiled:
        # In place, so that weights keep their names; for any shape, as micro-batches differ in it.
        backbone.compile(dynamic=True)
    # A loaded model is in evaluation mode: without dropout, and heedless of checkpointing.
    return Encoder(backbone, config.pooling).train()
