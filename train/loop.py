"""The step loop: plan, read, encode, contrast, update, record. It runs with or without Ray."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from clusterlib.batches.plan import Mining, Plan
from clusterlib.errors import StrataError
from train import ranks
from train.config import TrainConfig
from train.data import TokenStore
from train.engine import Engine
from train.gradcache import accumulate_gradient
from train.measures import Step, by_name, record
from train.progress import Progress


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
        mine: gives the table of neighbors for a step; see train.mine.Miner.
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
    num_steps = config.num_steps(plan)
    mining: Mining | None = None
    neighbors: np.ndarray | None = None
    # Steps of the latest checkpoint, and of the latest that a finite gradient followed.
    saved_step, good_step = progress.step, 0
    for step in range(progress.step, num_steps):
        started = time.perf_counter()
        engine.clock.start()
        needed = plan.mining(step, num_steps)
        if needed != mining:
            mining, neighbors = needed, mine(needed, step) if needed else None
        engine.clock.mark("mining")
        taken = _take(engine, plan, store, config, step, neighbors, started)
        progress.records.append(record(taken))
        on_step(progress)
        num_skipped = progress.num_skipped_last
        good_step = good_step if num_skipped else saved_step
        if num_skipped >= config.max_skipped_steps:
            raise _gives_up(progress, f"step {good_step} in {checkpoints}" if good_step else "none")
        is_last = progress.step == num_steps
        every = config.test_every_steps
        if every and (progress.step % every == 0 or is_last):
            on_test(progress)
        if is_last or (progress.step % config.checkpoint_every_steps == 0 and not num_skipped):
            on_checkpoint(progress)
            saved_step = progress.step


def _gives_up(progress: Progress, last_good: str) -> StrataError:
    return StrataError(
        f"train step {progress.step}, stratum {progress.records[-1]['stratum']}: the gradient is "
        f"not finite, {progress.num_skipped_last} times in a row (train.max_skipped_steps); last "
        f"good checkpoint: {last_good}. The same settings would end here again: lower "
        "train.optimizer.learning_rate, or look for what is odd in these pairs"
    )


def _take(
    engine: Engine,
    plan: Plan,
    store: TokenStore,
    config: TrainConfig,
    number: int,
    neighbors: np.ndarray | None,
    started: float,
) -> Step:
    """Take a step that began at `started`, of time.perf_counter."""
    (rank, num_ranks), num_steps = ranks.place(), config.num_steps(plan)
    planned = plan.step(number, num_steps, neighbors)
    batch = store.read(planned.rows, rank, num_ranks, config.micro_batch_size).to(engine.device)
    engine.clock.mark("data")
    # Dropout depends on the step alone, so a resumed run needs no generator state.
    seeds = np.random.SeedSequence([config.seed, number, rank])
    torch.manual_seed(int(seeds.generate_state(1)[0]))
    measures = accumulate_gradient(engine, batch, config.loss)
    learning_rate = config.optimizer.rate(number, num_steps)
    gradient_norm = engine.step(learning_rate)
    return Step(
        number=number,
        batch=planned,
        of_pairs=by_name(measures),
        learning_rate=learning_rate,
        gradient_norm=gradient_norm,
        num_tokens=batch.num_tokens,
        seconds=engine.clock.seconds(),
        total_seconds=time.perf_counter() - started,
    )
