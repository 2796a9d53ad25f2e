"""embed: `pairs` -> `embeddings`, the same rows with the teacher's unit vectors."""

from __future__ import annotations

import functools
import platform
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field

from clusterlib.artifacts.artifact import Artifact, Root, Slice, Spec
from clusterlib.artifacts.config import Config, runtime
from clusterlib.artifacts.draft import Draft, Receipt
from clusterlib.artifacts.tables import embeddings_schema, fixed_size_list
from clusterlib.errors import StrataError
from pipelines.stage import Stage
from pipelines.tasks import Job, Task, Workers, make
from train.model import ModelRef, load_embedder

if TYPE_CHECKING:
    from pipelines.run import Arm

_ROW_GROUP_ROWS = 8192


class EmbedConfig(Config):
    """The teacher: any sentence-transformers or Hugging Face encoder."""

    teacher: ModelRef
    max_tokens: int | None = Field(
        None, ge=3, description="longer texts are cut; by default at the model's own limit"
    )
    query_prompt: str | None = Field(
        None, description="put before each query; by default the model's own prompt"
    )
    passage_prompt: str | None = Field(
        None, description="put before each passage; by default the model's own"
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="of the teacher's weights and arithmetic; bf16 is several times as fast on "
        "GPUs",
    )

    min_workers: int = runtime(
        1, ge=1, description="processes to start with; more follow while tasks wait"
    )
    max_workers: int | None = runtime(
        None, ge=1, description="processes; by default as many as there is room for"
    )
    cpus_per_worker: float = runtime(1, gt=0, description="logical CPUs that a process takes")
    gpus_per_worker: float = runtime(
        0, ge=0, description="1 or a share of one on GPU nodes; 0 stays on the CPU"
    )
    batch_tokens: int | None = runtime(
        None,
        ge=1,
        description="tokens, padding included, encoded at once; by default 16,384 with GPUs and "
        "1,024 without",
    )
    task_rows: int = runtime(
        16_384, ge=1, description="rows a task embeds before it signs for them"
    )


class Embed(Stage):
    """A source's pairs with the teacher's vectors."""

    kind = "embeddings"

    def specs(self, arm: Arm) -> dict[str, Spec]:
        return {
            source: embeddings_spec(arm.sources[source].embed, pairs)
            for source, pairs in arm.specs("pairs").items()
        }

    def make(self, specs: Sequence[Spec], root: Root) -> None:
        """Embed both sides of every pair.

        Raises:
            StrataError: a teacher cannot be loaded, or gives a zero or non-finite vector.
        """
        configs: list[EmbedConfig] = [spec.config["embed"] for spec in specs]
        for teacher in dict.fromkeys(config.teacher for config in configs):
            teacher.folder()  # fail here, with one message, rather than in every worker
        jobs = [_job(config, spec, root) for config, spec in zip(configs, specs, strict=True)]
        first = configs[0]  # how many there are is no source's own
        make(
            "embed",
            jobs,
            Workers(
                first.min_workers, first.max_workers, first.cpus_per_worker, first.gpus_per_worker
            ),
        )


STAGE = Embed()


def embeddings_spec(config: EmbedConfig, pairs: Spec) -> Spec:
    """What a source's embeddings are made from."""
    return Spec("embeddings", 1, {"embed": config}, {"pairs": pairs}, label=pairs.label)


def _job(config: EmbedConfig, spec: Spec, root: Root) -> Job:
    pairs, draft = root.open(spec.inputs["pairs"]), Draft(root, spec)
    tasks = [Task(piece.id, piece, str(piece)) for piece in pairs.slices(config.task_rows)]

    def publish(receipts: list[Receipt]) -> Artifact:
        spent = [receipt.stats["spent"] for receipt in receipts]
        totals = {name: sum(each[name] for each in spent) for name in spent[0]}
        return draft.publish(receipts, {"width": receipts[0].stats["width"], "spent": totals})

    return Job(draft, tasks, functools.partial(_Worker, config, pairs, draft), publish)


