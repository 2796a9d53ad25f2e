"""The step loop without an engine: which batches it asks for, and what it records."""

import itertools
import math
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch

from clusterlib.batches.plan import BatchingConfig, Plan
from clusterlib.clusters.shards import Shards
from clusterlib.errors import StrataError
from train.clock import Clock
from train.config import TrainConfig
from train.data import TokenStore, cache_shards, load_tokenizer
from train.loop import fit
from train.measures import NUM_VALUES, STEPS
from train.progress import Progress

PHASES = [
    {"fraction": 0.25, "strategy": "source"},
    {"fraction": 0.75, "strategy": "cluster", "k": 2},
]


@pytest.fixture
def loop(shards, tmp_path, monkeypatch):
    """(engine that does nothing, plan, token store)"""
    monkeypatch.setattr(
        "train.loop.accumulate_gradient", lambda *_: torch.zeros(NUM_VALUES, dtype=torch.float64)
    )
    device = torch.device("cpu")
    engine = SimpleNamespace(device=device, clock=Clock(device), step=lambda learning_rate: 0.0)
    artifact, _ = shards
    index = Shards([artifact]).index
    store = TokenStore(
        cache_shards(Shards([artifact]), tmp_path, False),
        index,
        load_tokenizer(Shards([artifact])).pad_token_id,
    )
    return engine, Plan(index, BatchingConfig(global_batch_size=32, phases=PHASES)), store


def train_config(architecture, **settings):
    student = {"architecture": architecture}
    return TrainConfig.model_validate(
        {"student": student, "optimizer": {"learning_rate": 1}, **settings}
    )


def test_tests_come_every_n_steps_at_the_end_and_before_checkpoints(loop, architecture):
    config = train_config(architecture, steps=7, test_every_steps=3, checkpoint_every_steps=2)
    called = []

    def calls(name):
        return lambda progress: called.append(f"{name} {progress.step}")

    fit(
        *loop,
        config,
        Progress(),
        lambda *_: None,
        lambda _: None,
        calls("checkpoint"),
        calls("test"),
    )
    assert called == [
        "checkpoint 2",
        "test 3",
        "checkpoint 4",
        "test 6",
        "checkpoint 6",
        "test 7",
        "checkpoint 7",
    ]


def breaking(engine, *steps):
    """The engine, with gradients that are not finite at these steps."""
    taken = itertools.count()
    engine.step = lambda learning_rate: math.nan if next(taken) in steps else 1.0
    return engine


def test_steps_without_a_finite_gradient_are_recorded_and_leave_no_checkpoint(loop, architecture):
    engine, plan, store = loop
    config = train_config(architecture, steps=8, checkpoint_every_steps=2, max_skipped_steps=3)
    progress, saved = Progress(), []
    calls = (lambda *_: None, lambda _: None, lambda progress: saved.append(progress.step))
    fit(breaking(engine, 2, 3, 5, 7), plan, store, config, progress, *calls)
    records = pa.Table.from_pylist(progress.records, schema=STEPS).to_pylist()
    assert [row["step"] for row in records if row["skipped"]] == [2, 3, 5, 7]
    assert progress.num_skipped == 4 and progress.step == 8
    assert saved == [2, 8]  # the last step's is the run's end, whatever it was


@pytest.mark.parametrize(
    ("broken", "good"),
    [
        (range(5, 9), "step 4 in the/folder"),
        (range(4, 8), "step 2 in the/folder"),  # the weights of step 4 may be at fault
        (range(4), "none"),
    ],
)
def test_too_many_steps_in_a_row_without_a_finite_gradient_end_the_run(
    loop, architecture, broken, good
):
    engine, plan, store = loop
    config = train_config(architecture, steps=20, checkpoint_every_steps=2, max_skipped_steps=4)
    calls = (lambda *_: None, lambda _: None, lambda _: None)
    last = broken[-1] + 1
    message = (
        rf"train step {last}, stratum [ab].*: the gradient is not finite, 4 times .* "
        rf"last good checkpoint: {good}\."
    )
    with pytest.raises(StrataError, match=message):
        fit(
            breaking(engine, *broken),
            plan,
            store,
            config,
            Progress(),
            *calls,
            checkpoints="the/folder",
        )


def test_a_run_that_is_continued_goes_on_counting_skipped_steps(loop, architecture):
    engine, plan, store = loop
    config = train_config(architecture, steps=20, max_skipped_steps=3)
    progress = Progress([{"skipped": skipped} for skipped in (True, False, True, True)])
    with pytest.raises(StrataError, match="train step 5, .* last good checkpoint: none"):
        fit(breaking(engine, 0), plan, store, config, progress, *[lambda *_: None] * 3)


def test_records_say_phase_epoch_and_stratum(loop, architecture):
    engine, plan, store = loop
    epochs = [phase.num_batches for phase in plan.phases]
    config = train_config(architecture, epochs=4)
    num_steps = config.num_steps(plan)
    assert abs(num_steps * (0.25 / epochs[0] + 0.75 / epochs[1]) - 4) < 0.5 / min(epochs)

    progress = Progress()
    fit(engine, plan, store, config, progress, lambda *_: None, lambda _: None, lambda _: None)
    records = pa.Table.from_pylist(progress.records, schema=STEPS).to_pylist()
    first = round(0.25 * num_steps)
    expected = [(0, step // epochs[0]) for step in range(first)]
    expected += [(1, step // epochs[1]) for step in range(num_steps - first)]
    assert [(row["phase"], row["epoch"]) for row in records] == expected
    assert {row["stratum"] for row in records[:first]} <= {"a", "b"}
    assert {row["stratum"] for row in records[first:]} <= {
        f"{s}/{c}" for s in "ab" for c in (0, 1, "mixed")
    }
    assert max(epoch for _, epoch in expected) > 0
