"""shard: `embeddings` + `centroids` -> `shards`, rows grouped by cluster and tokenised, in one
pass; what retrieval tests hold out is left out here -> rejects.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from pydantic import Field

from clusterlib.artifacts.artifact import Artifact, Root, Slice, Spec
from clusterlib.artifacts.config import Config, fingerprint, runtime
from clusterlib.artifacts.draft import Draft, Receipt
from clusterlib.artifacts.tables import INDEX, REJECTS, TREE, shards_schema, token_type
from clusterlib.artifacts.tables import vectors as to_matrix
from clusterlib.clusters import kmeans, shards
from pipelines.held_out import HeldOut, HoldOutConfig, held_out, held_out_content
from pipelines.retrieval_tests import TestConfig
from pipelines.stage import Stage
from pipelines.tasks import Job, Task, Workers, make
from train.data import TOKENIZER
from train.model import TokenizerRef

if TYPE_CHECKING:
    from pipelines.run import Arm

_EMBEDDINGS = kmeans.columns("both")
_TOKENIZED_TEXTS = 1024  # at once; the tokenizer takes over a hundred bytes for each token


class ShardConfig(Config):
    """How texts become the student's tokens."""

    tokenizer: TokenizerRef = Field(..., description="the student's")
    query_prompt: str = Field(
        "", description="put before each query, in training and in the exported model"
    )
    passage_prompt: str = Field("", description="put before each passage")
    query_max_tokens: int = Field(..., ge=3, description="longer queries are cut")
    passage_max_tokens: int = Field(..., ge=3, description="longer passages are cut")
    teacher_vectors: bool = Field(
        False, description="carry the teacher's vectors along, to filter and mine by"
    )

    block_rows: int = runtime(
        65_536, ge=1, description="rows a task sorts in memory and writes as one file"
    )


class Shard(Stage):
    """A source's rows ready to train on, each block one file sorted by leaf.

    Besides the table `shards` the artifact holds the tables `index` and `tree` that a plan is made
    from, the tokenizer, and in `rejects` the part of the embeddings and the row of what was held
    out. Centroids are fitted on all pairs.
    """

    kind = "shards"

    def specs(self, arm: Arm) -> dict[str, Spec]:
        return {
            source: shards_spec(arm.sources[source].shard, arm.config.evaluate.all_tests, centroids)
            for source, centroids in arm.specs("centroids").items()
        }

    def make(self, specs: Sequence[Spec], root: Root) -> None:
        """Leave out every pair that tests hold out, assign the others to their leaves, tokenise
        them, and write each block.

        Raises:
            StrataError: a tokenizer or what a test holds out cannot be loaded.
        """
        kept_out: dict[str, ray.ObjectRef] = {}
        for spec in specs:
            key = fingerprint(spec.origin)
            if key not in kept_out:  # once in the memory of each node, whatever the workers
                kept_out[key] = ray.put(held_out(spec.config["held_out"].tests))
        jobs = [_job(spec, root, kept_out[fingerprint(spec.origin)]) for spec in specs]
        make("shard", jobs, Workers())


STAGE = Shard()


def shards_spec(config: ShardConfig, tests: Sequence[TestConfig], centroids: Spec) -> Spec:
    """What a source's shards are made from.

    Of the tests it is what they hold out: their names only label rejects and counts, and stay as
    they were when the shards were made.
    """
    return Spec(
        "shards",
        3,
        {"shard": config, "held_out": HoldOutConfig(tests=list(tests))},
        {"embeddings": centroids.inputs["embeddings"], "centroids": centroids},
        {"held_out": held_out_content(tests)},
        label=centroids.label,
    )


def _job(spec: Spec, root: Root, kept_out: ray.ObjectRef) -> Job:
    config: ShardConfig = spec.config["shard"]
    embeddings, centroids = (root.open(spec.inputs[name]) for name in ("embeddings", "centroids"))
    tokenizer, draft = config.tokenizer.load(), Draft(root, spec)
    # The number of rows is in the id: a block of another size is another block.
    tasks = [
        Task(f"{file:06d}-{config.block_rows}", (file, block), ", ".join(map(str, block)))
        for file, block in enumerate(embeddings.blocks(config.block_rows))
    ]

    def publish(receipts: list[Receipt]) -> Artifact:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            files = draft.write_folder(TOKENIZER, Path(folder))
        tree = draft.write("tree", "tree", TREE, [centroids.read(columns=TREE.names)])
        truncated = {
            side: sum(receipt.stats["num_truncated"][side] for receipt in receipts)
            for side in ("query", "passage")
        }
        return draft.publish([*receipts, Receipt([tree, *files])], {"num_truncated": truncated})

    worker = functools.partial(_Worker, config, embeddings, centroids, draft, kept_out)
    return Job(draft, tasks, worker, publish)


