"""The step loop: plan, read, encode, contrast, update, record. It runs with or without Ray."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field, model_validator

from clusterlib.config import Config, runtime
from clusterlib.plan import Mining, Plan
from train.data import TokenStore
from train.engine import Engine, OptimizerConfig
from train.gradcache import accumulate_gradient
from train.loss import LossConfig, as_record
from train.model import StudentConfig


class TrainConfig(Config):
    """The student, what it learns by and for how long, and where it trains."""

    student: StudentConfig
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig
    steps: int | None = Field(None, ge=1, description="optimizer steps; set this or epochs")
    epochs: float | None = Field(
        None, gt=0, description="epochs of the plan; with phases, their number of epochs added up"
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the encoder's arithmetic; weights, similarities and the loss are float32"
    )
    seed: int = Field(0, ge=0, description="of initial weights and dropout; batching.seed is the plan's")

    num_workers: int = runtime(1, ge=1, description="ranks; each takes one GPU, or one CPU without GPUs")
    use_gpu: bool = runtime(False, description="ranks need a GPU each; NCCL instead of gloo")
    zero_stage: Literal[0, 1, 2] = runtime(
        0,
        description="ZeRO stage (arXiv 1910.02054). Not 3: it would gather all weights for each micro-batch's two "
        "passes, to spare memory that an encoder's weights do not need",
    )
    micro_batch_size: int = runtime(64, ge=1, description="rows a rank encodes at once; bounds memory")
    gradient_checkpointing: bool = runtime(
        False, description="keep only layers' inputs for the backward pass (arXiv 1604.06174): longer, in less memory"
    )
    checkpoint_every_steps: int = runtime(500, ge=1)
    max_failures: int = runtime(3, ge=0, description="lost workers or nodes after which the run gives up")
    cache_dir: str = runtime("~/.cache/strata/tokens", description="folder for tokens on each node's own disk")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set exactly one of steps and epochs")
        return self

    def num_steps(self, plan: Plan) -> int:
        return self.steps or plan.num_steps(self.epochs or 0)


@dataclass
class Progress:
    """How far a run is: one record of schema STEPS for each finished step."""

    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def step(self) -> int:
        return len(self.records)


def fit(
    engine: Engine,
    plan: Plan,
    store: TokenStore,
    config: TrainConfig,
    progress: Progress,
    mine: Callable[[Mining, int], np.ndarray],
    on_step: Callable[[Progress], None],
    on_checkpoint: Callable[[Progress], None],
) -> None:
    """Train from `progress` to the last step; every rank calls it.

    Args:
        mine: gives the table of neighbours for a step; see train.mine.Miner.
        on_step: called on every rank after each step.
        on_checkpoint: called on every rank when a checkpoint is due, and after the last step.
    """
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    num_steps = config.num_steps(plan)
    mining: Mining | None = None
    neighbors: np.ndarray | None = None
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
        torch.manual_seed(int(np.random.SeedSequence([config.seed, step, rank]).generate_state(1)[0]))
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
                "num_tokens": batch.num_tokens * num_ranks,
                **{f"{part}_seconds": seconds for part, seconds in engine.clock.seconds().items()},
                "step_seconds": time.perf_counter() - started,
            }
        )
        on_step(progress)
        if progress.step % config.checkpoint_every_steps == 0 or progress.step == num_steps:
            on_checkpoint(progress)
