"""Real ranks under DeepSpeed: the gradient is that of one process with the whole batch, and resumes
are exact.
"""

import functools
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from clusterlib.batches.plan import BatchingConfig, Plan
from clusterlib.clusters.shards import Shards
from train.data import TokenStore, cache_shards, load_tokenizer
from train.loss import LossConfig
from train.measures import LOSS, by_name
from train.model import StudentConfig, build_student

BATCH = 24
NUM_RANKS = (1, 2, 4)
STAGES = (0, 1, 2)
MICRO = {
    "plain": 24,
    "cached": 5,
}  # 24 rows are one micro-batch on any ranks; of 5, the last is smaller
# Weights so large that texts differ: where embeddings are nearly equal, the terms of the gradient
# cancel and float32 itself is off by more than 1e-6.
DISTINCT = {"initializer_range": 0.1}
LOSSES = {
    "both": {"bidirectional": True},
    "prefixes": {"matryoshka_dims": [4, 16]},
    "teacher": {"teacher_margin": 0.2},
    "all": {"bidirectional": True, "matryoshka_dims": [8], "teacher_margin": 0.2},
}


def loss_config(name):
    return LossConfig(temperature=0.05, **LOSSES.get(name, {}))


@pytest.fixture(scope="module")
def setting(tmp_path_factory, make_shards, architecture):
    folder = tmp_path_factory.mktemp("ranks")
    shards, _ = make_shards(folder / "root", teacher_width=6)
    quiet = {**architecture, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return shards, folder, quiet, architecture


@pytest.fixture(scope="module")
def case(setting):
    """The settings that all cases and runs share."""
    _, _, quiet, _ = setting
    return {
        "student": {"architecture": quiet},
        "loss": loss_config("").model_dump(),
        "optimizer": {"learning_rate": 1e-3, "max_gradient_norm": 1e9},
        "steps": 4,
        "seed": 3,
    }


@pytest.fixture(scope="module")
def run(case):
    """The settings that all runs share."""
    return {**case, "micro_batch_size": 5, "checkpoint_every_steps": 2}


def reader(folder, make):
    """What reads the result of `name` on a number of ranks, made by `make` when first asked for."""
    made = functools.cache(make)

    def read(name, *num_ranks):
        made(*num_ranks)
        path = folder / f"{'-'.join([name, *map(str, num_ranks)])}.pt"
        return torch.load(path, weights_only=True)

    return read


@pytest.fixture(scope="module")
def gradient(setting, case):
    """Reads one step of each ZeRO stage, loss, precision and way to compute it."""
    _, folder, quiet, _ = setting
    case = {**case, "student": {"architecture": quiet | DISTINCT}}
    cases = {
        f"zero{stage}-{micro}": {**case, "zero_stage": stage, "micro_batch_size": size}
        for stage in STAGES
        for micro, size in MICRO.items()
    }
    cached = cases["zero1-cached"]
    cases |= {name: {**cached, "loss": loss_config(name).model_dump()} for name in LOSSES}
    cases["checkpointed"] = {**cached, "gradient_checkpointing": True}
    for stage in STAGES:
        cases[f"bf16-zero{stage}"] = {**cases[f"zero{stage}-cached"], "precision": "bf16"}
        cases[f"broken-zero{stage}"] = cases[f"zero{stage}-cached"]
    return reader(folder, lambda num_ranks: run_ranks(num_ranks, setting, cases, {}))


@pytest.fixture(scope="module")
def resume(setting, run):
    """Reads runs of four steps and those that went on from their second: undisturbed, with tests in
    the loop, and with a gradient that is not finite.
    """
    _, folder, _, noisy = setting

    def resumes(num_ranks):
        runs = {}
        for stage in STAGES:
            config = {**run, "student": {"architecture": noisy}, "zero_stage": stage}
            tested = {**config, "test_every_steps": 1}
            for name, settings in (
                ("whole", {"config": config}),
                ("tested", {"config": tested}),
                ("broken", {"config": config, "break_step": 0}),
            ):
                first = f"{name}{stage}-{num_ranks}"
                again = f"{name.removesuffix('whole')}resumed{stage}-{num_ranks}"
                runs[first] = settings
                runs[again] = {"config": settings["config"], "load": str(folder / first / "2")}
        run_ranks(num_ranks, setting, {}, runs)

    return reader(folder, resumes)


@pytest.fixture(scope="module")
def move(setting, run):
    """Reads a run of two ranks under ZeRO 2, then one without ZeRO, then two under ZeRO 1; and one
    of two under ZeRO 1 all along.
    """
    _, folder, *_ = setting

    def moves():
        steps = {**run, "steps": 6}
        first = {"config": {**steps, "zero_stage": 2}}
        undisturbed = {"config": {**steps, "zero_stage": 1}}
        second = {"config": {**steps, "zero_stage": 0}, "load": str(folder / "first" / "2")}
        third = {"config": {**steps, "zero_stage": 1}, "load": str(folder / "second" / "4")}
        run_ranks(2, setting, {}, {"first": first, "undisturbed": undisturbed})
        run_ranks(1, setting, {}, {"second": second})
        run_ranks(2, setting, {}, {"third": third})

    return reader(folder, moves)


@pytest.fixture(scope="module")
def mine(setting, run):
    """Reads a run of two ranks that mine at steps 0, 2 and 4; one that goes on from step 3; and one
    that does it all alone.
    """
    _, folder, quiet, _ = setting

    def mines():
        neighbors = {"per_seed": 2, "last_rank": 6, "margin": -1.0, "refresh_every_steps": 2}
        batching = {"strategy": "neighbors", "k": 2, "global_batch_size": BATCH}
        config = {**run, "steps": 6, "checkpoint_every_steps": 3}
        config["student"] = {"architecture": quiet | DISTINCT}
        first = {"config": config, "batching": {**batching, "neighbors": neighbors}}
        run_ranks(2, setting, {}, {"mined": first})
        going_on = {**first, "load": str(folder / "mined" / "3"), "like": "mined"}
        run_ranks(1, setting, {}, {"mined-on": going_on, "mined-alone": first})

    return reader(folder, mines)


def run_ranks(num_ranks, setting, cases, runs):
    shards, folder, *_ = setting
    settings = {
        "root": str(folder / "root"),
        "shards": shards.name,
        "cache": str(folder / "cache"),
        "out": str(folder),
        "batching": {"strategy": "cluster", "k": 2, "global_batch_size": BATCH},
        "cases": cases,
        "runs": runs,
    }
    path = folder / "settings.json"
    path.write_text(json.dumps(settings))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("ranks_worker.py")), str(path)],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_ranks),
                "MASTER_PORT": str(port),
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
def reference(setting, tmp_path_factory):
    """Torch alone, one process, the whole batch in one pass, float64, the loss spelled out:
    gradient and loss.
    """
    shards, _, quiet, _ = setting
    tokenizer = load_tokenizer(Shards([shards]))
    index = Shards([shards]).index
    plan = Plan(index, BatchingConfig(strategy="cluster", k=2, global_batch_size=BATCH))
    store = TokenStore(
        cache_shards(Shards([shards]), tmp_path_factory.mktemp("cache"), True),
        index,
        tokenizer.pad_token_id,
        True,
    )
    batch = store.read(plan.step(0, 1).rows, 0, 1, BATCH)

    @functools.cache
    def of(loss_name=""):
        config = loss_config(loss_name)
        model = build_student(
            StudentConfig(architecture=quiet | DISTINCT), tokenizer, 64, seed=3
        ).double()
        query, passage = (_embed(model, side) for side in (batch.query, batch.passage))
        teacher = batch.pairs.teacher_query.double() @ batch.pairs.teacher_passage.double().T
        negative = (batch.pairs.query_id[:, None] != batch.pairs.query_id) & (
            batch.pairs.passage_id[:, None] != batch.pairs.passage_id
        )
        if config.teacher_margin is not None:
            negative &= teacher < teacher.diagonal()[:, None] - config.teacher_margin
        kept = negative | torch.eye(BATCH, dtype=torch.bool)
        losses = []
        for width in (*config.matryoshka_dims, query.shape[1]):
            short = [
                vectors[:, :width] / vectors[:, :width].norm(dim=1, keepdim=True)
                for vectors in (query, passage)
            ]
            logits = short[0] @ short[1].T / config.temperature
            losses.append(_cross_entropy(logits, kept))
            if config.bidirectional:
                losses.append(_cross_entropy(logits.T, kept.T))
        loss = sum(losses) / len(losses)
        loss.backward()
        return torch.cat([weight.grad.ravel() for weight in model.parameters()]), float(
            loss.detach()
        )

    return of


