"""Runs on Ray Train: what they refuse, and which weights they keep."""

import os
import shutil
from pathlib import Path

import pytest
import ray.exceptions
import ray.train
import torch
import torch.distributed as dist
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from safetensors.torch import load_file

from clusterlib.artifacts import lease
from clusterlib.artifacts.artifact import Spec
from clusterlib.artifacts.draft import Draft, Receipt
from clusterlib.batches.plan import BatchingConfig
from clusterlib.errors import StrataError
from train import launch
from train.config import TrainConfig
from train.launch import model_spec, train, will_come_again


def spec_on(artifact, config, batching, tests=None):
    shards = Spec("shards", 1, artifact.config)
    assert shards.name == artifact.name
    prompts = {"query": "", "document": ""}
    return model_spec(config, batching, {"both": shards}, prompts, "test", tests)


def train_on(artifact, config, batching, tests=None):
    return train(spec_on(artifact, config, batching, tests), artifact.root, tests)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"teacher_margin": 0.1}, "carries no teacher vectors; set shard.teacher_vectors=true"),
        ({"matryoshka_dims": [16, 64]}, "the student's embedding has 32 dimensions"),
    ],
)
def test_losses_that_do_not_fit_are_refused_before_anything_runs(
    shards, architecture, loss, message
):
    artifact, _ = shards
    config = TrainConfig(
        student={"architecture": architecture},
        loss=loss,
        optimizer={"learning_rate": 1e-3},
        steps=1,
        num_workers=1,
    )
    batching = BatchingConfig(strategy="random", global_batch_size=8)
    with pytest.raises(StrataError, match=message):
        train_on(artifact, config, batching)


def test_a_run_mines_neighbors_and_leaves_no_table_behind(
    make_shards, tmp_path, architecture, ray_running
):
    artifact, _ = make_shards(tmp_path / "root", teacher_width=6)
    cache = tmp_path / "cache"
    config = TrainConfig(
        student={"architecture": architecture},
        optimizer={"learning_rate": 1e-3},
        steps=6,
        num_workers=2,
        micro_batch_size=8,
        cache_dir=str(cache),
    )
    phases = [
        {"fraction": 0.5, "strategy": "random"},
        {"fraction": 0.5, "strategy": "neighbors", "k": 2},
    ]
    batching = BatchingConfig(
        global_batch_size=16, phases=phases, neighbors={"refresh_every_steps": 2}
    )
    model = train_on(artifact, config, batching)
    steps = model.read("steps").to_pylist()
    assert [row["stratum"] for row in steps[:3]] == ["all"] * 3
    assert {row["stratum"] for row in steps[3:]} <= {"a", "b"}
    assert not list(cache.glob("*neighbors*")) and not list((tmp_path / "root").rglob("neighbors*"))


def test_neighbors_without_teacher_vectors_are_refused(shards, architecture):
    artifact, _ = shards
    config = TrainConfig(
        student={"architecture": architecture}, optimizer={"learning_rate": 1e-3}, steps=1
    )
    batching = BatchingConfig(strategy="neighbors", global_batch_size=8)
    with pytest.raises(
        StrataError, match="batching.strategy=neighbors: .* carries no teacher vectors"
    ):
        train_on(artifact, config, batching)


