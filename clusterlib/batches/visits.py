"""What a plan visits: sizes of strata, coverage, purity and repeats of each phase and source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clusterlib.batches.plan import Phase, Plan


@dataclass(frozen=True)
class Visits:
    """What the first epoch of a phase visits of a source, or of all of them, in blocks: rows that
    others bring are no visits.

    Attributes:
        num_strata: strata that batches are drawn from.
        batches_per_stratum: the smallest, median and largest stratum's rows over those that a batch
            visits.
        coverage_fraction: rows visited, of all its rows; when there are several laps, in one of
            them.
        pure_fraction: blocks (batches, or parts of them) that are of one stratum, of all.
        num_dropped_rows: rows that fill no batch; which ones changes every lap.
        num_repeated_rows: visits beyond the first lap, as the source's weight asks.
    """

    source: str
    num_rows: int
    num_strata: int
    batches_per_stratum: tuple[float, float, float]
    num_batches: int
    coverage_fraction: float
    pure_fraction: float
    num_dropped_rows: int
    num_repeated_rows: int


@dataclass(frozen=True)
class PhaseSummary:
    """One phase of a run: what it is called, its steps and epochs, and what an epoch visits."""

    title: str
    num_steps: int
    num_epochs: float
    total: Visits
    sources: list[Visits]


def summarize(plan: Plan, num_steps: int) -> list[PhaseSummary]:
    """What each phase of a run of `num_steps` visits."""
    steps = np.diff(plan.first_steps(num_steps)).tolist()
    return [
        PhaseSummary(
            phase.settings.title,
            num,
            num / phase.num_batches,
            _visits("all", phase, range(len(phase.sources))),
            [_visits(source.name, phase, [number]) for number, source in enumerate(phase.sources)],
        )
        for num, phase in zip(steps, plan.phases, strict=True)
    ]


def _visits(name: str, phase: Phase, numbers: Sequence[int]) -> Visits:
    size = phase.shape.num_blocks * phase.shape.block_rows
    sources = [phase.sources[number] for number in numbers]
    laps = np.array([phase.lap_batches[number] for number in numbers])
    batches = np.array([phase.epoch_batches[number] for number in numbers])
    num_rows = np.array([source.num_rows for source in sources])
    strata = [stratum.num_rows / size for source in sources for stratum in source.strata]
    pure = [source.num_pure_blocks / max(source.num_blocks, 1) for source in sources]
    return Visits(
        source=name,
        num_rows=int(num_rows.sum()),
        num_strata=len(strata),
        batches_per_stratum=(min(strata), float(np.median(strata)), max(strata)),
        num_batches=int(batches.sum()),
        coverage_fraction=float(np.minimum(batches, laps).sum() * size / max(num_rows.sum(), 1)),
        pure_fraction=float((batches * pure).sum() / max(batches.sum(), 1)),
        num_dropped_rows=int((num_rows - laps * size).sum()),
        num_repeated_rows=int(np.maximum(batches - laps, 0).sum() * size),
    )
