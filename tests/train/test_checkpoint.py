import pytest
import torch
from pyarrow.fs import LocalFileSystem

from train import checkpoint
from train.config import TrainConfig
from train.optimizer import OptimizerConfig
from train.progress import Progress


class StillEngine:
    """An engine's state, without the engine."""

    def __init__(self, value):
        self.value = torch.tensor([value])
        self.num_updates = None

    def state(self):
        return {"weight/a": self.value}

    def restore(self, state, num_updates):
        self.value, self.num_updates = state["weight/a"], num_updates


@pytest.fixture
def folder(tmp_path, architecture):
    """Checkpoints after 2, 10 and 12 steps, beside a file that is none."""
    config = TrainConfig(
        student={"architecture": architecture},
        optimizer=OptimizerConfig(learning_rate=0.1),
        steps=12,
    )
    for step in (2, 10, 12):
        path = tmp_path / f"step-{step:09d}"
        path.mkdir()
        test = {"step": step, "task": "mean", "split": "", "metric": "ndcg_at_10", "value": 0.5}
        records = [{"step": n, "skipped": n == 1} for n in range(step)]
        progress = Progress(records, [test], {"a": torch.tensor([-float(step)])})
        checkpoint.save(path, StillEngine(float(step)), progress, config, 0)
    (tmp_path / "snapshot.json").write_text("{}")
    return tmp_path


def latest(folder):
    return checkpoint.latest(LocalFileSystem(), str(folder))


def test_the_latest_checkpoint_is_loaded(folder, capsys):
    found = latest(folder)
    assert found == str(folder / "step-000000012") and not capsys.readouterr().out
    engine = StillEngine(0.0)
    progress = checkpoint.load(folder / "step-000000012", engine, 0)
    assert progress.step == 12 and engine.num_updates == 11 and float(engine.value) == 12
    assert progress.best_step == 12 and progress.best == {"a": torch.tensor([-12.0])}
    other_rank = checkpoint.load(folder / "step-000000012", engine, 1)
    assert other_rank.step == 12 and not other_rank.tests and not other_rank.best


def damage_state(path):
    data = bytearray((path / "state.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "state.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_state, "state.safetensors is not as it was written"),
        (
            lambda path: (path / "state.safetensors").write_bytes(b""),
            "state.safetensors is not as it was written",
        ),
        (lambda path: (path / "steps.parquet").unlink(), "it is incomplete"),
        (lambda path: (path / "best.safetensors").unlink(), "it is incomplete"),
        (lambda path: (path / "digests.json").unlink(), "it is incomplete"),
        (lambda path: (path / "digests.json").write_text('{"state'), "it is incomplete"),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(folder, capsys, damage, message):
    damage(folder / "step-000000012")
    assert latest(folder) == str(folder / "step-000000010")
    output = capsys.readouterr().out
    assert "step-000000012 is not used" in output and message in output


def test_without_a_whole_checkpoint_there_is_none(folder):
    for path in folder.glob("step-*"):
        damage_state(path)
    assert latest(folder) is None
    assert latest(folder / "absent") is None


def test_other_ranks_write_nothing(tmp_path):
    checkpoint.save(tmp_path, StillEngine(0.0), Progress(), None, rank=1)
    assert not list(tmp_path.iterdir())
