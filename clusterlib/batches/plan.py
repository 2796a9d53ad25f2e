"""Which rows fill each minibatch: a pure function of the shard index, the settings and the seed.

No files, no communication, no dependence on the number of ranks. A plan's memory grows with the
number of strata, not rows, and batch i is had without batches 0..i-1, so a resumed run starts where
it stopped.

A run is a list of phases. A phase shuffles the rows of every stratum and cuts them into *blocks*; a
block is a batch, one of the equal parts of a batch with strategy `topic`, or with strategy
`neighbors` the seeds of a batch, which bring their neighbours. A source goes through its blocks in
*laps*: each lap shuffles rows and blocks anew and visits a row at most once. An epoch takes the
next batches of every source's laps, in random order: a whole lap of each, unless weights or a cap
ask for more or fewer.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from clusterlib.artifacts.config import Config
from clusterlib.batches.blocks import (
    Leftover,
    Segment,
    Stratum,
    by_cluster,
    by_source,
    cut_blocks,
    everything,
)
from clusterlib.batches.neighbors import NeighborsConfig, gather
from clusterlib.batches.permutation import permute
from clusterlib.clusters.shards import ShardIndex
from clusterlib.errors import StrataError

_MOST = 1_000_000  # times that a setting may have rows visited
_FILLING = 2**32  # keys of permutations from here on are no source's or stratum's own

Strategy = Literal["random", "source", "cluster", "topic", "neighbors"]


class PhaseConfig(Config):
    """A part of the run that fills its batches in a way of its own."""

    fraction: float = Field(
        ..., gt=0, le=1, description="share of the run's steps; those of all phases add up to 1"
    )
    strategy: Strategy | None = Field(None, description="by default batching.strategy")
    k: int | None = Field(None, ge=1, description="by default batching.k")

    def content(self) -> dict[str, Any]:
        content = super().content()
        if not self.has_clusters:
            del content["k"]
        return content

    @property
    def title(self) -> str:
        """Such as `cluster k=10`."""
        return f"{self.strategy} k={self.k}" if self.has_clusters and self.k else str(self.strategy)

    @property
    def has_clusters(self) -> bool:
        """Whether batches are made of clusters or mined in them, so that k matters."""
        return self.strategy in ("cluster", "topic", "neighbors")


class BatchingConfig(Config):
    """What fills a minibatch."""

    strategy: Strategy = Field(
        "cluster",
        description="random: all sources mixed; source: one source a batch; cluster: one cluster "
        "of one "
        "source a batch (arXiv 2407.18887); topic: equal parts of several clusters of one source, "
        "drawn at random (TAS-B, arXiv 2104.06967); neighbors: pairs of one source, drawn at "
        "random, each with mined neighbours of its cluster (see clusterlib.batches.neighbors)",
    )
    k: int | None = Field(
        None,
        ge=1,
        description="clusters per source, up to cluster.num_leaves; by default every leaf is one",
    )
    global_batch_size: int = Field(..., ge=2, description="pairs a step, over all ranks")
    clusters_per_batch: int = Field(
        4, ge=2, description="parts of a batch of strategy topic, each of one cluster"
    )
    neighbors: NeighborsConfig = NeighborsConfig()
    leftover: Leftover = Field(
        "merge",
        description="rows of a cluster that fill no batch (with topic: no part of one): drop them, "
        "merge them "
        "with those of the nearest cluster along the tree, or pool them per source; what then "
        "fills no batch is dropped. Which rows these are changes every lap of the source",
    )
    phases: list[PhaseConfig] = Field(
        [],
        description="a curriculum: parts of the run, in order, each with a strategy and k; by "
        "default one",
    )
    source_weights: dict[str, float] = Field(
        {},
        description="source -> how often an epoch visits its batches: 2 repeats each of its rows, "
        "0.5 visits "
        "half of them and leaves the others to the next epoch; by default 1",
    )
    max_source_fraction: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of an epoch's batches that no source may exceed, its weight applied; "
        "what a source "
        "has more is left to the next epochs",
    )
    seed: int = Field(0, ge=0)

    @field_validator("phases")
    @classmethod
    def _whole_run(cls, phases: list[PhaseConfig]) -> list[PhaseConfig]:
        total = sum(phase.fraction for phase in phases)
        if phases and abs(total - 1) > 1e-6:
            raise ValueError(
                f"the fractions of the {len(phases)} phases add up to {total:.6g}; make it 1"
            )
        return phases

    @field_validator("source_weights")
    @classmethod
    def _positive(cls, weights: dict[str, float]) -> dict[str, float]:
        for source, weight in weights.items():
            if not 0 < weight <= _MOST:
                raise ValueError(
                    f"{source} has weight {weight}; give a positive number up to {_MOST:,}"
                )
        return weights

    @model_validator(mode="after")
    def _fits(self) -> Self:
        strategies = {phase.strategy for phase in self.schedule()}
        if "topic" in strategies and self.global_batch_size % self.clusters_per_batch:
            raise ValueError(
                f"clusters_per_batch={self.clusters_per_batch} does not divide "
                f"global_batch_size={self.global_batch_size}; a topic batch has equal parts"
            )
        group = 1 + self.neighbors.per_seed
        if "neighbors" in strategies and self.global_batch_size % group:
            raise ValueError(
                f"neighbors.per_seed={self.neighbors.per_seed} makes groups of {group} pairs, "
                f"which do not divide global_batch_size={self.global_batch_size}"
            )
        if "random" in strategies and (self.source_weights or self.max_source_fraction):
            raise ValueError(
                "source_weights and max_source_fraction choose between batches of different "
                "sources, and a random batch mixes all sources; use another strategy, or set "
                "neither"
            )
        return self

    def content(self) -> dict[str, Any]:
        """What the batches depend on: settings that no phase uses, or that say what is so by
        default, are left out.
        """
        content, schedule = super().content(), self.schedule()
        strategies = {phase.strategy for phase in schedule}
        del content["strategy"], content["k"]
        content["phases"] = [phase.content() for phase in schedule]
        content["source_weights"] = {
            source: weight for source, weight in self.source_weights.items() if weight != 1
        }
        if self.max_source_fraction == 1:
            content["max_source_fraction"] = None
        for name, users in (
            ("clusters_per_batch", {"topic"}),
            ("neighbors", {"neighbors"}),
            ("leftover", {"cluster", "topic"}),
        ):
            if not strategies & users:
                del content[name]
        return content

    def schedule(self) -> list[PhaseConfig]:
        """The phases, nothing left to default; one, of all steps, when none are set."""
        return [
            PhaseConfig(
                fraction=phase.fraction,
                strategy=phase.strategy or self.strategy,
                k=phase.k or self.k,
            )
            for phase in self.phases or [PhaseConfig(fraction=1)]
        ]


@dataclass(frozen=True)
class Batch:
    """One global minibatch.

    Attributes:
        rows: int64 [B], numbers in leaf order, all different; with strategy neighbors, seeds first.
        strata: numbers of the strata of its phase that the rows are from, each once.
        label: name of the stratum; `SOURCE/mixed` when there are several.
        phase: number of its phase.
        epoch: of that phase, from 0.
    """

    rows: np.ndarray
    strata: tuple[int, ...]
    label: str
    phase: int
    epoch: int


@dataclass(frozen=True)
class Mining:
    """When the neighbours that a step needs are mined, and how.

    Attributes:
        step: the step before which they are mined.
        phase: number of the phase they are for.
        by_student: by the student's vectors of that step, not the teacher's.
    """

    step: int
    phase: int
    by_student: bool


class Plan:
    """The batches of a run.

    Raises:
        StrataError: `k` is larger than any tree, no stratum fills a batch, a weighted source is not
            there, or there are too few sources for the cap.
    """

    def __init__(self, index: ShardIndex, config: BatchingConfig) -> None:
        for source in sorted(set(config.source_weights) - set(index.sources)):
            known = ", ".join(index.sources)
            raise StrataError(
                f"batching.source_weights.{source}: no such source; there are {known}"
            )
        self.config = config
        self.num_rows = index.num_rows
        self.phases = [Phase(index, config, number) for number in range(len(config.schedule()))]

    def num_steps(self, epochs: float) -> int:
        """Steps of a run whose phases, each with its share of the steps, make `epochs` epochs
        together.
        """
        epochs_per_step = sum(phase.settings.fraction / phase.num_batches for phase in self.phases)
        return max(1, round(epochs / epochs_per_step))

    def first_steps(self, num_steps: int) -> list[int]:
        """The first step of each phase in a run of `num_steps`, and `num_steps`."""
        ends = itertools.accumulate(phase.settings.fraction for phase in self.phases[:-1])
        return [0, *(round(end * num_steps) for end in ends), num_steps]

    def step(self, step: int, num_steps: int, neighbors: np.ndarray | None = None) -> Batch:
        """The batch of optimizer step `step` of a run of `num_steps`.

        Args:
            neighbors: int64 [rows, w], what the step's `mining` found; see `Phase.batch`.
        """
        phase, since = self._phase(step, num_steps)
        return phase.batch(*divmod(since, phase.num_batches), neighbors)

    def mining(self, step: int, num_steps: int) -> Mining | None:
        """What step `step` of a run of `num_steps` needs mined; None where its batch has no
        neighbours.
        """
        phase, since = self._phase(step, num_steps)
        if phase.settings.strategy != "neighbors":
            return None
        since_mined = since % (self.config.neighbors.refresh_every_steps or num_steps)
        return Mining(step - since_mined, self.phases.index(phase), since_mined < since)

    def _phase(self, step: int, num_steps: int) -> tuple[Phase, int]:
        """The phase of a step, and the number of its steps before that one."""
        if not 0 <= step < num_steps:
            raise IndexError(f"step {step} of a run of {num_steps}")
        first = self.first_steps(num_steps)
        number = bisect_right(first, step) - 1
        return self.phases[number], step - first[number]


class Phase:
    """The batches of every epoch of one strategy and k.

    Attributes:
        settings: its entry of `BatchingConfig.schedule`.
        sources: in leaf order.
        strata: those of all sources, in leaf order.
        searched: with strategy neighbors, the clusters that neighbours are mined in: all rows, in
            leaf order.
        visits_per_batch: rows of a batch that count as visited, all or with strategy neighbors the
            seeds.
        lap_batches: of each source, batches that visit its rows once.
        epoch_batches: of each source, batches of an epoch.
        num_batches: of an epoch; the same for every epoch.
    """

    def __init__(self, index: ShardIndex, config: BatchingConfig, number: int) -> None:
        self.settings = config.schedule()[number]
        self._number = number
        self._seed = config.seed
        self._blocks_per_batch = (
            config.clusters_per_batch if self.settings.strategy == "topic" else 1
        )
        self._size = self.visits_per_batch = config.global_batch_size
        self._neighbors = config.neighbors
        _check_k(index, config, number)
        self.searched: list[Stratum] = []
        if self.settings.strategy == "neighbors":
            self.searched = [
                stratum
                for strata in by_cluster(index, self.settings.k).values()
                for stratum in strata
            ]
            self.visits_per_batch //= 1 + config.neighbors.per_seed
        block_size = self.visits_per_batch // self._blocks_per_batch
        self.sources = cut_blocks(index, _strata(index, self.settings), config.leftover, block_size)
        self.strata = [stratum for source in self.sources for stratum in source.strata]
        self.lap_batches = [
            source.num_blocks // self._blocks_per_batch if source.num_rows >= self._size else 0
            for source in self.sources
        ]
        if not any(self.lap_batches):
            largest = max(self.strata, key=lambda stratum: stratum.num_rows)
            raise StrataError(
                f"batching.global_batch_size={config.global_batch_size}: no stratum fills a batch "
                f"with {self.settings.title}; the largest of {len(self.strata)} is {largest.name} "
                f"with {largest.num_rows} rows; set a smaller batch, a smaller batching.k, or "
                f"batching.leftover=merge (it is {config.leftover})"
            )
        weights = [config.source_weights.get(source.name, 1) for source in self.sources]
        wanted = [
            math.ceil(weight * lap) for weight, lap in zip(weights, self.lap_batches, strict=True)
        ]
        self.epoch_batches = _cap(wanted, config.max_source_fraction)
        self._first = np.cumsum(
            [0, *self.epoch_batches]
        )  # of each source among an epoch's batches, unshuffled
        self.num_batches = int(self._first[-1])

    def batch(self, epoch: int, index: int, neighbors: np.ndarray | None = None) -> Batch:
        """Batch `index` of `epoch`.

        Args:
            neighbors: int64 [rows, w], for strategy neighbors only, and needed there: see
                `clusterlib.batches.neighbors.gather`. Where the seeds have too few, rows of their
                source drawn at random fill the batch.
        """
        if not 0 <= index < self.num_batches:
            raise IndexError(f"batch {index} of an epoch of {self.num_batches}")
        place = int(self._permute(index, index + 1, self.num_batches, epoch, 0)[0])
        number = int(np.searchsorted(self._first, place, side="right")) - 1
        source, parts = self.sources[number], self._blocks_per_batch
        # A source's batches are counted on through all epochs, so its laps need not end with them.
        count = epoch * self.epoch_batches[number] + place - int(self._first[number])
        lap, place = divmod(count, self.lap_batches[number])
        blocks = self._permute(
            place * parts, (place + 1) * parts, source.num_blocks, lap, 1 + number
        )
        segments = [segment for block in blocks for segment in source.block(int(block))]
        rows = np.concatenate([self._rows(segment, lap) for segment in segments])
        if self.settings.strategy == "neighbors":
            if neighbors is None:
                raise ValueError("a batch of strategy neighbors without a table of neighbours")
            (stratum,) = source.strata
            rows = gather(
                rows, neighbors, self._neighbors.per_seed, (self._seed, self._number, epoch, index)
            )
            others = (
                self._permute(0, self._size, stratum.num_rows, count, _FILLING + number)
                + stratum.first_row
            )
            rows = np.concatenate([rows, others[~np.isin(others, rows)][: self._size - len(rows)]])
        strata = tuple(dict.fromkeys(segment.stratum for segment in segments))
        label = self.strata[strata[0]].name if len(strata) == 1 else f"{source.name}/mixed"
        return Batch(rows, strata, label, self._number, epoch)

    def _rows(self, segment: Segment, lap: int) -> np.ndarray:
        stratum = self.strata[segment.stratum]
        key = 1 + len(self.sources) + segment.stratum
        return stratum.first_row + self._permute(
            segment.start, segment.stop, stratum.num_rows, lap, key
        )

    def _permute(self, start: int, stop: int, size: int, turn: int, key: int) -> np.ndarray:
        return permute(np.arange(start, stop), size, (self._seed, self._number, turn, key))


def _check_k(index: ShardIndex, config: BatchingConfig, number: int) -> None:
    settings = config.schedule()[number]
    most = max(tree.num_leaves for tree in index.trees.values())
    if settings.has_clusters and settings.k is not None and settings.k > most:
        name = f"batching.phases.{number}.k" if config.phases else "batching.k"
        raise StrataError(
            f"{name}={settings.k} is larger than the {most} leaves there are; raise "
            "cluster.num_leaves"
        )


def _strata(index: ShardIndex, settings: PhaseConfig) -> dict[str, list[Stratum]]:
    if settings.strategy == "random":
        return everything(index)
    return (
        by_cluster(index, settings.k)
        if settings.strategy in ("cluster", "topic")
        else by_source(index)
    )


def _cap(counts: Sequence[int], fraction: float | None) -> list[int]:
    """Batches of each source, cut to the largest number that is no more than `fraction` of what all
    then have.
    """
    if fraction is None:
        return list(counts)

    def excess(most: int) -> float:
        return most - fraction * sum(min(count, most) for count in counts)

    # The excess is convex and 0 at 0: up to the number looked for it is not positive, above it is.
    most = bisect_right(range(1, max(counts) + 1), 1e-9, key=excess)
    if not most:
        filling = sum(count > 0 for count in counts)
        raise StrataError(
            f"batching.max_source_fraction={fraction}: {filling} sources fill batches, so one has "
            f"at least 1/{filling} of them; set a larger share"
        )
    return [min(count, most) for count in counts]
