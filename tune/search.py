"""The search: trials on Ray Tune, and the table of what they reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray.tune

from clusterlib.errors import StrataError


@dataclass(frozen=True)
class Trial:
    """One point of the space; it travels to a process of its own.

    Attributes:
        name: its overrides, for people.
        run: trains and scores it, or finds that done; the metric's value.
    """

    name: str
    run: Callable[[], float]


@dataclass(frozen=True)
class Outcome:
    """What a trial reached; `value` is None and `error` says why where it failed."""

    name: str
    value: float | None
    seconds: float
    error: str | None


def search(
    trials: Sequence[Trial], metric: str, max_concurrent: int, storage_path: str, storage_fs: Any
) -> list[Outcome]:
    """Run the trials and rank them, best first; failed ones last.

    Raises:
        StrataError: every trial failed.
    """

    def run(config: dict[str, Any]) -> None:
        ray.tune.report({metric: trials[config["trial"]].run()})

    # The trial only waits for its ranks, which take the CPUs or GPUs.
    trainable = ray.tune.with_resources(run, {"CPU": 0.1})
    tuner = ray.tune.Tuner(
        trainable,
        param_space={"trial": ray.tune.grid_search(list(range(len(trials))))},
        tune_config=ray.tune.TuneConfig(
            metric=metric, mode="max", max_concurrent_trials=max_concurrent
        ),
        run_config=ray.tune.RunConfig(
            name="trials", storage_path=storage_path, storage_filesystem=storage_fs, verbose=0
        ),
    )
    outcomes = []
    for result in tuner.fit():
        metrics = result.metrics or {}
        outcomes.append(
            Outcome(
                trials[result.config["trial"]].name,
                metrics.get(metric),
                metrics.get("time_total_s", 0.0),
                str(result.error).strip().splitlines()[-1] if result.error else None,
            )
        )
    if all(outcome.error for outcome in outcomes):
        raise StrataError(f"every trial failed; the first: {outcomes[0].name}: {outcomes[0].error}")
    return sorted(
        outcomes,
        key=lambda outcome: -(outcome.value if outcome.value is not None else float("-inf")),
    )
