"""plan: what a run will see, as text, before a step of it is paid for."""

from __future__ import annotations

from collections.abc import Sequence

from clusterlib.batches.visits import PhaseSummary, Visits

_HEADER = (
    f"{'phase':<16} {'steps':>9} {'epochs':>7}  {'source':<16} {'strata':>7} "
    f"{'batches/stratum':>23} {'batches':>9} {'share':>6} {'covered':>7} {'pure':>6} "
    f"{'dropped':>9} {'repeated':>9}"
)


def format_plan(arm: str, phases: Sequence[PhaseSummary], batch_size: int) -> str:
    """One line for each phase of an arm and, where batches are of one source, for each source."""
    steps = sum(phase.num_steps for phase in phases)
    lines = [f"{arm}: {steps:,} steps of {batch_size:,} pairs; an epoch of each phase:", _HEADER]
    for phase in phases:
        start = f"{phase.title:<16} {phase.num_steps:>9,} {phase.num_epochs:>7.2f}"
        lines.append(f"{start}  {_visits(phase.total, phase.total.num_batches)}")
        if len(phase.sources) > 1:
            lines += [
                f"{'':<{len(start)}}  {_visits(source, phase.total.num_batches)}"
                for source in phase.sources
            ]
    return "\n".join(lines)


def _visits(visits: Visits, num_batches: int) -> str:
    sizes = " ".join(f"{size:>7,.1f}" for size in visits.batches_per_stratum)
    return (
        f"{visits.source:<16} {visits.num_strata:>7,} {sizes} {visits.num_batches:>9,} "
        f"{visits.num_batches / num_batches:>6.1%} {visits.coverage_fraction:>7.1%} "
        f"{visits.pure_fraction:>6.1%} {visits.num_dropped_rows:>9,} {visits.num_repeated_rows:>9,}"
    )
