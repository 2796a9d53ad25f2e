import pytest

from clusterlib.errors import StrataError
from clusterlib.plan import BatchingConfig
from train.launch import train
from train.loop import TrainConfig


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"teacher_margin": 0.1}, "carries no teacher vectors; set shard.teacher_vectors=true"),
        ({"matryoshka_dims": [16, 64]}, "the student's embedding has 32 dimensions"),
    ],
)
def test_losses_that_do_not_fit_are_refused_before_anything_runs(shards, architecture, loss, message):
    artifact, _ = shards
    config = TrainConfig(
        student={"architecture": architecture}, loss=loss, optimizer={"learning_rate": 1e-3}, steps=1, num_workers=1
    )
    batching = BatchingConfig(strategy="random", global_batch_size=8)
    with pytest.raises(StrataError, match=message):
        train(config, batching, artifact, artifact.root, "test")


def test_a_run_mines_neighbors_and_leaves_no_table_behind(make_shards, tmp_path, architecture, ray_running):
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
    phases = [{"fraction": 0.5, "strategy": "random"}, {"fraction": 0.5, "strategy": "neighbors", "k": 2}]
    batching = BatchingConfig(global_batch_size=16, phases=phases, neighbors={"refresh_every_steps": 2})
    model = train(config, batching, artifact, artifact.root, "test")
    steps = model.read("steps").to_pylist()
    assert [row["stratum"] for row in steps[:3]] == ["all"] * 3
    assert {row["stratum"] for row in steps[3:]} <= {"a", "b"}
    mined = [row["mining_seconds"] for row in steps]
    assert min(mined[3], mined[5]) > 10 * max(mined[0], mined[1], mined[2], mined[4])
    assert not list(cache.glob("*neighbors*")) and not list((tmp_path / "root").rglob("neighbors*"))


def test_neighbors_without_teacher_vectors_are_refused(shards, architecture):
    artifact, _ = shards
    config = TrainConfig(student={"architecture": architecture}, optimizer={"learning_rate": 1e-3}, steps=1)
    batching = BatchingConfig(strategy="neighbors", global_batch_size=8)
    with pytest.raises(StrataError, match="batching.strategy=neighbors: .* carries no teacher vectors"):
        train(config, batching, artifact, artifact.root, "test")
