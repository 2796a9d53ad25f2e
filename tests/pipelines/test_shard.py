import numpy as np
import pytest

from clusterlib.artifacts.tables import vectors
from clusterlib.clusters.shards import Shards
from pipelines.shard import leaf_centroids
from train.data import load_tokenizer


@pytest.mark.parametrize("source", ["big", "half"])
def test_every_pair_is_in_one_shard_with_its_ids(chain, source):
    names = ["pair_id", "source", "query_id", "passage_id"]
    shards, pairs = (
        sorted(map(tuple, (row.values() for row in item.read(columns=names).to_pylist())))
        for item in (chain.shards[source], chain.pairs[source])
    )
    assert shards == pairs


def test_files_are_blocks_and_each_is_sorted_by_leaf(chain):
    shards = chain.shards["big"]
    parts = shards.parts()
    sizes = [part.num_rows for part in parts]
    assert (
        sizes[:-1] == [chain.configs.shard.block_rows] * (len(sizes) - 1)
        and sum(sizes) == chain.pairs["big"].num_rows
    )
    for part in parts:
        rows = shards.open_parquet(part).read(columns=["source", "leaf"]).to_pylist()
        keys = [(row["source"], row["leaf"]) for row in rows]
        assert keys == sorted(keys)


@pytest.mark.parametrize("source", ["big", "half"])
def test_assignment_is_the_largest_inner_product_with_the_sources_own_leaves(chain, source):
    table = chain.embeddings[source].read()
    matrix = vectors(table["passage_embedding"]).astype(np.float64)
    leaves = (matrix @ leaf_centroids(chain.centroids[source]).astype(np.float64).T).argmax(axis=1)
    expected = dict(zip(table["pair_id"].to_pylist(), leaves.tolist(), strict=True))
    found = chain.shards[source].read(columns=["pair_id", "leaf"]).to_pylist()
    assert {row["pair_id"]: row["leaf"] for row in found} == expected


def test_tokens_are_the_tokenizers_with_prompts_cut_to_length(chain):
    shards = chain.shards["big"]
    tokenizer = load_tokenizer(Shards([shards]))
    texts = {row["pair_id"]: row for row in chain.pairs["big"].read().to_pylist()}
    cut = {"query": 0, "passage": 0}
    for row in shards.read().to_pylist():
        for side, prompt, limit in (("query", "query: ", 8), ("passage", "passage: ", 12)):
            whole = tokenizer(prompt + texts[row["pair_id"]][side])["input_ids"]
            expected = tokenizer(
                prompt + texts[row["pair_id"]][side], truncation=True, max_length=limit
            )["input_ids"]
            assert row[f"{side}_tokens"] == expected
            cut[side] += len(whole) > limit
    assert shards.stats["num_truncated"] == cut
    assert sum(cut.values()) > 0


def test_index_and_trees_of_all_sources_are_all_a_plan_needs(chain):
    shards = Shards(list(chain.shards.values()))
    index = shards.index
    assert index.num_rows == sum(artifact.num_rows for artifact in shards.artifacts)
    assert index.sources == ["big", "half"]
    files, rows = index.locate(np.arange(index.num_rows))
    pieces = [
        artifact.open_parquet(part).read(columns=["source", "leaf"]).to_pylist()
        for artifact, part in shards.files
    ]
    keys = [
        (pieces[file][row]["source"], pieces[file][row]["leaf"])
        for file, row in zip(files, rows, strict=True)
    ]
    assert keys == sorted(keys)
