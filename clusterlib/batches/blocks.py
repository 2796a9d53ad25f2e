"""Strata, the blocks each is cut into, and what is done with the rows that are left over.

A block is what strata give at once: a batch, or a part of one. Here rows are counted, not chosen: a
segment names places in a stratum's permutation, whatever rows a lap then puts there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from clusterlib.clusters.shards import ShardIndex
from clusterlib.clusters.tree import Tree


@dataclass(frozen=True)
class Stratum:
    """Rows [first_row, first_row + num_rows) in leaf order."""

    name: str
    first_row: int
    num_rows: int


Strata = dict[str, list[Stratum]]  # of each source


@dataclass(frozen=True)
class Segment:
    """Places [start, stop) of a stratum's permutation."""

    stratum: int
    start: int
    stop: int


Blocks = list[list[Segment]]


@dataclass(frozen=True)
class SourceBlocks:
    """The blocks of a source; where sources are mixed, those of all of them, under one name.

    Attributes:
        strata: the source's own, in leaf order.
        first_stratum: number of the first of them.
        block_rows: rows of a block.
        edges: int64 [S + 1]; its i-th stratum fills blocks [edges[i], edges[i + 1]) alone.
        mixed: the blocks made of leftovers, numbered after those.
    """

    name: str
    strata: list[Stratum]
    first_stratum: int
    block_rows: int
    edges: np.ndarray
    mixed: Blocks

    @property
    def num_rows(self) -> int:
        return sum(stratum.num_rows for stratum in self.strata)

    @property
    def num_pure_blocks(self) -> int:
        """Blocks that are of one stratum."""
        return int(self.edges[-1])

    @property
    def num_blocks(self) -> int:
        return self.num_pure_blocks + len(self.mixed)

    def block(self, number: int) -> list[Segment]:
        """What block `number` is made of."""
        if number >= self.num_pure_blocks:
            return self.mixed[number - self.num_pure_blocks]
        place = int(np.searchsorted(self.edges, number, side="right")) - 1
        start = (number - int(self.edges[place])) * self.block_rows
        return [Segment(self.first_stratum + place, start, start + self.block_rows)]


def cut_blocks(
    index: ShardIndex, strata_by_source: Strata, leftover: str, block_rows: int
) -> list[SourceBlocks]:
    """The blocks of every source; `leftover` is a name in LEFTOVERS."""
    make_mixed = LEFTOVERS[leftover].blocks
    sources = []
    first = 0
    for name, strata in strata_by_source.items():
        counts = [stratum.num_rows // block_rows for stratum in strata]
        rests = [
            Segment(first + place, count * block_rows, stratum.num_rows)
            for place, (count, stratum) in enumerate(zip(counts, strata, strict=True))
        ]
        mixed = make_mixed(index.trees[name], rests, block_rows) if len(strata) > 1 else []
        edges = np.cumsum([0, *counts])
        sources.append(SourceBlocks(name, strata, first, block_rows, edges, mixed))
        first += len(strata)
    return sources


def drop(tree: Tree, rests: list[Segment], block_rows: int) -> Blocks:
    """No blocks."""
    return []


def merge(tree: Tree, rests: list[Segment], block_rows: int) -> Blocks:
    """Blocks of what is nearest along the tree."""
    blocks = []
    pools = {node.id: [rest] for node, rest in zip(tree.cut(len(rests)), rests, strict=True)}
    for left, right, joined in tree.merges_above(len(rests)):
        full, pools[joined] = fill(pools.pop(left) + pools.pop(right), block_rows)
        blocks += full
    return blocks


def pool(tree: Tree, rests: list[Segment], block_rows: int) -> Blocks:
    """Blocks of whatever the source has, in leaf order."""
    return fill(rests, block_rows)[0]


def fill(segments: list[Segment], block_rows: int) -> tuple[Blocks, list[Segment]]:
    """As many blocks as segments fill, and what remains of them.

    >>> blocks, rest = fill([Segment(0, 8, 11), Segment(1, 4, 6)], block_rows=4)
    >>> blocks
    [[Segment(stratum=0, start=8, stop=11), Segment(stratum=1, start=4, stop=5)]]
    >>> rest
    [Segment(stratum=1, start=5, stop=6)]
    """
    blocks = []
    taken: list[Segment] = []
    missing = block_rows
    for segment in segments:
        start = segment.start
        while segment.stop - start >= missing:
            blocks.append([*taken, Segment(segment.stratum, start, start + missing)])
            start += missing
            taken, missing = [], block_rows
        if start < segment.stop:
            taken.append(Segment(segment.stratum, start, segment.stop))
            missing -= segment.stop - start
    return blocks, taken


@dataclass(frozen=True)
class Leftover:
    """What becomes of the rows that fill no block of their stratum.

    Attributes:
        description: the same for people.
        blocks: (the source's tree, what each of its strata leaves over, rows of a block) -> blocks.
    """

    description: str
    blocks: Callable[[Tree, list[Segment], int], Blocks]


LEFTOVERS = {
    "drop": Leftover("they are dropped", drop),
    "merge": Leftover("they join those of the nearest cluster along the tree", merge),
    "source": Leftover("they join those of the whole source", pool),
}

if TYPE_CHECKING:
    LeftoverName = str
else:
    LeftoverName = Literal[tuple(LEFTOVERS)]
