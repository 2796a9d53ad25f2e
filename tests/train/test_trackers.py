"""Trackers: TensorBoard's files read back, and what the clients of the others are asked for."""

import struct
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from train.trackers import TrackedRun, start_trackers


def run_at(step, folder):
    return TrackedRun(
        "an/arm", "0123456789abcdef", {"train": {"seed": 0}, "phases": [1]}, step, folder
    )


def events(folder):
    """The events of all files in a folder, in order: records of length, its checksum, data, its
    checksum.
    """
    found = []
    for path in sorted(folder.rglob("events.*"), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def shown(folder):
    """(name, step) -> values that TensorBoard shows: a start drops what is there from its step
    on.
    """
    points = []
    for event in events(folder):
        if event.session_log.status == SessionLog.START:
            points = [point for point in points if point[1] < event.step]
        points += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    found = {}
    for name, step, value in points:
        found.setdefault((name, step), []).append(value)
    return found


def test_tensorboard_shows_each_step_once_though_the_run_was_killed(tmp_path):
    (killed,) = start_trackers(["tensorboard"], run_at(0, tmp_path))
    for step in (1, 2, 3):
        killed.log(step, {"train/loss": step / 2, "train/accuracy": 0.0})
    deadline = time.monotonic() + 60
    while ("train/accuracy", 3) not in shown(tmp_path):  # on disk soon, though it is not closed
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)  # files are named by the second
    # Its last checkpoint was after step 2.
    (resumed,) = start_trackers(["tensorboard"], run_at(2, tmp_path))
    resumed.log(3, {"train/loss": 8.0})
    resumed.log(4, {"test/mean/ndcg_at_10": 0.5})
    resumed.close()
    assert [path.name for path in tmp_path.iterdir()] == ["an-arm-0123456789abcdef"]
    found = shown(tmp_path)
    assert found["train/loss", 1] == [0.5] and found["train/loss", 2] == [1.0]
    assert found["train/loss", 3] == [8.0] and found["test/mean/ndcg_at_10", 4] == [0.5]
    assert len(found) == 6


class Recorder(ModuleType):
    """A client that notes what it is asked for."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def note(self, name, answer=None):
        def call(*arguments, **options):
            self.calls.append((name, *arguments, options) if options else (name, *arguments))
            return answer

        return call


@pytest.fixture
def wandb(monkeypatch):
    module = Recorder("wandb")
    module.init = module.note(
        "init", SimpleNamespace(log=module.note("log"), finish=module.note("finish"))
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_wandb_continues_the_run_of_the_fingerprint(wandb, tmp_path):
    (tracker,) = start_trackers(["wandb"], run_at(2, tmp_path))
    tracker.log(3, {"train/loss": 0.5})
    tracker.close()
    settings = {"train": {"seed": 0}, "phases": [1]}
    options = {"id": "0123456789abcdef", "name": "an/arm", "config": settings, "resume": "allow"}
    assert wandb.calls == [
        ("init", {"project": "strata", **options}),
        ("log", {"train/loss": 0.5}, {"step": 3}),
        ("finish",),
    ]


@pytest.fixture
def mlflow(monkeypatch):
    module = Recorder("mlflow")
    module.found = []
    for name in ("set_experiment", "start_run", "log_params", "log_metrics", "end_run"):
        setattr(module, name, module.note(name))
    module.search_runs = module.note("search_runs", module.found)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    return module


@pytest.mark.parametrize("run_id", [None, "run1"])
def test_mlflow_continues_the_run_of_the_tag(mlflow, tmp_path, run_id):
    mlflow.found += [SimpleNamespace(info=SimpleNamespace(run_id=run_id))] if run_id else []
    (tracker,) = start_trackers(["mlflow"], run_at(2, tmp_path))
    tracker.log(3, {"train/loss": 0.5})
    tracker.close()
    search = {
        "filter_string": "tags.strata_model = '0123456789abcdef'",
        "max_results": 1,
        "output_format": "list",
    }
    tags = {"strata_model": "0123456789abcdef"}
    assert mlflow.calls == [
        ("set_experiment", "theirs"),
        ("search_runs", search),
        ("start_run", {"run_id": run_id, "run_name": "an/arm", "tags": tags}),
        ("log_params", {"train.seed": 0, "phases": [1]}),
        ("log_metrics", {"train/loss": 0.5}, {"step": 3}),
        ("end_run",),
    ]
