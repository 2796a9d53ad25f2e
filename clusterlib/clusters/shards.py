"""Cluster shards: one block in, one Parquet file out, its row groups broken at cluster edges.

The number of files is the number of blocks, whatever k is; nothing is shuffled. Rows are counted in
*leaf order*: by source, then leaf, then block, then place in the block. A row's number in leaf
order depends on the input's order alone, not on how it was cut into blocks, and every cluster of
every cut of the tree is one range of such numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clusterlib.artifacts.artifact import Artifact, Part
from clusterlib.artifacts.tables import INDEX
from clusterlib.clusters.tree import Tree, from_table
from clusterlib.errors import StrataError

_ROW_GROUP_ROWS = 4096  # clusters that follow each other share a row group up to this size


def group(block: pa.Table, file: int) -> tuple[list[pa.Table], pa.Table]:
    """Sort a block by (source, leaf), keeping the order within a leaf, and cut it into row groups.

    Args:
        block: has columns source and leaf.
        file: number of the shard the block becomes.

    Returns:
        The row groups in order, and the runs of rows of one leaf as a table of schema INDEX.
    """
    sources, codes = _codes(block["source"])
    leaves = block["leaf"].to_numpy()
    order = np.lexsort((leaves, codes))
    block = block.take(order)
    codes, leaves = codes[order], leaves[order]
    changes = np.flatnonzero((np.diff(codes) != 0) | (np.diff(leaves) != 0)) + 1
    starts = np.concatenate([[0], changes]) if block.num_rows else changes
    stops = np.append(changes, block.num_rows)[: len(starts)]
    opened = [0]
    row_groups = np.empty(len(starts), np.int32)
    for run, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
        if stop - opened[-1] > _ROW_GROUP_ROWS and start > opened[-1]:
            opened.append(start)
        row_groups[run] = len(opened) - 1
    edges = [*opened, block.num_rows] if block.num_rows else []
    groups = [
        block.slice(start, stop - start) for start, stop in zip(edges[:-1], edges[1:], strict=True)
    ]
    columns = [
        pa.array(sources).take(pa.array(codes[starts])),
        leaves[starts],
        np.full(len(starts), file, np.int32),
        row_groups,
        starts,
        stops - starts,
    ]
    return groups, pa.Table.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, INDEX, strict=True)],
        schema=INDEX,
    )


def _codes(column: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
    """The distinct values of a column, sorted, and the number of each row's, int64 [rows]."""
    encoded = column.combine_chunks().dictionary_encode()
    names = encoded.dictionary.to_pylist()
    rank = np.argsort(np.argsort(np.array(names, dtype=str)))
    return sorted(names), rank[encoded.indices.to_numpy()]


class ShardIndex:
    """Which rows each leaf has, and where in the files a row in leaf order lies.

    Attributes:
        sources: names, sorted.
        trees: source -> merge tree of its leaves.
        leaf_starts: source -> int64 [L+1]; leaf i of the source holds rows [starts[i],
            starts[i+1]).
    """

    def __init__(self, index: pa.Table, trees: Mapping[str, Tree]) -> None:
        self.trees = dict(trees)
        self.sources = sorted(trees)
        codes = pc.index_in(index["source"], pa.array(self.sources, pa.string())).to_numpy()
        leaves, files = index["leaf"].to_numpy(), index["file"].to_numpy()
        order = np.lexsort((files, leaves, codes))
        self._files = files[order]
        self._row_groups = index["row_group"].to_numpy()[order]
        self._first_rows = index["first_row"].to_numpy()[order]
        counts = index["num_rows"].to_numpy()[order]
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self.num_rows = int(self._starts[-1])
        self.leaf_starts: dict[str, np.ndarray] = {}
        edges = np.searchsorted(codes[order], np.arange(len(self.sources) + 1))
        for source, first, stop in zip(self.sources, edges[:-1], edges[1:], strict=True):
            sizes = np.bincount(
                leaves[order[first:stop]], counts[first:stop], self.trees[source].num_leaves
            )
            self.leaf_starts[source] = self._starts[first] + np.concatenate(
                [[0], np.cumsum(sizes)]
            ).astype(np.int64)

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """File number and row in that file of rows given in leaf order, all int64 [n]."""
        runs = np.searchsorted(self._starts, rows, side="right") - 1
        return self._files[runs], self._first_rows[runs] + rows - self._starts[runs]

    def runs(self, start: int, stop: int) -> list[tuple[int, int, int, int]]:
        """Where rows [start, stop) in leaf order lie: (file, row group, first row in the file,
        number of rows).
        """
        inside = slice(
            np.searchsorted(self._starts, start, "right") - 1,
            np.searchsorted(self._starts, stop, "left"),
        )
        firsts = np.maximum(self._starts[:-1][inside], start)
        counts = np.minimum(self._starts[1:][inside], stop) - firsts
        rows = self._first_rows[inside] + firsts - self._starts[:-1][inside]
        columns = (self._files[inside], self._row_groups[inside], rows, counts)
        return list(zip(*(column.tolist() for column in columns), strict=True))


@dataclass(frozen=True)
class Shards:
    """What a run learns from: the `shards` artifacts of its sources, as one.

    Its index is their concatenation: files are numbered through, source after source.
    """

    artifacts: Sequence[Artifact]

    @functools.cached_property
    def files(self) -> list[tuple[Artifact, Part]]:
        """By number, the artifact and the part that hold a file's rows."""
        return [(artifact, part) for artifact in self.artifacts for part in artifact.parts()]

    @functools.cached_property
    def index(self) -> ShardIndex:
        trees: dict[str, Tree] = {}
        tables, first_file = [], 0
        for artifact in self.artifacts:
            table = artifact.read("index")
            file = pc.add(table["file"], pa.scalar(first_file, pa.int32()))
            place = table.schema.get_field_index("file")
            tables.append(table.set_column(place, INDEX.field("file"), file))
            trees |= from_table(artifact.read("tree"))
            first_file += len(artifact.parts())
        if not any(table.num_rows for table in tables):
            raise StrataError(
                "no pair is left to train on: all are held out for the tests of `evaluate`; see "
                "their hold_out"
            )
        return ShardIndex(pa.concat_tables(tables), trees)

    @property
    def max_tokens(self) -> int:
        """That a query or a passage of any source may have."""
        settings = [artifact.config["shard"] for artifact in self.artifacts]
        return max(
            int(tokens[f"{side}_max_tokens"])
            for tokens in settings
            for side in ("query", "passage")
        )


def read_range(
    shards: Shards, start: int, stop: int, columns: Sequence[str] | None = None
) -> pa.Table:
    """Rows [start, stop) in leaf order, such as those of one cluster; only their row groups are
    read.
    """
    runs = shards.index.runs(start, stop)
    pieces: list[pa.Table | None] = [None] * len(runs)
    for file in sorted({run[0] for run in runs}):
        artifact, part = shards.files[file]
        wanted = sorted({row_group for number, row_group, _, _ in runs if number == file})
        with artifact.open_part(part) as opened:
            table = opened.read_row_groups(wanted, columns=columns)
            groups = [opened.metadata.row_group(number) for number in range(opened.num_row_groups)]
        sizes = np.array([group.num_rows for group in groups])
        skipped = np.cumsum(np.where(np.isin(np.arange(len(sizes)), wanted), 0, sizes))
        for place, (number, row_group, first_row, num_rows) in enumerate(runs):
            if number == file:
                pieces[place] = table.slice(first_row - skipped[row_group], num_rows)
    return pa.concat_tables(pieces)
