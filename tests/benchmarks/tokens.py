"""Tokens of pairs as the step loop reads them: one source, one cluster, no text twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from clusterlib.artifacts.artifact import Artifact, Root, Spec
from clusterlib.artifacts.draft import Draft, Receipt
from clusterlib.artifacts.tables import INDEX, TREE, shards_schema
from clusterlib.clusters import shards
from clusterlib.clusters.shards import Shards
from clusterlib.clusters.tree import build
from train.data import TokenStore, cache_shards

_SOURCE = "pairs"


def write_shards(
    root: Root, query: Sequence[Sequence[int]], passage: Sequence[Sequence[int]]
) -> Artifact:
    """A finished artifact such as `shard` makes, with row i of it the i-th pair."""
    token = pa.uint16()
    schema = shards_schema(token)
    numbers = pa.array(range(len(query)), pa.uint64())
    columns = [
        numbers,
        pa.repeat(_SOURCE, len(query)),
        np.zeros(len(query), np.int32),
        numbers,
        numbers,
        *(pa.array(side, pa.list_(token)) for side in (query, passage)),
    ]
    draft = Draft(root, Spec("shards", 1, {"pairs": len(query)}))
    groups, runs = shards.group(
        pa.Table.from_arrays([pa.array(column) for column in columns], schema=schema), file=0
    )
    tree, _ = build(np.ones((1, 1)), np.ones(1))
    parts = [
        draft.write("shards", "0", schema, groups),
        draft.write("index", "0", INDEX, [runs]),
        draft.write("tree", "0", TREE, [tree.to_table(_SOURCE, [1])]),
    ]
    return draft.publish([Receipt(parts, len(query))])


def open_store(made: Artifact, cache_dir: Path) -> TokenStore:
    return TokenStore(
        cache_shards(Shards([made]), cache_dir, teacher=False),
        Shards([made]).index,
        pad_token_id=0,
    )