def test_trackers_that_are_not_installed_are_refused_before_anything_runs(
    shards, architecture, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    artifact, _ = shards
    config = TrainConfig(
        student={"architecture": architecture},
        optimizer={"learning_rate": 1e-3},
        steps=1,
        trackers=["wandb"],
    )
    with pytest.raises(
        StrataError, match=r"train.trackers: wandb .* not installed; `pip install wandb`"
    ):
        train_on(artifact, config, BatchingConfig(strategy="random", global_batch_size=8))


def raised(error, module="train.loop"):
    """The error as it is when code of a module raised it."""
    try:
        exec(compile("raise error", module, "exec"), {"__name__": module, "error": error})
    except type(error) as found:
        return found


@pytest.mark.parametrize(
    "error",
    [
        raised(
            RuntimeError("Connection closed by peer"), "torch.distributed.distributed_c10d"
        ),  # gloo's
        dist.DistBackendError("NCCL error"),
        ConnectionResetError(),
        OSError("503 Slow Down"),
        ray.exceptions.RayActorError(),
        torch.AcceleratorError("ECC error", 0),
    ],
)
def test_lost_ranks_storage_and_gpus_are_worth_a_new_start(error):
    assert not will_come_again(error)


@pytest.mark.parametrize(
    "error",
    [
        raised(RuntimeError("mat1 and mat2 shapes cannot be multiplied")),
        raised(TypeError("bug"), "torch.distributed.distributed_c10d"),
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        IndexError("index out of range in self"),
        PermissionError(),
    ],
)
def test_bugs_too_little_memory_and_bad_input_are_not(error):
    assert will_come_again(error)


def test_an_error_that_will_come_again_ends_the_run_at_once_in_one_message(
    ray_running, shards, tmp_path, architecture
):
    """Rank 0 fails while rank 1 waits for it."""
    artifact, _ = shards
    tries = tmp_path / "tries"

    class Faulty:
        def content(self):
            return {}

        def origin(self):
            return {}

        def __call__(self, model, device):
            with tries.open("a") as stream:
                stream.write("one\n")
            raise KeyError("a bug")

    config = TrainConfig(
        student={"architecture": architecture},
        optimizer={"learning_rate": 1e-2},
        steps=4,
        num_workers=2,
        cache_dir=str(tmp_path / "cache"),
        test_every_steps=2,
    )
    batching = BatchingConfig(strategy="random", global_batch_size=8)
    with pytest.raises(
        StrataError, match="^train test: rank 0 failed: KeyError: 'a bug'; its traceback is in"
    ) as info:
        train_on(artifact, config, batching, Faulty())
    assert tries.read_text() == "one\n"
    details = Path(str(info.value).rpartition(" ")[2]).read_text()
    assert "raise KeyError" in details and "ray/" not in details


LOST = WorkerHealthCheckFailedError("A worker health check failed.", ray.exceptions.RayActorError())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ray.train.WorkerGroupError(
                "pages", {0: RuntimeError("Connection closed by peer"), 1: LOST}
            ),
            r"gave up after 3 new starts \(train.max_failures\); rank 1 was lost. "
            r"The same command goes on",
        ),
        (
            ray.train.WorkerGroupError("pages", {1: OSError("503\nmore")}),
            "rank 1 failed: OSError: 503. The same command",
        ),
        (
            ray.train.ControllerError(RuntimeError("no room")),
            "Ray Train could not run: RuntimeError: no room",
        ),
        (ray.train.ControllerError(StrataError("train step 7, ...")), "^train step 7, ...$"),
    ],
)
def test_a_run_that_ray_train_gives_up_ends_in_one_message(
    shards, architecture, monkeypatch, error, message
):
    def fit(self):
        raise error

    monkeypatch.setattr("ray.train.torch.TorchTrainer.fit", fit)
    artifact, _ = shards
    config = TrainConfig(
        student={"architecture": architecture}, optimizer={"learning_rate": 1e-3}, steps=1
    )
    with pytest.raises(StrataError, match=message):
        train_on(artifact, config, BatchingConfig(strategy="random", global_batch_size=8))


