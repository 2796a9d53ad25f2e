"""Real ranks under DeepSpeed: the gradient is that of one process with the whole batch, and resumes are exact."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clusterlib.plan import BatchingConfig, Plan
from train.data import TokenStore, cache_shards, load_tokenizer, shard_index
from train.model import StudentConfig, build_student

BATCH = 24
TEMPERATURE = 0.05
NUM_RANKS = (1, 2)
STAGES = (0, 1, 2)
MICRO = {"plain": 24, "cached": 5}  # 24 rows are one micro-batch on one rank and on two


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, make_shards, architecture):
    """Runs every case once for each number of ranks; returns the artifact and the folder of results."""
    folder = tmp_path_factory.mktemp("ranks")
    shards, _ = make_shards(folder / "root")
    quiet = {**architecture, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    case = {
        "student": {"architecture": quiet},
        "loss": {"temperature": TEMPERATURE},
        "optimizer": {"learning_rate": 1e-3, "max_gradient_norm": 1e9},
        "steps": 4,
        "seed": 3,
    }
    cases = {
        f"zero{stage}-{micro}": {**case, "zero_stage": stage, "micro_batch_size": size}
        for stage in STAGES
        for micro, size in MICRO.items()
    }
    for stage in STAGES:
        cases[f"bf16-zero{stage}"] = {**cases[f"zero{stage}-cached"], "precision": "bf16"}
    dropout = {**case, "student": {"architecture": architecture}, "micro_batch_size": 5, "checkpoint_every_steps": 2}
    resumes = {f"resume{stage}": {**dropout, "zero_stage": stage} for stage in STAGES}
    settings = {
        "root": str(folder / "root"),
        "shards": shards.name,
        "cache": str(folder / "cache"),
        "out": str(folder),
        "batching": {"strategy": "cluster", "k": 2, "global_batch_size": BATCH},
        "cases": cases,
        "resumes": resumes,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    for num_ranks in NUM_RANKS:
        run_ranks(num_ranks, folder / "settings.json")
    return shards, folder, quiet


def run_ranks(num_ranks, settings):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("ranks_worker.py")), str(settings)],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_ranks),
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    for rank in ranks:
        output, _ = rank.communicate(timeout=240)
        assert rank.returncode == 0, output[-4000:]


@pytest.fixture(scope="module")
def reference(outcome, tmp_path_factory):
    """Torch alone, one process, the whole batch in one pass, float64, the loss spelled out: gradient and loss."""
    shards, _, architecture = outcome
    tokenizer = load_tokenizer(shards)
    index = shard_index(shards)
    plan = Plan(index, BatchingConfig(strategy="cluster", k=2, global_batch_size=BATCH))
    store = TokenStore(cache_shards(shards, tmp_path_factory.mktemp("cache")), index, tokenizer.pad_token_id)
    batch = store.read(plan.step(0, 1).rows, 0, 1, BATCH)
    model = build_student(StudentConfig(architecture=architecture), tokenizer, 64, seed=3).double()
    query, passage = (_embed(model, side) for side in (batch.query, batch.passage))
    losses = []
    for row in range(BATCH):
        kept = [
            column
            for column in range(BATCH)
            if column == row
            or (batch.passage_id[column] != batch.passage_id[row] and batch.query_id[column] != batch.query_id[row])
        ]
        logits = query[row] @ passage[kept].T / TEMPERATURE
        losses.append(torch.logsumexp(logits, 0) - logits[kept.index(row)])
    loss = torch.stack(losses).mean()
    loss.backward()
    return torch.cat([weight.grad.ravel() for weight in model.parameters()]), float(loss.detach())


def _embed(model, side):
    ids, mask = side.micro_batches[0]
    states = model.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    pooled = (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    return (pooled / pooled.norm(dim=1, keepdim=True))[side.places]


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("micro", MICRO)
def test_gradient_equals_one_process_with_the_whole_batch(outcome, reference, num_ranks, stage, micro):
    _, folder, _ = outcome
    found = torch.load(folder / f"zero{stage}-{micro}-{num_ranks}.pt", weights_only=True)
    gradient, loss = reference
    error = float((found["gradient"] - gradient).norm() / gradient.norm())
    assert error < 1e-6, error
    assert float(found["measures"][0]) == pytest.approx(loss, rel=1e-5)
    assert found["norm"] == pytest.approx(float(gradient.norm()), rel=1e-5)


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("stage", STAGES)
def test_bf16_is_near_and_keeps_float32_weights(outcome, reference, num_ranks, stage):
    _, folder, _ = outcome
    found = torch.load(folder / f"bf16-zero{stage}-{num_ranks}.pt", weights_only=True)
    gradient, loss = reference
    assert found["dtype"] == "torch.float32"
    assert 1e-6 < float((found["gradient"] - gradient).norm() / gradient.norm()) < 0.1
    assert float(found["measures"][0]) == pytest.approx(loss, rel=0.01)


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("stage", STAGES)
def test_two_and_two_steps_are_four(outcome, num_ranks, stage):
    _, folder, _ = outcome
    found = torch.load(folder / f"resume{stage}-{num_ranks}.pt", weights_only=True)
    assert found["started_at"] == 2
    whole, resumed = found["records"]
    assert len(whole) == 4 and whole == resumed  # losses and norms to the last bit
    assert torch.equal(*found["weights"])
