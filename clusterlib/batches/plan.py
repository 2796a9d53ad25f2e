"""Which rows fill each minibatch: a pure function of the shard index, the settings and the seed.

No files, no communication, no dependence on the number of ranks. A plan's memory grows with the
number of strata, not rows, and batch i is had without batches 0..i-1, so a resumed run starts where
it stopped.

A run is a list of phases. A phase shuffles the rows of every stratum and cuts them into *blocks*; a
block is a batch or a part of one, as the strategy says (clusterlib.batches.strategies). A source
goes through its blocks in *laps*: each lap shuffles rows and blocks anew and visits a row at most
once. An epoch takes the next batches of every source's laps, in random order: a whole lap of each,
unless weights or a cap ask for more or fewer.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from clusterlib.artifacts.config import Config
from clusterlib.batches.blocks import Segment, Strata, Stratum, cut_blocks
from clusterlib.batches.neighbors import with_neighbors
from clusterlib.batches.permutation import PhaseKeys, permute
from clusterlib.batches.strategies import STRATEGIES, FillConfig, Strategy, StrategyName, by_cluster
from clusterlib.clusters.shards import ShardIndex
from clusterlib.errors import StrataError


class PhaseConfig(Config):
    """A part of the run that fills its batches in a way of its own."""

    fraction: float = Field(
        ..., gt=0, le=1, description="share of the run's steps; those of all phases add up to 1"
    )
    strategy: StrategyName | None = Field(
        None, description="what fills its batches; by default batching.strategy says it"
    )
    k: int | None = Field(
        None, ge=1, description="clusters per source; by default there are batching.k"
    )

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
        return self.strategy is not None and "k" in STRATEGIES[self.strategy].uses


class BatchingConfig(FillConfig):
    """What fills a batch, and how a run is made of batches."""

    phases: list[PhaseConfig] = Field(
        [],
        description="a curriculum: parts of the run, in order, each with a strategy and k; by "
        "default one",
    )
    source_weights: dict[str, Annotated[float, Field(gt=0, le=1_000_000)]] = Field(
        {},
        description="source -> how often an epoch visits its batches: 2 repeats each of its rows, "
        "0.5 visits half of them and leaves the others to the next epoch; by default 1",
    )
    max_source_fraction: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of an epoch's batches that no source may exceed, its weight applied; "
        "what a source has more is left to the next epochs",
    )
    seed: int = Field(
        0, ge=0, description="another seed shuffles batches and rows anew; train.seed is the rest's"
    )

    @field_validator("phases")
    @classmethod
    def _whole_run(cls, phases: list[PhaseConfig]) -> list[PhaseConfig]:
        total = sum(phase.fraction for phase in phases)
        if phases and abs(total - 1) > 1e-6:
            raise ValueError(
                f"the fractions of the {len(phases)} phases add up to {total:.6g}; make it 1"
            )
        return phases

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name, strategy in self.strategies().items():
            strategy.shape(self)
            if strategy.mixes_sources and (self.source_weights or self.max_source_fraction):
                raise ValueError(
                    "source_weights and max_source_fraction choose between batches of different "
                    f"sources, and a {name} batch mixes all sources; use another strategy, or set "
                    "neither"
                )
        return self

    def content(self) -> dict[str, Any]:
        """What the batches depend on: settings that no phase uses, or that say what is so by
        default, are left out.
        """
        content = super().content()
        del content["strategy"], content["k"]
        content["phases"] = [phase.content() for phase in self.schedule()]
        used = {name for strategy in self.strategies().values() for name in strategy.uses}
        for name in {name for strategy in STRATEGIES.values() for name in strategy.uses} - used:
            content.pop(name, None)
        content["source_weights"] = {
            source: weight for source, weight in self.source_weights.items() if weight != 1
        }
        if self.max_source_fraction == 1:
            content["max_source_fraction"] = None
        return content

    def strategies(self) -> dict[str, Strategy]:
        """Those of all phases, by name."""
        names = [str(phase.strategy) for phase in self.schedule()]
        return {name: STRATEGIES[name] for name in names}

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
        rows: int64 [B], numbers in leaf order, all different; those of blocks first.
        strata: numbers of the strata of its phase that its blocks are from, each once.
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
    """When the neighbors that a step needs are mined, and how.

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

    >>> import pyarrow as pa
    >>> from clusterlib.artifacts.tables import INDEX
    >>> from clusterlib.clusters.tree import Tree
    >>> leaves = {"source": ["faq"] * 4, "leaf": range(4), "file": [0] * 4, "row_group": [0] * 4,
    ...           "first_row": range(0, 40, 10), "num_rows": [10] * 4}
    >>> trees = {"faq": Tree(num_leaves=4, children=np.array([[2, 3], [0, 1], [5, 4]]))}
    >>> index = ShardIndex(pa.table(leaves, schema=INDEX), trees)
    >>> plan = Plan(index, BatchingConfig(strategy="cluster", k=2, global_batch_size=10))
    >>> [plan.step(step, num_steps=4).label for step in range(4)]
    ['faq/0', 'faq/1', 'faq/0', 'faq/1']

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
        neighbors.
        """
        phase, since = self._phase(step, num_steps)
        if not phase.strategy.mines:
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
        shape: of its batches.
        sources: in leaf order.
        strata: those of all sources, in leaf order.
        searched: where the strategy mines, the clusters that neighbors are mined in: all rows, in
            leaf order.
        lap_batches: of each source, batches that visit its rows once.
        epoch_batches: of each source, batches of an epoch.
        num_batches: of an epoch; the same for every epoch.
    """

    def __init__(self, index: ShardIndex, config: BatchingConfig, number: int) -> None:
        self.settings = config.schedule()[number]
        self.strategy = STRATEGIES[str(self.settings.strategy)]
        self._config = config
        self._number = number
        _check_k(index, config, number)
        k = self.settings.k
        self.shape = self.strategy.shape(config)
        self.searched = _joined(by_cluster(index, k)) if self.strategy.mines else []
        strata = self.strategy.strata(index, k)
        self.strata = _joined(strata)
        self.sources = cut_blocks(index, strata, config.leftover, self.shape.block_rows)
        self._keys = PhaseKeys(config.seed, number, len(self.sources))
        self.lap_batches = [
            source.num_blocks // self.shape.num_blocks
            if source.num_rows >= config.global_batch_size
            else 0
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
        wanted = [
            math.ceil(config.source_weights.get(source.name, 1) * lap)
            for source, lap in zip(self.sources, self.lap_batches, strict=True)
        ]
        self.epoch_batches = _cap(wanted, config.max_source_fraction)
        # Before an epoch's batches are shuffled, those of a source begin here.
        self._first = np.cumsum([0, *self.epoch_batches])
        self.num_batches = int(self._first[-1])

    def batch(self, epoch: int, index: int, neighbors: np.ndarray | None = None) -> Batch:
        """Batch `index` of `epoch`.

        Args:
            neighbors: int64 [rows, w], where the strategy mines, and needed there: see
                `clusterlib.batches.neighbors.with_neighbors`.
        """
        if not 0 <= index < self.num_batches:
            raise IndexError(f"batch {index} of an epoch of {self.num_batches}")
        place = int(permute(np.array([index]), self.num_batches, self._keys.batches(epoch))[0])
        number = int(np.searchsorted(self._first, place, side="right")) - 1
        source = self.sources[number]
        # A source's batches are counted on through all epochs, so its laps need not end with them.
        count = epoch * self.epoch_batches[number] + place - int(self._first[number])
        lap, place = divmod(count, self.lap_batches[number])
        segments = self._segments(number, lap, place)
        rows = np.concatenate([self._rows(segment, lap) for segment in segments])
        if self.strategy.mines:
            if neighbors is None:
                raise ValueError("a batch of mined neighbors without a table of neighbors")
            key = self._keys.neighbors(epoch, index)
            rows = with_neighbors(rows, neighbors, self._config.neighbors.per_seed, key)
        rows = self._filled_up(rows, number, count)
        strata = tuple(dict.fromkeys(segment.stratum for segment in segments))
        label = self.strata[strata[0]].name if len(strata) == 1 else f"{source.name}/mixed"
        return Batch(rows, strata, label, self._number, epoch)

    def _segments(self, number: int, lap: int, place: int) -> list[Segment]:
        """What the blocks of batch `place` of a source's lap are made of."""
        source, num_blocks = self.sources[number], self.shape.num_blocks
        places = np.arange(place * num_blocks, (place + 1) * num_blocks)
        blocks = permute(places, source.num_blocks, self._keys.blocks(number, lap))
        return [segment for block in blocks.tolist() for segment in source.block(block)]

    def _rows(self, segment: Segment, lap: int) -> np.ndarray:
        stratum = self.strata[segment.stratum]
        places = np.arange(segment.start, segment.stop)
        key = self._keys.rows(segment.stratum, lap)
        return stratum.first_row + permute(places, stratum.num_rows, key)

    def _filled_up(self, rows: np.ndarray, number: int, count: int) -> np.ndarray:
        """The rows and, where a batch has more, others of the source drawn at random."""
        size, source = self._config.global_batch_size, self.sources[number]
        if len(rows) == size:
            return rows
        drawn = permute(np.arange(size), source.num_rows, self._keys.filling(number, count))
        others = source.strata[0].first_row + drawn
        return np.concatenate([rows, others[~np.isin(others, rows)][: size - len(rows)]])


def _joined(strata_by_source: Strata) -> list[Stratum]:
    return [stratum for strata in strata_by_source.values() for stratum in strata]


def _check_k(index: ShardIndex, config: BatchingConfig, number: int) -> None:
    settings = config.schedule()[number]
    most = max(tree.num_leaves for tree in index.trees.values())
    if settings.has_clusters and settings.k is not None and settings.k > most:
        name = f"batching.phases.{number}.k" if config.phases else "batching.k"
        raise StrataError(
            f"{name}={settings.k} is larger than the {most} leaves there are; raise "
            "cluster.num_leaves"
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
