"""How far a run is, and the lines that say so."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from clusterlib.artifacts.tables import MEAN
from clusterlib.batches.plan import Plan

_LINE_SECONDS = 10


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        records: of schema train.measures.STEPS, one for each finished step.
        tests: of schema TESTS; on rank 0.
        best: the weights of `best_step`, on the CPU; on rank 0 where the best are kept.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    tests: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return len(self.records)

    @property
    def num_skipped(self) -> int:
        """Steps that changed no weight."""
        return sum(record["skipped"] for record in self.records)

    @property
    def num_skipped_last(self) -> int:
        """Steps at the end, in a row, that changed no weight."""
        skipped = (record["skipped"] for record in reversed(self.records))
        return sum(1 for _ in itertools.takewhile(bool, skipped))

    def means(self) -> dict[int, float]:
        """Mean NDCG@10 over the tasks, by the step of the test."""
        rows = [row for row in self.tests if row["task"] == MEAN and row["metric"] == "ndcg_at_10"]
        return {row["step"]: row["value"] for row in rows}

    @property
    def best_step(self) -> int:
        """The step of the test that went best; of equals, the first."""
        means = self.means()
        return max(means, key=lambda step: means[step])


class ProgressLines:
    """Prints where a run stands: at its start, every few seconds, at tests and at skipped steps."""

    def __init__(self, name: str, plan: Plan, num_steps: int, progress: Progress) -> None:
        self._num_steps = num_steps
        self._batch_size = plan.config.global_batch_size
        self._first_step = progress.step
        self._started = self._next_line = time.monotonic()
        phases = "; then ".join(
            f"{phase.settings.title}: {phase.num_batches} batches an epoch, "
            f"{len(phase.strata)} strata"
            for phase in plan.phases
        )
        resumed = f", continued at step {progress.step}" if progress.step else ""
        self._print(f"{name}: {phases}, {num_steps} steps of {self._batch_size} pairs{resumed}")

    def on_step(self, progress: Progress) -> None:
        last, at = progress.records[-1], f"step {progress.step}/{self._num_steps}"
        if last["skipped"]:
            self._print(
                f"{at} skipped: its gradient is not finite (loss {last['loss']:.3f}, stratum "
                f"{last['stratum']}); {progress.num_skipped} skipped so far"
            )
        now = time.monotonic()
        if now < self._next_line and progress.step < self._num_steps:
            return
        self._next_line = now + _LINE_SECONDS
        rate = (progress.step - self._first_step) / (now - self._started)
        left = (self._num_steps - progress.step) / rate
        self._print(
            f"{at} loss {last['loss']:.3f} accuracy {last['accuracy']:.3f} hardness "
            f"{last['hardness']:.3f} {rate * self._batch_size:.0f} pairs/s {left:.0f} s left"
        )

    def on_test(self, progress: Progress) -> None:
        means, best = progress.means(), progress.best_step
        self._print(
            f"step {progress.step}/{self._num_steps} tests: mean NDCG@10 "
            f"{means[progress.step]:.4f}, best {means[best]:.4f} at step {best}"
        )

    def _print(self, line: str) -> None:
        print(f"train {line}", flush=True)
