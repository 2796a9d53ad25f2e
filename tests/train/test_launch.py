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
