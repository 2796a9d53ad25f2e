"""shard: `embeddings` + `centroids` -> `shards`, rows grouped by cluster and tokenised, in one
pass.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from clusterlib.artifacts.artifact import Artifact, Root, Slice, Spec
from clusterlib.artifacts.config import Config, runtime
from clusterlib.artifacts.draft import Draft, Receipt
from clusterlib.artifacts.tables import INDEX, TREE, shards_schema, token_type
from clusterlib.artifacts.tables import vectors as to_matrix
from clusterlib.clusters import kmeans, shards
from pipelines.stage import Task, Workers, make
from train.data import TOKENIZER
from train.model import TokenizerRef

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


def shards_spec(config: ShardConfig, embeddings: str, centroids: str) -> Spec:
    """What the shards are made from; the last two are fingerprints."""
    return Spec("shards", 1, {"shard": config}, {"embeddings": embeddings, "centroids": centroids})


def shard(config: ShardConfig, embeddings: Artifact, centroids: Artifact, root: Root) -> Artifact:
    """Assign every pair to its leaf, tokenise it, and write each block as one file sorted by leaf.

    The artifact holds the table `shards`, the tables `index` and `tree` that a plan is made from,
    and the tokenizer.

    Raises:
        StrataError: the tokenizer cannot be loaded.
    """
    spec = shards_spec(config, embeddings.fingerprint, centroids.fingerprint)
    draft = Draft(root, spec)
    made = draft.find()
    if made is not None:
        return made
    tokenizer = config.tokenizer.load()
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
        stats = {
            "num_rows_by_source": embeddings.stats["num_rows_by_source"],
            "num_truncated": truncated,
        }
        return draft.publish([*receipts, Receipt([tree, *files])], stats)

    return make(
        draft,
        "shard",
        tasks,
        functools.partial(_Worker, config, embeddings, centroids, draft),
        Workers(),
        publish,
    )


class _Worker:
    def __init__(
        self, config: ShardConfig, embeddings: Artifact, centroids: Artifact, draft: Draft
    ) -> None:
        self._config = config
        self._embeddings = embeddings
        self._draft = draft
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
        table = pa.concat_tables([self._embeddings.read_slice(piece, columns) for piece in pieces])
        query, cut_queries = self._tokenize(
            table["query"], config.query_prompt, config.query_max_tokens
        )
        passage, cut_passages = self._tokenize(
            table["passage"], config.passage_prompt, config.passage_max_tokens
        )
        ids = [table[name] for name in ("pair_id", "source")]
        teacher = [table[name] for name in _EMBEDDINGS] if config.teacher_vectors else []
        leaf = pa.array(self._leaves(table))
        block = pa.Table.from_arrays(
            [*ids, leaf, table["query_id"], table["passage_id"], query, passage, *teacher],
            schema=shards_schema(self._token, self._embeddings.stats["width"] if teacher else None),
        )
        groups, runs = shards.group(block.combine_chunks(), file)
        parts = [
            self._draft.write("shards", f"{file:06d}", block.schema, groups),
            self._draft.write("index", f"{file:06d}", INDEX, [runs]),
        ]
        return Receipt(
            parts,
            block.num_rows,
            stats={"num_truncated": {"query": cut_queries, "passage": cut_passages}},
        )

    def _leaves(self, table: pa.Table) -> np.ndarray:
        """The nearest leaf of each pair's own source, int32 [rows]."""
        vectors = kmeans.field_vectors(table, self._field)
        leaves = np.empty(table.num_rows, np.int32)
        for source in pc.unique(table["source"]).to_pylist():
            rows = pc.equal(table["source"], source).to_numpy()
            leaves[rows] = kmeans.assign(vectors[rows], self._centroids[source])[0]
        return leaves

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
        return pa.chunked_array(tokens), cut


def leaf_centroids(centroids: Artifact) -> dict[str, np.ndarray]:
    """source -> unit vectors of its leaves in leaf order, float32 [L, D]."""
    table = centroids.read()
    table = table.filter(pc.is_null(table["left"]))
    return {
        source: to_matrix(table.filter(pc.equal(table["source"], source))["centroid"])
        for source in pc.unique(table["source"]).to_pylist()
    }
