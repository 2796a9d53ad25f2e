"""The learner on one rank, without Ray: what it makes, and that a run cut short makes the same."""

import contextlib
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from pyarrow.fs import LocalFileSystem
from safetensors.torch import load_file

from clusterlib.artifacts.artifact import Root, Spec
from clusterlib.artifacts.draft import Draft
from clusterlib.artifacts.tables import MEAN
from clusterlib.batches.plan import BatchingConfig
from clusterlib.clusters.shards import Shards
from train import checkpoint
from train.config import TrainConfig
from train.learner import Learner, Run
from train.trackers import TRACKERS

STEPS = 6
VALUES = [0.25, 0.75, 0.5]  # of the tests after steps 2, 4 and 6


class KilledError(Exception):
    """The end of a rank's process."""


class Folders:
    """Surroundings with a folder for each checkpoint; the process is killed after that of
    `last_step`.
    """

    device = torch.device("cpu")
    local_rank = 0

    def __init__(self, folder, last_step=None):
        self.checkpoints = str(folder)
        self._last_step = last_step

    def latest_checkpoint(self):
        found = checkpoint.latest(LocalFileSystem(), self.checkpoints)
        return contextlib.nullcontext(found and Path(found))

    def keep_checkpoint(self, folder, step):
        shutil.copytree(folder, f"{self.checkpoints}/step-{step:09d}")
        if step == self._last_step:
            raise KilledError

    def wait_for_all(self):
        pass


class Scripted:
    """Scores by the step, whatever the model; keeps a copy of it."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, model, device):
        number = len(list(self.folder.iterdir()))
        shutil.copytree(model, self.folder / f"{number}")
        row = {"task": MEAN, "split": "", "metric": "ndcg_at_10"}
        return [{**row, "value": VALUES[number]}]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """A process group of this process alone."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK"):  # DeepSpeed asks for them
            patch.setenv(name, "0")
        yield
    dist.destroy_process_group()


@pytest.fixture
def tracked(monkeypatch):
    """What a tracker is told: (step, names of values), and "closed"."""
    told = []

    class Recorder:
        def __init__(self, run):
            told.append(("started", run.step))

        def log(self, step, values):
            told.append((step, "train/loss" in values, "test/mean/ndcg_at_10" in values))

        def close(self):
            told.append("closed")

    monkeypatch.setitem(TRACKERS, "tensorboard", ("tensorboardX", Recorder))
    return told


def exported(run):
    """The folder of the model that a run exported; its name carries a digest."""
    part = next(part for part in run.draft.receipt("export").parts if part.table == "export")
    return Path(run.draft.path, part.path.partition("/")[0])


@pytest.fixture
def make_run(shards, architecture, tmp_path):
    """Makes a run of the same settings and tests in a root of its own."""

    def made(name):
        config = TrainConfig(
            student={"architecture": architecture},
            optimizer={"learning_rate": 1e-2},
            steps=STEPS,
            micro_batch_size=4,
            test_every_steps=2,
            keep="best",
            checkpoint_every_steps=2,
            cache_dir=str(tmp_path / "cache"),
            trackers=["tensorboard"],
        )
        batching = BatchingConfig(strategy="cluster", k=2, global_batch_size=16)
        tests = Scripted(tmp_path / f"{name}-tests")
        tests.folder.mkdir()
        artifact, _ = shards
        spec = Spec(
            "model",
            1,
            {**{"train": config, "batching": batching}, "prompts": {"query": "", "document": ""}},
        )
        draft = Draft(Root(str(tmp_path / name)), spec)
        return Run(config, batching, Shards([artifact]), draft, name, tests)

    return made


def learn(run, surroundings):
    learner = Learner(run, surroundings)
    learner.fit()
    learner.finish()


def content(draft):
    """Digests of the exported files; records without their times; scores of tests; statistics
    without times.
    """
    receipt = draft.receipt("export")
    digests = {part.path: part.sha256 for part in receipt.parts if part.table == "export"}
    tables = {
        part.table: pq.read_table(f"{draft.path}/{part.path}").to_pylist()
        for part in receipt.parts
        if part.table != "export"
    }
    without_times = [
        [{key: value for key, value in row.items() if not key.endswith("_seconds")} for row in rows]
        for rows in (tables["steps"], [receipt.stats])
    ]
    return digests, *without_times, tables["tests"]


def test_a_run_that_is_cut_short_makes_what_one_in_one_piece_makes(
    one_rank, make_run, tracked, tmp_path, capsys
):
    whole = make_run("whole")
    learn(whole, Folders(tmp_path / "whole-checkpoints"))
    steps = [
        told
        for step in range(1, STEPS + 1)
        for told in [(step, True, False), *([(step, False, True)] if step % 2 == 0 else [])]
    ]
    assert tracked == [("started", 0), *steps, "closed"]

    tracked.clear()
    cut, folder = make_run("cut"), tmp_path / "cut-checkpoints"
    for last_step in (2, 4):
        with pytest.raises(KilledError):
            learn(cut, Folders(folder, last_step))
        assert cut.draft.receipt("export") is None
    capsys.readouterr()
    learn(cut, Folders(folder))
    assert "6 steps of 16 pairs, continued at step 4" in capsys.readouterr().out
    assert [told for told in tracked if told[0] == "started"] == [
        ("started", step) for step in (0, 2, 4)
    ]
    assert content(cut.draft) == content(whole.draft)


def test_the_exported_model_is_that_of_the_best_test(one_rank, make_run, tracked, tmp_path):
    run = make_run("best")
    learn(run, Folders(tmp_path / "checkpoints"))
    kept = load_file(exported(run) / "model.safetensors")
    tested = [load_file(run.tests.folder / f"{n}" / "model.safetensors") for n in range(3)]
    assert [all(torch.equal(kept[name], model[name]) for name in kept) for model in tested] == [
        False,
        True,
        False,
    ]
    stats = run.draft.receipt("export").stats
    assert (stats["kept_step"], stats["num_steps"], stats["num_skipped_steps"]) == (4, STEPS, 0)
    assert "after step 4." in (exported(run) / "README.md").read_text()