class Teacher:
    """A loaded encoder with its own pooling, normalisation and prompts.

    Attributes:
        spent: what `encode` has cost so far: num_tokens, padding_tokens, tokenize_seconds,
            forward_seconds.
        batch_tokens: padding included, encoded at once.

    Raises:
        StrataError: the teacher cannot be loaded, or a GPU was asked for and there is none.
    """

    def __init__(self, config: EmbedConfig) -> None:
        # Ray shows a node's GPUs to workers that asked for none as well.
        device = "cuda" if config.gpus_per_worker else "cpu"
        if config.gpus_per_worker and not torch.cuda.is_available():
            raise StrataError(
                f"embed.gpus_per_worker={config.gpus_per_worker:g}: this worker's node, "
                f"{platform.node()}, has no GPU that torch can use though Ray counts one there; "
                "install a driver and a torch with CUDA, or set it to 0"
            )
        self.model = _load(config.teacher, config.precision, device)
        self.spent: dict[str, float] = defaultdict(float)
        # A CPU gains nothing from large batches, and small ones hold texts of one length: 1.4 to
        # 2.3 times as fast.
        self.batch_tokens = config.batch_tokens or (16_384 if device == "cuda" else 1_024)
        self._max_tokens = min(
            limit
            for limit in (config.max_tokens, self.model.max_seq_length, 2**20)
            if limit is not None
        )
        self._prompts = {
            "query": self._prompt(config.query_prompt, "query"),
            "passage": self._prompt(config.passage_prompt, "document", "passage", "corpus"),
        }

    def _prompt(self, given: str | None, *names: str) -> str:
        """The prompt asked for, or the model's own under the first of `names` it has."""
        if given is not None:
            return given
        return next(
            (self.model.prompts[name] or "" for name in names if name in self.model.prompts), ""
        )

    @torch.inference_mode()
    def encode(self, texts: list[str], side: str) -> np.ndarray:
        """Unit vectors float16 [len(texts), D]; each distinct text is encoded once.

        Args:
            side: query or passage; says which prompt to put before the texts.
        """
        prompt = self._prompts[side]
        distinct = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        tokenizer = self.model.tokenizer
        started = time.perf_counter()
        encoded = tokenizer(
            [prompt + text for text in distinct],
            truncation=True,
            max_length=self._max_tokens,
            padding=False,
            return_attention_mask=True,
        )
        lengths = np.array([len(ids) for ids in encoded["input_ids"]])
        self.spent["tokenize_seconds"] += time.perf_counter() - started
        started = time.perf_counter()
        vectors: np.ndarray | None = None
        for rows in _batches(lengths, self.batch_tokens):
            features: dict[str, Any] = tokenizer.pad(
                {name: [column[row] for row in rows] for name, column in encoded.items()},
                return_tensors="pt",
            ).to(self.model.device)
            self.spent["num_tokens"] += int(lengths[rows].sum())
            self.spent["padding_tokens"] += features["input_ids"].numel() - int(lengths[rows].sum())
            if prompt:  # some poolings leave the prompt out of the mean
                features["prompt_length"] = len(tokenizer(prompt)["input_ids"]) - 1
            embedded = self.model(features)["sentence_embedding"].float()
            embedded = torch.nn.functional.normalize(embedded, dim=-1).half().cpu().numpy()
            if vectors is None:
                vectors = np.empty((len(distinct), embedded.shape[1]), np.float16)
            vectors[rows] = embedded
        assert vectors is not None
        self.spent["forward_seconds"] += time.perf_counter() - started
        return vectors[[distinct[text] for text in texts]]


@functools.lru_cache(maxsize=1)
def _load(teacher: ModelRef, precision: str, device: str) -> Any:
    """A teacher that all sources' tasks in this process share, each with its own prompts."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return load_embedder(teacher.folder(), device, dtype=dtype).eval()


def _batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Rows of similar length, longest first, as many as fit `batch_tokens` once padded."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // int(lengths[order[start]]))
        yield order[start : start + size]
        start += size


class _Worker:
    def __init__(self, config: EmbedConfig, pairs: Artifact, draft: Draft) -> None:
        self._pairs = pairs
        self._draft = draft
        self._teacher = Teacher(config)

    def __call__(self, piece: Slice) -> Receipt:
        table = self._pairs.read_slice(piece)
        self._teacher.spent.clear()
        vectors = []
        for side in ("query", "passage"):
            matrix = self._teacher.encode(table[side].to_pylist(), side)
            check_vectors(matrix, table["pair_id"], side)
            vectors.append(matrix)
        schema = embeddings_schema(vectors[0].shape[1])
        columns = [*table.columns, *(fixed_size_list(matrix) for matrix in vectors)]
        embedded = pa.Table.from_arrays(columns, schema=schema)
        groups = (
            embedded.slice(first, _ROW_GROUP_ROWS)
            for first in range(0, embedded.num_rows, _ROW_GROUP_ROWS)
        )
        started = time.perf_counter()
        part = self._draft.write("embeddings", piece.id, schema, groups)
        spent = {**self._teacher.spent, "write_seconds": time.perf_counter() - started}
        return Receipt([part], piece.num_rows, stats={"width": vectors[0].shape[1], "spent": spent})


def check_vectors(matrix: np.ndarray, pair_ids: pa.ChunkedArray, side: str) -> None:
    """Raise StrataError naming the first row whose vector is not finite or is zero."""
    norms = np.linalg.norm(matrix.astype(np.float32), axis=1)
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0.5)))
    if len(bad):
        raise StrataError(
            f"pair {pair_ids[int(bad[0])].as_py()}: the teacher's {side} vector has norm "
            f"{norms[bad[0]]}; look at this text and at the teacher's precision ({len(bad)} of "
            f"{len(matrix)} rows of this block)"
        )
