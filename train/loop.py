"""The step loop: plan, read, encode, contrast, update, record. It runs with or without Ray."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from clusterlib.artifacts.config import Config, runtime
from clusterlib.artifacts.tables import MEAN
from clusterlib.batches.plan import Mining, Plan
from clusterlib.errors import StrataError
from train.data import TokenStore
from train.engine import Engine, OptimizerConfig
from train.gradcache import accumulate_gradient
from train.loss import LossConfig, as_record
from train.model import StudentConfig
from train.trackers import TrackerName


class TrainConfig(Config):
    """The student, what it learns by and for how long, and where it trains."""

    student: StudentConfig
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig
    steps: int | None = Field(None, ge=1, description="optimizer steps; set this or epochs")
    epochs: float | None = Field(
        None,
        gt=0,
        le=1_000_000,
        description="epochs of the plan; with phases, their number of epochs added up",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="of the encoder's arithmetic; weights, similarities and the loss are float32",
    )
    seed: int = Field(
        0, ge=0, description="of initial weights and dropout; batching.seed is the plan's"
    )
    test_every_steps: int | None = Field(
        None,
        ge=1,
        description="score the student on the tests and tasks of `evaluate` this often, and after "
        "the last step; "
        "rank 0 does it while the others wait. By default never",
    )
    keep: Literal["last", "best"] = Field(
        "last",
        description="which weights become the model: those after the last step, or those with the "
        "best mean NDCG@10 "
        "of the tests in the loop",
    )

    num_workers: int = runtime(
        1, ge=1, description="ranks; each takes one GPU, or one CPU without GPUs"
    )
    use_gpu: bool = runtime(False, description="ranks need a GPU each; NCCL instead of gloo")
    zero_stage: Literal[0, 1, 2] = runtime(0, description="ZeRO stage (arXiv 1910.02054)")
    micro_batch_size: int = runtime(
        64, ge=1, description="rows a rank encodes at once; bounds memory"
    )
    gradient_checkpointing: bool = runtime(
        False,
        description="keep only layers' inputs for the backward pass (arXiv 1604.06174): longer, in "
        "less memory",
    )
    compile: bool = runtime(
        False,
        description="compile the encoder with torch.compile: a minute or more at the start. On a "
        "CPU core a step took "
        "16% longer with it (tests/benchmarks/RESULTS.md); not measured on a GPU",
    )
    checkpoint_every_steps: int = runtime(500, ge=1)
    checkpoints_to_keep: int = runtime(
        2, ge=2, description="the latest; a damaged one gives way to the one before"
    )
    max_failures: int = runtime(
        3,
        ge=0,
        description="how often ranks are started again after a worker, a node or the storage was "
        "lost; an error that "
        "would come again ends the run at once",
    )
    max_skipped_steps: int = runtime(
        10,
        ge=1,
        description="steps in a row after which the run gives up, where each has a gradient that "
        "is not finite; such a "
        "step changes no weight, is recorded as skipped and counts as a step of the plan",
    )
    cache_dir: str = runtime(
        "~/.cache/strata/tokens", description="folder for tokens on each node's own disk"
    )
    trackers: list[TrackerName] = runtime(
        [], description="where rank 0 sends what each step and test measures"
    )
    tensorboard_dir: str = runtime(
        "~/.cache/strata/tensorboard",
        description="folder on rank 0's node for event files, in one of each run",
    )

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _gathers_nothing(cls, stage: Any) -> Any:
        if stage in (3, "3"):
            raise ValueError(
                "3 would gather all weights for each micro-batch's two passes, to spare memory "
                "that an encoder's weights do not need; set 2 or less"
            )
        return stage

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set exactly one of steps and epochs")
        if self.keep == "best" and self.test_every_steps is None:
            raise ValueError(
                "keep=best needs tests in the loop to tell the best by; set test_every_steps"
            )
        return self

    def num_steps(self, plan: Plan) -> int:
        return self.steps or plan.num_steps(self.epochs or 0)


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        records: of schema STEPS, one for each finished step.
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
        """Of them, those in a row at the end."""
        return sum(
            1 for _ in itertools.takewhile(lambda record: record["skipped"], reversed(self.records))
        )

    def means(self) -> dict[int, float]:
        """Mean NDCG@10 over the tasks, by the step of the test."""
        rows = [row for row in self.tests if row["task"] == MEAN and row["metric"] == "ndcg_at_10"]
        return {row["step"]: row["value"] for row in rows}

    @property
    def best_step(self) -> int:
        """The step of the test that went best; of equals, the first."""
        means = self.means()
        return max(means, key=lambda step: means[step])


def fit(
    engine: Engine,
    plan: Plan,
    store: TokenStore,
    config: TrainConfig,
    progress: Progress,
    mine: Callable[[Mining, int], np.ndarray],
    on_step: Callable[[Progress], None],
    on_checkpoint: Callable[[Progress], None],
    on_test: Callable[[Progress], None] = lambda _: None,
    checkpoints: str = "",
) -> None:
    """Train from `progress` to the last step; every rank calls it.

    Args:
        mine: gives the table of neighbours for a step; see train.mine.Miner.
        on_step: called on every rank after each step.
        on_checkpoint: called on every rank when a checkpoint is due, and after the last step; a
            skipped step has none, for the weights may be what is wrong.
        on_test: called on every rank when a test is due, before the checkpoint that is to hold its
            scores.
        checkpoints: where they are, for people.

    Raises:
        StrataError: on every rank, when `config.max_skipped_steps` in a row had a gradient that is
            not finite.
    """
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    num_steps = config.num_steps(plan)
    mining: Mining | None = None
    neighbors: np.ndarray | None = None
    saved, good = (
        progress.step,
        0,
    )  # steps of checkpoints: the latest, and that whose weights are known to work
    for step in range(progress.step, num_steps):
        started = time.perf_counter()
        engine.clock.start()
        needed = plan.mining(step, num_steps)
        if needed != mining:
            mining, neighbors = needed, mine(needed, step) if needed else None
        engine.clock.mark("mining")
        planned = plan.step(step, num_steps, neighbors)
        batch = store.read(planned.rows, rank, num_ranks, config.micro_batch_size).to(engine.device)
        engine.clock.mark("data")

        # Dropout depends on the step alone, so a resumed run needs no generator state.
        torch.manual_seed(
            int(np.random.SeedSequence([config.seed, step, rank]).generate_state(1)[0])
        )
        measures = accumulate_gradient(engine, batch, config.loss)
        learning_rate = config.optimizer.rate(step, num_steps)
        gradient_norm = engine.step(learning_rate)

        progress.records.append(
            {
                "step": step,
                "phase": planned.phase,
                "epoch": planned.epoch,
                "stratum": planned.label,
                **as_record(measures),
                "learning_rate": learning_rate,
                "gradient_norm": gradient_norm,
                "skipped": not math.isfinite(gradient_norm),
                "num_tokens": batch.num_tokens,
                **{f"{part}_seconds": seconds for part, seconds in engine.clock.seconds().items()},
                "step_seconds": time.perf_counter() - started,
            }
        )
        on_step(progress)
        skipped = progress.num_skipped_last
        good = good if skipped else saved
        if skipped >= config.max_skipped_steps:
            last_good = f"step {good} in {checkpoints}" if good else "none"
            raise StrataError(
                f"train step {progress.step}, stratum {planned.label}: the gradient is not finite, "
                f"{skipped} times in a row (train.max_skipped_steps); last good checkpoint: "
                f"{last_good}. The same settings would end here "
                "again: lower train.optimizer.learning_rate, or look for what is odd in these pairs"
            )
        is_last = progress.step == num_steps
        if config.test_every_steps and (progress.step % config.test_every_steps == 0 or is_last):
            on_test(progress)
        if is_last or (progress.step % config.checkpoint_every_steps == 0 and not skipped):
            on_checkpoint(progress)
            saved = progress.step
