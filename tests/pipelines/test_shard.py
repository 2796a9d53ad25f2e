import json

import numpy as np
import pytest
import ray
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clusterlib.artifacts.artifact import Root
from clusterlib.artifacts.draft import Draft
from clusterlib.artifacts.tables import vectors
from clusterlib.batches.plan import BatchingConfig, Plan
from clusterlib.clusters.tree import from_table
from clusterlib.errors import StrataError
from pipelines.held_out import held_out
from pipelines.retrieval_tests import RetrievalTestConfig, TaskConfig
from pipelines.shard import _Worker, leaf_centroids, shard, shards_spec
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
        rows = chain.shards.open_parquet(part).read(columns=["source", "leaf"]).to_pylist()
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
        chain.shards.open_parquet(part).read(columns=["source", "leaf"]).to_pylist()
        for part in chain.shards.parts()
    ]
    keys = [
        (pieces[file][row]["source"], pieces[file][row]["leaf"])
        for file, row in zip(files, rows, strict=True)
    ]
    assert keys == sorted(keys)


@pytest.fixture
def as_test(tmp_path):
    """Makes a retrieval test of (title, text, whether judged) and queries."""

    def write(passages, queries, **changes):
        (tmp_path / "qrels").mkdir(exist_ok=True)
        corpus = [
            {"_id": f"p{number}", "title": title, "text": text}
            for number, (title, text, _) in enumerate([*passages, ("", "no pair has it", True)])
        ]
        asked = [{"_id": f"q{number}", "text": text} for number, text in enumerate(queries)]
        for name, rows in (("corpus", corpus), ("queries", asked)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        judged = [number for number, (*_, found) in enumerate(passages) if found]
        lines = [
            f"q{query}\tp{passage}\t1\n"
            for query in range(len(queries))
            for passage in [*judged, len(passages)]
        ]
        header = "query-id\tcorpus-id\tscore\n"
        (tmp_path / "qrels" / "test.tsv").write_text(header + "".join(lines))
        settings = {"name": "t", "format": "beir", "path": str(tmp_path), **changes}
        return RetrievalTestConfig(**settings)

    return write


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.sampled_from(["corpus", "judged", "none"]),
    st.lists(st.tuples(st.integers(0, 159), st.booleans(), st.booleans()), max_size=40),
    st.lists(st.integers(0, 159), min_size=1, max_size=40),
)
def test_no_row_of_a_shard_is_held_out_and_none_is_lost(
    chain, as_test, tmp_path_factory, policy, passages, queries
):
    """Against a set of texts; pairs are told by the number that ends both of their texts."""
    texts = chain.pairs.read().to_pylist()
    test = as_test(
        [("A title" * titled, texts[row]["passage"], judged) for row, titled, judged in passages],
        [texts[row]["query"].upper() for row in queries],
        hold_out=policy,
    )
    held = {texts[row]["query"] for row in queries} if policy != "none" else set()
    held |= {
        texts[row]["passage"]
        for row, _, judged in passages
        if policy == "corpus" or (policy == "judged" and judged)
    }
    fingerprints = (chain.embeddings.fingerprint, chain.centroids.fingerprint)
    spec = shards_spec(chain.configs.shard, [test], *fingerprints)
    draft = Draft(Root(str(tmp_path_factory.mktemp("root"))), spec)
    worker = _Worker(
        chain.configs.shard, chain.embeddings, chain.centroids, draft, ray.put(held_out([test]))
    )
    made = draft.publish([worker(work) for work in enumerate(chain.embeddings.blocks(70))])

    pairs = {(row["source"], row["pair_id"]): row for row in texts}
    left = made.read(columns=["source", "pair_id"]).to_pylist()
    expected = {
        key for key, row in pairs.items() if row["query"] not in held and row["passage"] not in held
    }
    assert sorted(tuple(row.values()) for row in left) == sorted(expected)
    rejects = made.read("rejects").to_pylist() if made.parts("rejects") else []
    assert made.num_rows + len(rejects) == made.manifest["num_rows_in"] == chain.pairs.num_rows
    assert sum(made.manifest["rejects"].values()) == len(rejects)
    rows = {
        part.path: chain.embeddings.open_parquet(part).read(columns=["source", "pair_id"])
        for part in chain.embeddings.parts()
    }
    refused = [rows[row["file"]].slice(row["row"], 1).to_pylist()[0] for row in rejects]
    assert {tuple(row.values()) for row in refused} == set(pairs) - expected
    assert [row["source"] for row in refused] == [row["source"] for row in rejects]


def test_a_passage_that_is_a_tests_text_without_its_title_is_caught(chain, as_test, tmp_path):
    row = chain.pairs.read().to_pylist()[7]
    test = as_test([("Some title", row["passage"], False)], ["a query that no pair has"])
    made = shard(
        chain.configs.shard, [test], chain.embeddings, chain.centroids, Root(str(tmp_path))
    )
    assert row["passage_id"] not in made.read()["passage_id"].to_pylist()
    assert made.num_rows == chain.pairs.num_rows - sum(made.manifest["rejects"].values())
    assert set(made.manifest["rejects"]) == {"equals a passage of the test t"}
    assert {row["file"].split("/")[0] for row in made.read("rejects").to_pylist()} == {"embeddings"}
    again = test.replace(name="renamed")
    root = Root(str(tmp_path))
    assert shard(chain.configs.shard, [again], chain.embeddings, chain.centroids, root) == made


def test_a_source_that_is_held_out_whole_fills_no_batch(chain, as_test, tmp_path):
    texts = chain.pairs.read().to_pylist()
    passages = [("", row["passage"], True) for row in texts if row["source"] == "half"]
    made = shard(
        chain.configs.shard,
        [as_test(passages, ["q"])],
        chain.embeddings,
        chain.centroids,
        Root(str(tmp_path)),
    )
    assert set(made.stats["num_rows_by_source"]) == {"big"}
    index = shard_index(made)
    assert index.num_rows == made.num_rows
    for strategy in ("random", "source", "cluster", "topic"):
        plan = Plan(index, BatchingConfig(strategy=strategy, global_batch_size=8, k=3))
        steps = plan.num_steps(1)
        rows = np.concatenate([plan.step(step, steps).rows for step in range(steps)])
        assert len(rows) == 8 * steps > 0 and rows.max() < made.num_rows


def test_shards_without_a_pair_are_refused(chain, as_test, tmp_path):
    test = as_test([("", row["passage"], True) for row in chain.pairs.read().to_pylist()], ["q"])
    with pytest.raises(StrataError, match="no pair is left to train on: all are held out"):
        shard(chain.configs.shard, [test], chain.embeddings, chain.centroids, Root(str(tmp_path)))


def test_a_task_whose_data_cannot_be_had_ends_in_one_message(chain, tmp_path):
    task = TaskConfig(name="NanoMSMARCORetrieval")
    arguments = (chain.embeddings, chain.centroids, Root(str(tmp_path)))
    with pytest.raises(StrataError, match="hold_out: none"):
        shard(chain.configs.shard, [task], *arguments)
    made = shard(chain.configs.shard, [task.replace(hold_out="none")], *arguments)
    assert made.num_rows == chain.pairs.num_rows
