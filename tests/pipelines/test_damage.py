"""Item 14: a byte of an artifact that changed on its disk ends whatever reads it in one message."""

import dataclasses
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from clusterlib.artifacts.artifact import Root
from clusterlib.batches.plan import BatchingConfig
from clusterlib.clusters.shards import Shards
from clusterlib.errors import StrataError
from pipelines import cluster, embed, shard
from pipelines.stage import find_or_make
from train.config import TrainConfig
from train.data import cache_shards
from train.launch import model_spec, train


def damaged(artifact, tmp_path, table, column):
    """A copy of an artifact's root with a byte of a column flipped in a table's last part; the path
    of that part.
    """
    shutil.copytree(artifact.root.path, tmp_path / "root")
    root = Root(str(tmp_path / "root"))
    copy = dataclasses.replace(artifact, root=root)
    path = Path(copy.path, copy.parts(table)[-1].path)
    file = pq.ParquetFile(path)
    place = file.schema_arrow.get_field_index(column)
    chunk = file.metadata.row_group(0).column(place)
    end = (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size
    data = bytearray(path.read_bytes())
    data[end - 1] ^= 4
    path.write_bytes(data)
    return copy, path


@pytest.fixture
def told():
    """Runs `call`; it must end in the message about a damaged part."""

    def run(path, call):
        with pytest.raises(StrataError) as info:
            call()
        message = str(info.value)
        assert f"{path}: named in the manifest but missing or damaged (" in message
        assert message.endswith("and run its stage again") and "\n" not in message

    return run


def make_again(stage, chain, kind, root):
    """A source's artifact of a kind, which is not there any more, under another root."""
    shutil.rmtree(f"{root.path}/{kind}")
    find_or_make(stage, [getattr(chain.specs, kind)["big"]], root)


def test_embed_tells_of_damaged_pairs(chain, tmp_path, told):
    pairs, path = damaged(chain.pairs["big"], tmp_path, "pairs", "passage")
    told(path, lambda: make_again(embed.STAGE, chain, "embeddings", pairs.root))


def test_cluster_tells_of_damaged_embeddings(chain, tmp_path, told):
    embeddings, path = damaged(chain.embeddings["big"], tmp_path, "embeddings", "pair_id")
    told(path, lambda: make_again(cluster.STAGE, chain, "centroids", embeddings.root))


@pytest.mark.parametrize("kind", ["embeddings", "centroids"])
def test_shard_tells_of_damaged_embeddings_and_centroids(chain, tmp_path, told, kind):
    artifact, path = damaged(getattr(chain, kind)["big"], tmp_path, kind, "source")
    told(path, lambda: make_again(shard.STAGE, chain, "shards", artifact.root))


def test_caching_tells_of_damaged_shards_and_keeps_nothing(chain, tmp_path, told):
    shards, path = damaged(chain.shards["big"], tmp_path, "shards", "query_id")
    told(path, lambda: cache_shards(Shards([shards]), tmp_path / "cache", False))
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(("table", "column"), [("index", "leaf"), ("shards", "query_id")])
def test_training_tells_of_damaged_shards(chain, tmp_path, told, architecture, table, column):
    shards, path = damaged(chain.shards["big"], tmp_path, table, column)
    config = TrainConfig(
        student={"architecture": architecture},
        optimizer={"learning_rate": 1e-3},
        steps=1,
        cache_dir=str(tmp_path / "cache"),
    )
    batching = BatchingConfig(strategy="random", global_batch_size=8)
    prompts = {"query": "", "document": ""}
    spec = model_spec(config, batching, {"big": chain.specs.shards["big"]}, prompts, "test")
    told(path, lambda: train(spec, shards.root))