def _cross_entropy(logits, kept):
    """Of the diagonal, over the kept columns of each row."""
    rows = range(len(logits))
    return sum(torch.logsumexp(logits[row][kept[row]], 0) - logits[row, row] for row in rows) / len(
        logits
    )


def _embed(model, side):
    ids, mask = side.micro_batches[0]
    states = model.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    pooled = (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    return (pooled / pooled.norm(dim=1, keepdim=True))[side.places]


def assert_exact(found, reference):
    gradient, loss = reference
    error = float((found["gradient"] - gradient).norm() / gradient.norm())
    assert error < 1e-6, error
    assert float(found["measures"][LOSS]) == pytest.approx(loss, rel=1e-5)
    assert found["norm"] == pytest.approx(float(gradient.norm()), rel=1e-5)


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("micro", MICRO)
def test_gradient_equals_one_process_with_the_whole_batch(
    gradient, reference, num_ranks, stage, micro
):
    assert_exact(gradient(f"zero{stage}-{micro}", num_ranks), reference())


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_exact_over_ranks(gradient, reference, num_ranks, name):
    found = gradient(name, num_ranks)
    assert_exact(found, reference(name))
    by_teacher = by_name(found["measures"])["teacher_masked_fraction"]
    assert (by_teacher > 0) == (name in ("teacher", "all"))


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_gradient_checkpointing_changes_nothing(gradient, reference, num_ranks):
    assert_exact(gradient("checkpointed", num_ranks), reference())


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_each_gradient_is_reduced_once_a_step(gradient, num_ranks, stage):
    found = gradient(f"zero{stage}-cached", num_ranks)
    num_micro_batches = 2 * math.ceil(BATCH / num_ranks / MICRO["cached"])
    # ZeRO 2 keeps no whole gradient to add to, so it reduces each micro-batch's.
    assert found["num_reduced"] == found["num_parameters"] * (
        num_micro_batches if stage == 2 else 1
    )


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_bf16_is_near_and_keeps_float32_weights(gradient, reference, num_ranks, stage):
    found = gradient(f"bf16-zero{stage}", num_ranks)
    wanted, loss = reference()
    assert found["dtype"] == "torch.float32"
    assert 1e-6 < float((found["gradient"] - wanted).norm() / wanted.norm()) < 0.1
    assert float(found["measures"][LOSS]) == pytest.approx(loss, rel=0.01)


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_gradients_are_reduced_in_float32(gradient, num_ranks, stage):
    without, found = (gradient(f"bf16-zero{of}", num_ranks)["gradient"] for of in (0, stage))
    assert float((found - without).norm() / without.norm()) < 1e-6


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_buckets_are_no_larger_than_the_weights(gradient, num_ranks, stage, precision):
    found = gradient(
        f"zero{stage}-cached" if precision == "fp32" else f"bf16-zero{stage}", num_ranks
    )
    assert found["bucket_bytes"] == 4 * found["num_parameters"]


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_changes_nothing(gradient, reference, num_ranks, stage):
    broken, undisturbed = (
        gradient(name, num_ranks) for name in (f"broken-zero{stage}", f"zero{stage}-cached")
    )
    assert not math.isfinite(broken["broken"])
    before, after, _ = broken["states"]
    assert torch.equal(before, after)
    assert_exact(broken, reference())  # nothing of it is left in the next step
    assert torch.equal(broken["states"][2], undisturbed["states"][2])


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_a_skipped_step_is_recorded_and_resumed(resume, num_ranks, stage):
    whole, resumed = (resume(f"{name}{stage}", num_ranks) for name in ("broken", "brokenresumed"))
    assert [record["skipped"] for record in whole["records"]] == [True, False, False, False]
    assert resumed["started_at"] == 2 and resumed["records"][1:] == whole["records"][1:]
    assert torch.equal(whole["weights"], resumed["weights"])


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_steps_do_not_wait_for_the_device_but_at_their_end(resume, num_ranks, stage):
    assert resume(f"whole{stage}", num_ranks)["num_synchronized"] == 0


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_two_and_two_steps_are_four(resume, num_ranks, stage):
    whole, resumed = (resume(f"{name}{stage}", num_ranks) for name in ("whole", "resumed"))
    assert (whole["started_at"], resumed["started_at"]) == (0, 2)
    assert len(whole["records"]) == 4 and whole["records"] == resumed["records"]  # to the last bit
    assert torch.equal(whole["weights"], resumed["weights"])


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_tests_in_the_loop_change_nothing_and_are_resumed(resume, num_ranks, stage):
    whole, tested, resumed = (
        resume(f"{name}{stage}", num_ranks) for name in ("whole", "tested", "testedresumed")
    )
    assert (
        torch.equal(tested["weights"], whole["weights"]) and tested["records"] == whole["records"]
    )
    assert torch.equal(resumed["weights"], whole["weights"]) and resumed["started_at"] == 2
    assert [row["step"] for row in tested["tests"]] == [1, 2, 3, 4]
    assert len({row["value"] for row in tested["tests"]}) == 4  # each of the weights of its step
    assert resumed["tests"] == tested["tests"]


def test_a_run_continues_on_other_ranks_and_under_other_stages(move):
    undisturbed, second, third = (move(name) for name in ("undisturbed", "second", "third"))
    assert (second["started_at"], third["started_at"]) == (2, 4)
    assert len(third["records"]) == 6
    for found, wanted in zip(third["records"], undisturbed["records"], strict=True):
        assert found["stratum"] == wanted["stratum"]
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert found["learning_rate"] == wanted["learning_rate"]
    difference = (third["weights"] - undisturbed["weights"]).norm() / undisturbed["weights"].norm()
    assert difference < 1e-5


def test_a_run_with_mined_neighbors_continues_and_does_not_depend_on_ranks(mine, setting):
    two, on, alone = (mine(name) for name in ("mined", "mined-on", "mined-alone"))
    assert (on["started_at"], alone["started_at"]) == (3, 0)
    for other in (on, alone):
        losses = [[row["loss"] for row in run["records"]] for run in (other, two)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    tables = sorted((setting[1] / "root" / "model").glob("*/neighbors/*.parquet"))
    by_step = {}
    for table in tables:
        by_step.setdefault((table.parents[1].name, table.name[:9]), []).append(pq.read_table(table))
    assert sorted(len(parts) for parts in by_step.values()) == [1, 1, 1, 2, 2, 2]
    for step in ("000000000", "000000002", "000000004"):
        first, second = (
            pa.concat_tables(parts) for (_, of), parts in by_step.items() if of == step
        )
        assert first["neighbors"].to_pylist() == second["neighbors"].to_pylist()
        assert first.num_rows == 240
    assert (
        len({str(pa.concat_tables(parts)["neighbors"].to_pylist()) for parts in by_step.values()})
        == 3
    )
