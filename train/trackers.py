"""Experiment trackers: what steps and tests measure, sent on while the run goes on.

Through each tracker's own client, as Ray Train's guide to experiment tracking has it; the helpers
in `ray.air.integrations` know neither ranks nor runs of Ray Train 2 (seen with ray 2.60).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from clusterlib.errors import StrataError

_PROJECT = "strata"  # where WANDB_PROJECT and MLFLOW_EXPERIMENT_NAME name no other


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told about a run.

    Attributes:
        name: for people.
        fingerprint: the same whenever the run is continued.
        settings: that made it, as plain data.
        step: steps done before.
        tensorboard_dir: where folders of runs are.
    """

    name: str
    fingerprint: str
    settings: Mapping[str, Any]
    step: int
    tensorboard_dir: Path


class Tracker(Protocol):
    """A run as a tracker shows it; one that was cut short goes on."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Values by name after `step` steps."""
        ...

    def close(self) -> None:
        """The run is finished."""
        ...


class _TensorBoard:
    """Event files in a folder of the run; steps that are done a second time replace the first."""

    def __init__(self, run: TrackedRun) -> None:
        from tensorboardX import SummaryWriter

        folder = run.tensorboard_dir / f"{run.name.replace('/', '-')}-{run.fingerprint}"
        # A killed rank takes with it what is not on disk yet, and steps that a checkpoint holds are
        # not done again.
        self._writer = SummaryWriter(str(folder), purge_step=run.step + 1, flush_secs=1)
        print(f"train: TensorBoard files in {folder}", flush=True)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A run of that id; steps that are done a second time are ignored by the server."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=run.fingerprint,
            name=run.name,
            config=dict(run.settings),
            resume="allow",
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """A run of that tag; of steps that are done a second time, MLflow keeps both values, which are
    equal.
    """

    def __init__(self, run: TrackedRun) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT))
        tags = {"strata_model": run.fingerprint}
        found = mlflow.search_runs(
            filter_string=f"tags.strata_model = '{run.fingerprint}'",
            max_results=1,
            output_format="list",
        )
        mlflow.start_run(
            run_id=found[0].info.run_id if found else None, run_name=run.name, tags=tags
        )
        mlflow.log_params(dict(_flat(run.settings)))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


# Name -> the Python package that it needs, and what starts it.
TRACKERS: dict[str, tuple[str, Callable[[TrackedRun], Tracker]]] = {
    "tensorboard": ("tensorboardX", _TensorBoard),
    "wandb": ("wandb", _WandB),
    "mlflow": ("mlflow", _MLflow),
}

if TYPE_CHECKING:
    TrackerName = str
else:
    TrackerName = Literal[tuple(TRACKERS)]


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Refuse trackers that could not start.

    Raises:
        StrataError: a tracker's package is not installed.
    """
    for name in names:
        package = TRACKERS[name][0]
        if importlib.util.find_spec(package) is None:
            raise StrataError(
                f"train.trackers: {name} needs the package {package}, which is not installed; "
                f"`pip install {package}` on every node, or leave {name} out"
            )


def start_trackers(names: Sequence[TrackerName], run: TrackedRun) -> list[Tracker]:
    """Open the run in every tracker that is asked for."""
    return [TRACKERS[name][1](run) for name in names]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of nested settings."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
