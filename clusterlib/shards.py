"""Cluster shards: one block in, one Parquet file out, its row groups broken at cluster edges.

The number of files is the number of blocks, whatever k is; nothing is shuffled. Rows are counted in *leaf
order*: by source, then leaf, then block, then place in the block. A row's number in leaf order depends on
the input's order alone, not on how it was cut into blocks, and every cluster of every cut of the tree is
one range of such numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clusterlib.tables import INDEX
from clusterlib.tree import Tree

_ROW_GROUP_ROWS = 4096  # small neighbouring clusters share a row group up to this size


@dataclass(frozen=True)
class Run:
    """Rows of one leaf that lie together in one file: first row and number of rows, and their row group."""

    source: str
    leaf: int
    row_group: int
    first_row: int
    num_rows: int


def group(block: pa.Table) -> tuple[list[pa.Table], list[Run]]:
    """Sort a block by (source, leaf), keeping the order within a leaf, and cut it into row groups.

    Args:
        block: has columns source and leaf.

    Returns:
        The row groups in order, and the runs that tell their leaves apart.
    """
    encoded = block["source"].combine_chunks().dictionary_encode()
    names = np.array(encoded.dictionary.to_pylist(), dtype=str)
    sources, codes = np.sort(names), np.argsort(np.argsort(names))[encoded.indices.to_numpy()]
    leaves = block["leaf"].to_numpy()
    order = np.lexsort((leaves, codes))
    block = block.take(order)
    codes, leaves = codes[order], leaves[order]
    edges = np.flatnonzero((np.diff(codes) != 0) | (np.diff(leaves) != 0)) + 1
    starts = [0, *edges.tolist()] if block.num_rows else []
    stops = [*edges.tolist(), block.num_rows]
    groups: list[pa.Table] = []
    runs: list[Run] = []
    opened = 0
    for start, stop in zip(starts, stops, strict=False):
        if start > opened and stop - opened > _ROW_GROUP_ROWS:
            groups.append(block.slice(opened, start - opened))
            opened = start
        runs.append(Run(str(sources[codes[start]]), int(leaves[start]), len(groups), start, stop - start))
    if block.num_rows:
        groups.append(block.slice(opened))
    return groups, runs


def index_table(runs_by_file: Sequence[Sequence[Run]]) -> pa.Table:
    """The runs of every file as a table of schema INDEX, in leaf order."""
    rows = sorted(
        (run.source, run.leaf, file, run.row_group, run.first_row, run.num_rows)
        for file, runs in enumerate(runs_by_file)
        for run in runs
    )
    columns = zip(*rows, strict=True) if rows else [[]] * len(INDEX)
    return pa.Table.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, INDEX, strict=True)], schema=INDEX
    )


class ShardIndex:
    """Which rows each leaf has, and where in the files a row in leaf order lies.

    Attributes:
        sources: names, sorted.
        trees: source -> merge tree of its leaves.
        leaf_starts: source -> int64 [L+1]; leaf i of the source holds rows [starts[i], starts[i+1]).
    """

    def __init__(self, index: pa.Table, trees: Mapping[str, Tree]) -> None:
        self.trees = dict(trees)
        self.sources = sorted(trees)
        self._files = index["file"].to_numpy()
        self._first_rows = index["first_row"].to_numpy()
        counts = index["num_rows"].to_numpy()
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self.num_rows = int(self._starts[-1])
        codes = pc.index_in(index["source"], pa.array(self.sources, pa.string())).to_numpy()
        leaves = index["leaf"].to_numpy()
        self.leaf_starts: dict[str, np.ndarray] = {}
        total = 0
        for code, source in enumerate(self.sources):
            here = codes == code
            sizes = np.bincount(leaves[here], counts[here], minlength=self.trees[source].num_leaves)
            self.leaf_starts[source] = total + np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
            total = int(self.leaf_starts[source][-1])

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """File number and row in that file of rows given in leaf order, all int64 [n]."""
        runs = np.searchsorted(self._starts, rows, side="right") - 1
        return self._files[runs], self._first_rows[runs] + rows - self._starts[runs]
