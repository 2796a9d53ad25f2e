"""Encoders: where a model comes from, and the student that is trained."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from clusterlib.config import Config
from clusterlib.errors import StrataError

_PACKAGE = "package:"


class ModelRef(Config):
    """Where an encoder comes from. Only safetensors weights are read; remote code is never run."""

    name: str = Field(
        ...,
        description="a local folder, a Hugging Face hub name, or package:MODULE/FOLDER for a model that an "
        "installed Python package carries",
    )
    revision: str | None = Field(None, description="commit of a hub model; pin it to repeat a result")
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="digest that model.safetensors must have")

    _files: ClassVar[str] = "*.safetensors"

    def located(self, folder: str) -> Self:
        path = Path(self.name).expanduser()
        if path.is_dir() or self.name.startswith(("./", "../", "~")):
            return self.model_copy(update={"name": str(path.absolute())})
        return self

    def content(self) -> dict[str, Any]:
        """The weights' digest where they are at hand or stated; a hub model's name and revision otherwise."""
        if self.sha256:
            return {"sha256": self.sha256}
        folder = self._local_folder()
        if folder is None:
            return {"name": self.name, "revision": self.revision}
        return {"sha256": _digest(tuple(sorted(self._found(folder))))}

    def folder(self) -> Path:
        """The model's local folder; a hub model is downloaded first.

        Raises:
            StrataError: there is no such model, it has no safetensors weights, or their digest is wrong.
        """
        folder = self._local_folder()
        if folder is None:
            from huggingface_hub import snapshot_download

            try:
                folder = Path(
                    snapshot_download(
                        self.name,
                        revision=self.revision,
                        allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"],
                    )
                )
            except (OSError, ValueError) as error:
                raise StrataError(
                    f"{self.name}: neither a local folder nor a model that could be fetched from the hub "
                    f"({type(error).__name__}: {str(error).splitlines()[0]})"
                ) from error
        files = self._found(folder)
        if self.sha256 and _digest(tuple(files)) != self.sha256:
            raise StrataError(f"{folder}: {files[0].name} has SHA-256 {_digest(tuple(files))}, not {self.sha256}")
        return folder

    def _found(self, folder: Path) -> list[Path]:
        files = sorted(folder.glob(self._files))
        if not files:
            raise StrataError(f"{folder}: no {self._files} in it; it is not a complete model folder")
        return files

    def _local_folder(self) -> Path | None:
        if self.name.startswith(_PACKAGE):
            module, _, inside = self.name.removeprefix(_PACKAGE).partition("/")
            spec = importlib.util.find_spec(module)
            if spec is None or spec.origin is None:
                raise StrataError(f"{self.name}: no Python package {module!r} is installed")
            return Path(spec.origin).parent / inside
        path = Path(self.name).expanduser()
        if path.is_dir():
            return path
        if path.is_absolute() or self.name.startswith(("./", "../")) or self.name.count("/") > 1:
            raise StrataError(f"{self.name}: no such model folder")
        return None


class TokenizerRef(ModelRef):
    """Where a tokenizer comes from; its folder needs no weights."""

    _files: ClassVar[str] = "tokenizer.json"

    def load(self) -> Any:
        """The fast tokenizer.

        Raises:
            StrataError: there is none.
        """
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder(), trust_remote_code=False, use_fast=True)


@functools.cache
def _digest(files: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            if len(files) == 1:
                return hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


class StudentConfig(Config):
    """The encoder that is trained."""

    model: ModelRef | None = Field(None, description="start from these weights")
    architecture: dict[str, Any] | None = Field(
        None,
        description="start from random weights: a transformers configuration (model_type, hidden_size, ...); "
        "vocab_size and pad_token_id are the tokenizer's",
    )
    pooling: Literal["cls", "mean"] = Field("mean", description="how token states become one vector")

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.model is None) == (self.architecture is None):
            raise ValueError("set exactly one of model and architecture")
        return self


class Encoder(nn.Module):
    """Text to unit vectors: a transformers backbone, pooling, normalisation."""

    def __init__(self, backbone: Any, pooling: Literal["cls", "mean"]) -> None:
        super().__init__()
        drop_pooler(backbone)
        self.backbone = backbone
        self.pooling = pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Unit vectors float32 [b, D] of token ids int64 [b, T] under a mask int64 [b, T]."""
        states = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "cls":
            pooled = states[:, 0].float()
        else:
            weights = attention_mask.unsqueeze(-1).float()
            pooled = (states.float() * weights).sum(dim=1) / weights.sum(dim=1)
        return F.normalize(pooled, dim=-1)


def drop_pooler(backbone: Any) -> None:
    """Take out BERT's pooler, whose weights no gradient reaches and no embedding uses."""
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None


def student_architecture(config: StudentConfig, tokenizer: Any, max_tokens: int) -> Any:
    """The student's transformers configuration, checked against the shards it is to learn from.

    Raises:
        StrataError: it is no transformers configuration, or has too few tokens or positions.
    """
    from transformers import AutoConfig

    try:
        if config.model is not None:
            architecture = AutoConfig.from_pretrained(config.model.folder(), trust_remote_code=False)
        else:
            settings = {
                "vocab_size": len(tokenizer),
                "pad_token_id": tokenizer.pad_token_id,
                **(config.architecture or {}),
            }
            architecture = AutoConfig.for_model(settings.pop("model_type", None), **settings)
    except (ValueError, TypeError, OSError) as error:
        raise StrataError(f"train.student: {error}") from error
    if architecture.vocab_size < len(tokenizer):
        raise StrataError(
            f"train.student: it knows {architecture.vocab_size} tokens and the tokenizer of the shards "
            f"{len(tokenizer)}; set shard.tokenizer to the student's own"
        )
    positions = getattr(architecture, "max_position_embeddings", None)
    if positions is not None and positions < max_tokens:
        raise StrataError(
            f"train.student: it takes at most {positions} tokens and the shards hold up to {max_tokens}; lower "
            "shard.query_max_tokens and shard.passage_max_tokens"
        )
    return architecture


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
        backbone = AutoModel.from_pretrained(
            config.model.folder(), trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
    else:
        torch.manual_seed(seed)
        backbone = AutoModel.from_config(student_architecture(config, tokenizer, max_tokens))
    if gradient_checkpointing:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
    if compiled:
        # In place, so that weights keep their names; for any shape, since micro-batches differ in length.
        backbone.compile(dynamic=True)
    # A loaded model is in evaluation mode: without dropout, and heedless of checkpointing.
    return Encoder(backbone, config.pooling).train()
