"""The step loop without an engine: which batches it asks for, and what it records."""

from types import SimpleNamespace

import pyarrow as pa
import torch

from clusterlib.plan import BatchingConfig, Plan
from clusterlib.tables import SIMILARITY_BINS, STEPS
from train.clock import Clock
from train.data import TokenStore, cache_shards, load_tokenizer, shard_index
from train.loop import Progress, TrainConfig, fit
from train.loss import MEASURES

PHASES = [{"fraction": 0.25, "strategy": "source"}, {"fraction": 0.75, "strategy": "cluster", "k": 2}]


def test_records_say_phase_epoch_and_stratum(shards, tmp_path, architecture, monkeypatch):
    monkeypatch.setattr("train.loop.accumulate_gradient", lambda *_: torch.zeros(len(MEASURES) + 2 * SIMILARITY_BINS))
    device = torch.device("cpu")
    engine = SimpleNamespace(device=device, clock=Clock(device), step=lambda learning_rate: 0.0)
    artifact, _ = shards
    index = shard_index(artifact)
    store = TokenStore(cache_shards(artifact, tmp_path, False), index, load_tokenizer(artifact).pad_token_id)
    plan = Plan(index, BatchingConfig(global_batch_size=32, phases=PHASES))
    epochs = [phase.num_batches for phase in plan.phases]
    student = {"architecture": architecture}
    config = TrainConfig.model_validate({"student": student, "optimizer": {"learning_rate": 1}, "epochs": 4})
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
    assert {row["stratum"] for row in records[first:]} <= {f"{s}/{c}" for s in "ab" for c in (0, 1, "mixed")}
    assert max(epoch for _, epoch in expected) > 0
