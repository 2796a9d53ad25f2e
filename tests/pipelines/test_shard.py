import numpy as np

from clusterlib.artifacts.tables import vectors
from clusterlib.clusters.tree import from_table
from pipelines.shard import leaf_centroids
from train.data import load_tokenizer, shard_index


def test_every_pair_is_in_one_shard_with_its_ids(chain):
    names = ["pair_id", "source", "query_id", "passage_id"]
    shards, pairs = (
        sorted(map(tuple, (row.values() for row in item.read(columns=names).to_pylist())))
        for item in (chain.shards, chain.pairs)
    )
    assert shards == pairs


def test_files_are_blocks_and_each_is_sorted_by_leaf(chain):
    parts = chain.shards.parts()
    sizes = [part.num_rows for part in parts]
    assert (
        sizes[:-1] == [chain.configs.shard.block_rows] * (len(sizes) - 1)
        and sum(sizes) == chain.pairs.num_rows
    )
    for part in parts:
        rows = chain.shards.read_part(part, ["source", "leaf"]).to_pylist()
        keys = [(row["source"], row["leaf"]) for row in rows]
        assert keys == sorted(keys)


def test_assignment_is_the_largest_inner_product_with_the_sources_own_leaves(chain):
    table = chain.embeddings.read()
    matrix = vectors(table["passage_embedding"]).astype(np.float64)
    centroids = leaf_centroids(chain.centroids)
    expected = {
        (row["source"], row["pair_id"]): int(
            (centroids[row["source"]].astype(np.float64) @ matrix[number]).argmax()
        )
        for number, row in enumerate(table.select(["source", "pair_id"]).to_pylist())
    }
    found = chain.shards.read(columns=["source", "pair_id", "leaf"]).to_pylist()
    assert {(row["source"], row["pair_id"]): row["leaf"] for row in found} == expected


def test_tokens_are_the_tokenizers_with_prompts_cut_to_length(chain):
    tokenizer = load_tokenizer(chain.shards)
    texts = {row["pair_id"]: row for row in chain.pairs.read().to_pylist()}
    cut = {"query": 0, "passage": 0}
    for row in chain.shards.read().to_pylist():
        for side, prompt, limit in (("query", "query: ", 8), ("passage", "passage: ", 12)):
            whole = tokenizer(prompt + texts[row["pair_id"]][side])["input_ids"]
            expected = tokenizer(
                prompt + texts[row["pair_id"]][side], truncation=True, max_length=limit
            )["input_ids"]
            assert row[f"{side}_tokens"] == expected
            cut[side] += len(whole) > limit
    assert chain.shards.stats["num_truncated"] == cut
    assert sum(cut.values()) > 0


def test_index_and_tree_are_all_a_plan_needs(chain):
    index = shard_index(chain.shards)
    assert index.num_rows == chain.shards.num_rows
    assert set(index.trees) == set(from_table(chain.centroids.read()))
    files, rows = index.locate(np.arange(index.num_rows))
    pieces = [
        chain.shards.read_part(part, ["source", "leaf"]).to_pylist()
        for part in chain.shards.parts()
    ]
    keys = [
        (pieces[file][row]["source"], pieces[file][row]["leaf"])
        for file, row in zip(files, rows, strict=True)
    ]
    assert keys == sorted(keys)