def test_the_best_weights_are_kept_though_rank_0_dies_in_a_test(
    ray_running, shards, tmp_path, architecture
):
    artifact, _ = shards
    seen = tmp_path / "seen"
    seen.mkdir()

    class Scripted:
        """Scores each step as written, and keeps a copy of its model; dies once, while another rank
        waits.
        """

        def content(self):
            return {"tasks": ["scripted"]}

        def origin(self):
            return {}

        def __call__(self, model, device):
            step = len(list(seen.iterdir())) + 1
            if step == 3 and not (tmp_path / "died").exists():
                (tmp_path / "died").touch()
                os._exit(1)
            shutil.copytree(model, seen / f"{step}")
            value = [0.25, 0.75, 0.5, 0.75][step - 1]
            return [{"task": "mean", "split": "", "metric": "ndcg_at_10", "value": value}]

    config = TrainConfig(
        student={"architecture": architecture},
        optimizer={"learning_rate": 1e-2},
        steps=4,
        num_workers=2,
        checkpoint_every_steps=2,
        cache_dir=str(tmp_path / "cache"),
        test_every_steps=1,
        keep="best",
    )
    batching = BatchingConfig(strategy="random", global_batch_size=8)
    made = train_on(artifact, config, batching, Scripted())
    assert (tmp_path / "died").exists()
    assert made.config["tasks"] == ["scripted"]
    tests = made.read("tests").to_pylist()
    assert [(row["step"], row["value"]) for row in tests] == [
        (1, 0.25),
        (2, 0.75),
        (3, 0.5),
        (4, 0.75),
    ]
    assert (
        made.stats["kept_step"] == 2
        and made.stats["num_steps"] == 4 == made.parts("steps")[0].num_rows
    )
    assert "after step 2." in Path(made.folder("export"), "README.md").read_text()

    def weights(folder):
        return {
            name: weight.tolist()
            for name, weight in load_file(folder / "model.safetensors").items()
        }

    kept = weights(Path(made.folder("export")))
    assert [kept == weights(seen / f"{step}") for step in (1, 2, 3, 4)] == [
        False,
        True,
        False,
        False,
    ]


@pytest.fixture
def second(shards, architecture, monkeypatch):
    """(the draft of a model, a driver that trains it whose ranks are left out)."""
    artifact, _ = shards
    config = TrainConfig(
        student={"architecture": architecture}, optimizer={"learning_rate": 1e-3}, steps=1
    )
    batching = BatchingConfig(strategy="random", global_batch_size=8)
    draft = Draft(artifact.root, spec_on(artifact, config, batching))

    def fit(self):
        draft.commit("export", Receipt([], stats={"by": "second"}))

    monkeypatch.setattr("ray.train.torch.TorchTrainer.fit", fit)
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    return draft, lambda: train_on(artifact, config, batching)


def test_a_second_driver_of_a_model_is_told_who_trains_it(second):
    """Item 13: two would share Ray Train's checkpoint folder."""
    draft, drive = second
    with (
        draft.alone(),
        pytest.raises(
            StrataError,
            match=rf"^train test: another driver trains this model: .*process {os.getpid()} on .* "
            "since 20.*; let it end, or end it, and run the same command again$",
        ),
    ):
        drive()
    assert drive().stats["by"] == "second"


def test_a_driver_that_waited_for_the_model_finds_it(second, monkeypatch):
    """The first ends between the second's look for the model and its own turn."""
    draft, drive = second
    alone = Draft.alone

    def after_the_first(self):
        draft.publish([Receipt([], stats={})], {"by": "first"})
        return alone(self)

    monkeypatch.setattr(Draft, "alone", after_the_first)
    assert drive().stats["by"] == "first"


def test_ranks_of_a_driver_that_was_taken_for_dead_write_nothing_more(
    ray_running, shards, tmp_path, architecture, monkeypatch
):
    artifact, _ = shards
    config = TrainConfig(
        student={"architecture": architecture},
        optimizer={"learning_rate": 1e-3},
        steps=4,
        checkpoint_every_steps=2,
        cache_dir=str(tmp_path / "cache"),
    )
    batching = BatchingConfig(strategy="random", global_batch_size=8)
    draft = Draft(artifact.root, spec_on(artifact, config, batching))
    fit = launch._fit

    def overtaken(run, held):
        held._write("dead", {})
        fit(run, held)

    monkeypatch.setattr(launch, "_fit", overtaken)
    with pytest.raises(StrataError, match="gave no sign for 60 s, so another took its place"):
        train_on(artifact, config, batching)
    assert not list(Path(draft.path, "checkpoints").glob("step-*")) and not draft.receipts()