class _Worker:
    def __init__(
        self,
        config: ShardConfig,
        embeddings: Artifact,
        centroids: Artifact,
        draft: Draft,
        kept_out: ray.ObjectRef,
    ) -> None:
        self._config = config
        self._embeddings = embeddings
        self._draft = draft
        self._held_out: HeldOut = ray.get(kept_out)
        self._field: kmeans.ClusterField = centroids.config["cluster"]["field"]
        self._centroids = leaf_centroids(centroids)
        tokenizer = config.tokenizer.load()
        self._token = token_type(len(tokenizer))
        # What transformers wraps around it takes as long again.
        self._tokenizer = tokenizer.backend_tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = tokenizer.split_special_tokens
        self._truncation_side = tokenizer.truncation_side

    def __call__(self, work: tuple[int, list[Slice]]) -> Receipt:
        file, pieces = work
        config = self._config
        embeddings = _EMBEDDINGS if config.teacher_vectors else kmeans.columns(self._field)
        columns = ["pair_id", "source", "query_id", "query", "passage_id", "passage", *embeddings]
        table, refused = self._usable(pieces, columns)
        query, cut_queries = self._tokenize(
            table["query"], config.query_prompt, config.query_max_tokens
        )
        passage, cut_passages = self._tokenize(
            table["passage"], config.passage_prompt, config.passage_max_tokens
        )
        ids = [table[name] for name in ("pair_id", "source")]
        teacher = [table[name] for name in _EMBEDDINGS] if config.teacher_vectors else []
        vectors = kmeans.field_vectors(table, self._field)
        leaf = pa.array(kmeans.assign(vectors, self._centroids)[0])
        block = pa.Table.from_arrays(
            [*ids, leaf, table["query_id"], table["passage_id"], query, passage, *teacher],
            schema=shards_schema(self._token, self._embeddings.stats["width"] if teacher else None),
        )
        groups, runs = shards.group(block.combine_chunks(), file)
        parts = [
            self._draft.write("shards", f"{file:06d}", block.schema, groups),
            self._draft.write("index", f"{file:06d}", INDEX, [runs]),
        ]
        if refused.num_rows:
            parts.append(self._draft.write("rejects", f"{file:06d}", REJECTS, [refused]))
        return Receipt(
            parts,
            block.num_rows + refused.num_rows,
            _counts(refused["reason"]),
            {"num_truncated": {"query": cut_queries, "passage": cut_passages}},
        )

    def _usable(self, pieces: list[Slice], columns: list[str]) -> tuple[pa.Table, pa.Table]:
        """The rows of a block that may be trained on, and the others as rejects."""
        usable, refused = [], []
        for piece in pieces:
            table = self._embeddings.read_slice(piece, columns)
            reasons = self._held_out.find(
                table["passage_id"].to_numpy(), table["query_id"].to_numpy()
            )
            usable.append(table.filter(pa.array(reasons < 0)))
            refused.append(self._refused(piece, table["source"], reasons))
        return pa.concat_tables(usable), pa.concat_tables(refused)

    def _refused(self, piece: Slice, source: pa.ChunkedArray, reasons: np.ndarray) -> pa.Table:
        """Rejects of a slice, given the number of each row's reason; -1 where it has none."""
        rows = np.flatnonzero(reasons >= 0)
        columns = [
            source.take(rows),
            pa.array([piece.part.path] * len(rows), pa.string()),
            pa.array(piece.first_row + rows),
            pa.array(self._held_out.reasons, pa.string()).take(reasons[rows]),
        ]
        return pa.Table.from_arrays(columns, schema=REJECTS)

    def _tokenize(
        self, texts: pa.ChunkedArray, prompt: str, max_tokens: int
    ) -> tuple[pa.ChunkedArray, int]:
        """Token ids with prompt and special tokens, and how many texts were cut to `max_tokens`."""
        self._tokenizer.enable_truncation(max_tokens, direction=self._truncation_side)
        tokens, cut = [], 0
        for first in range(0, len(texts), _TOKENIZED_TEXTS):
            piece = texts.slice(first, _TOKENIZED_TEXTS).to_pylist()
            encoded = self._tokenizer.encode_batch_fast([prompt + text for text in piece])
            tokens.append(pa.array([item.ids for item in encoded], pa.list_(self._token)))
            cut += sum(bool(item.overflowing) for item in encoded)
        return pa.chunked_array(tokens, pa.list_(self._token)), cut


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    """How many rows have each value, sorted by it."""
    counted = pc.value_counts(column).to_pylist()
    return dict(sorted((item["values"], item["counts"]) for item in counted))


def leaf_centroids(centroids: Artifact) -> np.ndarray:
    """Unit vectors of a source's leaves in leaf order, float32 [L, D]."""
    nodes = centroids.read()
    return to_matrix(nodes.filter(pc.is_null(nodes["left"]))["centroid"])
