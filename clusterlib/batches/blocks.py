"""Strata, the blocks each is cut into, and what is done with the rows that are left over.

A block is what strata give at once: a batch, or a part of one. Here rows are counted, not chosen: a
    segment
names places in a stratum's permutation, whatever rows a lap then puts there.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from clusterlib.clusters.shards import ShardIndex
from clusterlib.clusters.tree import Tree

Leftover = Literal["drop", "merge", "source"]


@dataclass(frozen=True)
class Stratum:
    """Rows [first_row, first_row + num_rows) in leaf order."""

    name: str
    first_row: int
    num_rows: int


@dataclass(frozen=True)
class Segment:
    """Places [start, stop) of a stratum's permutation."""

    stratum: int
    start: int
    stop: int


@dataclass(frozen=True)
class Source:
    """The blocks of a source; with strategy random, those of all sources, under the name `all`.

    Attributes:
        strata: its own, in leaf order.
        first_stratum: number of the first of them.
        block_size: rows of a block.
        edges: int64 [S + 1]; its i-th stratum fills blocks [edges[i], edges[i + 1]) alone.
        mixed: the blocks made of leftovers, numbered after those.
    """

    name: str
    strata: list[Stratum]
    first_stratum: int
    block_size: int
    edges: np.ndarray
    mixed: list[list[Segment]]

    @property
    def num_rows(self) -> int:
        return sum(stratum.num_rows for stratum in self.strata)

    @property
    def num_pure_blocks(self) -> int:
        """Those of one stratum."""
        return int(self.edges[-1])

    @property
    def num_blocks(self) -> int:
        return self.num_pure_blocks + len(self.mixed)

    def block(self, number: int) -> list[Segment]:
        """What block `number` is made of."""
        if number >= self.num_pure_blocks:
            return self.mixed[number - self.num_pure_blocks]
        place = int(np.searchsorted(self.edges, number, side="right")) - 1
        start = (number - int(self.edges[place])) * self.block_size
        return [Segment(self.first_stratum + place, start, start + self.block_size)]


def everything(index: ShardIndex) -> dict[str, list[Stratum]]:
    """One stratum of all sources, named `all`."""
    return {"all": [Stratum("all", 0, index.num_rows)]}


def by_source(index: ShardIndex) -> dict[str, list[Stratum]]:
    """Each source as one stratum."""
    return {
        source: [Stratum(source, int(starts[0]), int(starts[-1] - starts[0]))]
        for source, starts in index.leaf_starts.items()
    }


def by_cluster(index: ShardIndex, k: int | None) -> dict[str, list[Stratum]]:
    """The k clusters of each source; all its leaves by default, or if it has fewer (being too small
    for more).
    """
    strata = {}
    for source, starts in index.leaf_starts.items():
        tree = index.trees[source]
        nodes = tree.cut(min(k or tree.num_leaves, tree.num_leaves))
        edges = [*starts[[node.first_leaf for node in nodes]].tolist(), int(starts[-1])]
        strata[source] = [
            Stratum(f"{source}/{place}", first, stop - first)
            for place, (first, stop) in enumerate(itertools.pairwise(edges))
        ]
    return strata


def cut_blocks(
    index: ShardIndex, strata_by_source: Mapping[str, list[Stratum]], leftover: Leftover, size: int
) -> list[Source]:
    """The blocks of `size` rows of every source."""
    sources = []
    first = 0
    for name, strata in strata_by_source.items():
        counts = [stratum.num_rows // size for stratum in strata]
        rests = [
            Segment(first + place, count * size, stratum.num_rows)
            for place, (count, stratum) in enumerate(zip(counts, strata, strict=True))
        ]
        mixed = _mixed(index.trees[name], leftover, rests, size) if len(strata) > 1 else []
        sources.append(Source(name, strata, first, size, np.cumsum([0, *counts]), mixed))
        first += len(strata)
    return sources


def _mixed(tree: Tree, leftover: Leftover, rests: list[Segment], size: int) -> list[list[Segment]]:
    """Blocks made of what a source's strata leave over."""
    if leftover == "drop":
        return []
    if leftover == "source":
        return _fill(rests, size)[0]
    blocks = []
    pools = {node.id: [rest] for node, rest in zip(tree.cut(len(rests)), rests, strict=True)}
    for left, right, joined in tree.merges_above(len(rests)):
        full, pools[joined] = _fill(pools.pop(left) + pools.pop(right), size)
        blocks += full
    return blocks


def _fill(pool: list[Segment], size: int) -> tuple[list[list[Segment]], list[Segment]]:
    """As many blocks as the pool fills, and the segments that remain."""
    blocks = []
    taken: list[Segment] = []
    missing = size
    for segment in pool:
        start = segment.start
        while segment.stop - start >= missing:
            blocks.append([*taken, Segment(segment.stratum, start, start + missing)])
            start += missing
            taken, missing = [], size
        if start < segment.stop:
            taken.append(Segment(segment.stratum, start, segment.stop))
            missing -= segment.stop - start
    return blocks, taken
