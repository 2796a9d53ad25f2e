"""Which rows fill each minibatch: a pure function of the shard index, the settings and the seed.

No files, no communication, no dependence on the number of ranks. A plan's memory grows with the number of
strata, not rows, and batch i is had without batches 0..i-1, so a resumed run starts where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from clusterlib.config import Config
from clusterlib.errors import StrataError
from clusterlib.shards import ShardIndex

_ROUNDS = 6
_BATCH_ORDER = 2**32  # key of the order of batches; strata use their own numbers, which are smaller


class BatchingConfig(Config):
    """What fills a minibatch."""

    strategy: Literal["random", "source", "cluster"] = Field(
        "cluster",
        description="random: all sources mixed; source: one source a batch; cluster: one cluster of one "
        "source a batch (arXiv 2407.18887)",
    )
    k: int | None = Field(
        None, ge=1, description="clusters per source, up to cluster.num_leaves; by default every leaf is one"
    )
    global_batch_size: int = Field(..., ge=2, description="pairs a step, over all ranks")
    leftover: Literal["drop", "merge", "source"] = Field(
        "merge",
        description="rows of a cluster that fill no batch: drop them, merge them with those of the nearest "
        "cluster along the tree, or pool them per source; what then fills no batch is dropped. Which rows "
        "these are changes every epoch",
    )
    seed: int = Field(0, ge=0)


def permute(keys: np.ndarray, size: int, rounds_keys: Sequence[int]) -> np.ndarray:
    """Entries `keys` of a pseudorandom permutation of range(size), without the other entries.

    A balanced Feistel network over the next even number of bits, walked along its cycle until the value is
    in range (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains", doi:10.1007/3-540-45760-7_9).

    Args:
        keys: [n], values in range(size).
        rounds_keys: what makes this permutation differ from others, such as seed, epoch and stratum.

    Returns:
        int64 [n], distinct for distinct keys, values in range(size).
    """
    half = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    salts = np.random.SeedSequence(list(rounds_keys)).generate_state(_ROUNDS, np.uint64)
    values = np.asarray(keys, np.uint64).copy()
    pending = np.ones(len(values), bool)
    while pending.any():
        left, right = values[pending] >> half, values[pending] & mask
        for salt in salts:
            left, right = right, left ^ (mix(right + salt) & mask)
        values[pending] = (left << half) | right
        pending[pending] = values[pending] >= size
    return values.astype(np.int64)


def mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014, doi:10.1145/2714064.2660195), uint64 to uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class Stratum:
    """Rows [first_row, first_row + num_rows) in leaf order, of which every regular batch takes its own."""

    name: str
    source: str | None
    first_row: int
    num_rows: int


@dataclass(frozen=True)
class Batch:
    """One global minibatch.

    Attributes:
        rows: int64 [B], numbers in leaf order, all different.
        strata: numbers of the strata the rows are from; one unless the batch is made of leftovers.
        label: name of the stratum, or of the pool of leftovers.
    """

    rows: np.ndarray
    strata: tuple[int, ...]
    label: str


@dataclass(frozen=True)
class _Segment:
    """Places [start, stop) of a stratum's permutation."""

    stratum: int
    start: int
    stop: int


class Plan:
    """The batches of every epoch.

    Attributes:
        strata: in leaf order.
        num_batches: per epoch; the same for every epoch.
        num_pure_batches: those whose rows are of one stratum.
        num_rows, num_planned_rows: rows there are, and rows an epoch visits, each once.

    Raises:
        StrataError: `k` is larger than any tree, or no stratum fills a batch.
    """

    def __init__(self, index: ShardIndex, config: BatchingConfig) -> None:
        self.config = config
        self.strata = _strata(index, config)
        self.num_rows = index.num_rows
        size = config.global_batch_size
        self._regular = np.cumsum([0] + [stratum.num_rows // size for stratum in self.strata])
        self._pooled = list(_pool(index, config, self.strata))
        self.num_batches = int(self._regular[-1]) + len(self._pooled)
        self.num_pure_batches = int(self._regular[-1]) + sum(len(pool) == 1 for _, pool in self._pooled)
        self.num_planned_rows = self.num_batches * size
        if not self.num_batches:
            largest = max(self.strata, key=lambda stratum: stratum.num_rows)
            raise StrataError(
                f"batching.global_batch_size={size}: no stratum fills a batch; the largest of "
                f"{len(self.strata)} is {largest.name} with {largest.num_rows} rows; set a smaller batch, a "
                f"smaller batching.k, or batching.leftover=merge (it is {config.leftover})"
            )

    def batch(self, epoch: int, index: int) -> Batch:
        """Batch `index` of `epoch`."""
        if not 0 <= index < self.num_batches:
            raise IndexError(f"batch {index} of an epoch of {self.num_batches}")
        place = int(self._permute(np.array([index]), self.num_batches, epoch, _BATCH_ORDER)[0])
        if place < self._regular[-1]:
            number = int(np.searchsorted(self._regular, place, side="right")) - 1
            start = (place - int(self._regular[number])) * self.config.global_batch_size
            segments = [_Segment(number, start, start + self.config.global_batch_size)]
            label = self.strata[number].name
        else:
            label, segments = self._pooled[place - int(self._regular[-1])]
        rows = np.concatenate([self._rows(epoch, segment) for segment in segments])
        return Batch(rows, tuple(segment.stratum for segment in segments), label)

    def step(self, step: int) -> Batch:
        """The batch of optimizer step `step`, counted over epochs."""
        return self.batch(*divmod(step, self.num_batches))

    def _rows(self, epoch: int, segment: _Segment) -> np.ndarray:
        stratum = self.strata[segment.stratum]
        places = np.arange(segment.start, segment.stop)
        return stratum.first_row + self._permute(places, stratum.num_rows, epoch, segment.stratum)

    def _permute(self, places: np.ndarray, size: int, epoch: int, key: int) -> np.ndarray:
        return permute(places, size, (self.config.seed, epoch, key))


def _strata(index: ShardIndex, config: BatchingConfig) -> list[Stratum]:
    if config.strategy == "random":
        return [Stratum("all", None, 0, index.num_rows)]
    strata = []
    for source in index.sources:
        starts = index.leaf_starts[source]
        if config.strategy == "source":
            strata.append(Stratum(source, source, int(starts[0]), int(starts[-1] - starts[0])))
            continue
        for place, node in enumerate(index.trees[source].cut(_cut_size(index, config, source))):
            first, stop = starts[node.first_leaf], starts[node.first_leaf + node.num_leaves]
            strata.append(Stratum(f"{source}/{place}", source, int(first), int(stop - first)))
    return strata


def _cut_size(index: ShardIndex, config: BatchingConfig, source: str) -> int:
    """k for a source: a source with fewer leaves than k (it was too small for more) keeps them all."""
    num_leaves = index.trees[source].num_leaves
    most = max(tree.num_leaves for tree in index.trees.values())
    if config.k is not None and config.k > most:
        raise StrataError(f"batching.k={config.k} is larger than the {most} leaves there are; raise cluster.num_leaves")
    return min(config.k or num_leaves, num_leaves)


def _pool(index: ShardIndex, config: BatchingConfig, strata: Sequence[Stratum]) -> Iterator[tuple[str, list[_Segment]]]:
    """Batches made of what the strata's own batches leave over: (label, segments)."""
    if config.strategy != "cluster" or config.leftover == "drop":
        return
    size = config.global_batch_size
    numbers: dict[str, list[int]] = {source: [] for source in index.sources}
    for number, stratum in enumerate(strata):
        assert stratum.source is not None
        numbers[stratum.source].append(number)
    for source, members in numbers.items():
        rests = [
            [_Segment(number, strata[number].num_rows // size * size, strata[number].num_rows)] for number in members
        ]
        if config.leftover == "source":
            pool = [segment for rest in rests for segment in rest]
            yield from _fill(pool, size, f"{source}/leftover")[0]
            continue
        tree = index.trees[source]
        pools = {node.id: rest for node, rest in zip(tree.cut(len(members)), rests, strict=True)}
        for left, right, joined in tree.merges_above(len(members)):
            full, rest = _fill(pools.pop(left) + pools.pop(right), size, f"{source}/merged")
            pools[joined] = rest
            yield from full


def _fill(pool: list[_Segment], size: int, label: str) -> tuple[list[tuple[str, list[_Segment]]], list[_Segment]]:
    """As many batches as the pool fills, and the segments that remain."""
    batches = []
    taken: list[_Segment] = []
    missing = size
    for segment in pool:
        start = segment.start
        while segment.stop - start >= missing:
            taken.append(_Segment(segment.stratum, start, start + missing))
            start += missing
            batches.append((label, [piece for piece in taken if piece.stop > piece.start]))
            taken, missing = [], size
        if start < segment.stop:
            taken.append(_Segment(segment.stratum, start, segment.stop))
            missing -= segment.stop - start
    return batches, taken
