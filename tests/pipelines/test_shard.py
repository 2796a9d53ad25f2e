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
from clusterlib.clusters.shards import Shards
from clusterlib.errors import StrataError
from pipelines.held_out import held_out
from pipelines.retrieval_tests import RetrievalTestConfig, TaskConfig
from pipelines.shard import STAGE, _Worker, leaf_centroids, shards_spec
from pipelines.stage import find_or_make
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
        rows = shards.read_part(part, ["source", "leaf"]).to_pylist()
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
        artifact.read_part(part, ["source", "leaf"]).to_pylist() for artifact, part in shards.files
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
    texts = chain.pairs["big"].read().to_pylist()
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
    embeddings, centroids = chain.embeddings["big"], chain.centroids["big"]
    spec = shards_spec(chain.configs.shard, [test], chain.specs.centroids["big"])
    draft = Draft(Root(str(tmp_path_factory.mktemp("root"))), spec)
    kept_out = ray.put(held_out([test]))
    worker = _Worker(chain.configs.shard, embeddings, centroids, draft, kept_out)
    made = draft.publish([worker(work) for work in enumerate(embeddings.blocks(70))])

    pairs = {(row["source"], row["pair_id"]): row for row in texts}
    left = made.read(columns=["source", "pair_id"]).to_pylist()
    expected = {
        key for key, row in pairs.items() if row["query"] not in held and row["passage"] not in held
    }
    assert sorted(tuple(row.values()) for row in left) == sorted(expected)
    rejects = made.read("rejects").to_pylist() if made.parts("rejects") else []
    assert made.num_rows + len(rejects) == made.manifest["num_rows_in"] == len(texts)
    assert sum(made.manifest["rejects"].values()) == len(rejects)
    rows = {
        part.path: embeddings.read_part(part, ["source", "pair_id"]) for part in embeddings.parts()
    }
    refused = [rows[row["file"]].slice(row["row"], 1).to_pylist()[0] for row in rejects]
    assert {tuple(row.values()) for row in refused} == set(pairs) - expected
    assert [row["source"] for row in refused] == [row["source"] for row in rejects]


def shard_without(chain, source, tests):
    """A source's shards without what tests hold out, beside those of the chain."""
    spec = shards_spec(chain.configs.shard, tests, chain.specs.centroids[source])
    return find_or_make(STAGE, [spec], chain.root)[0]


def test_a_passage_that_is_a_tests_text_without_its_title_is_caught(chain, as_test):
    row = chain.pairs["big"].read().to_pylist()[7]
    test = as_test([("Some title", row["passage"], False)], ["a query that no pair has"])
    made = shard_without(chain, "big", [test])
    assert row["passage_id"] not in made.read()["passage_id"].to_pylist()
    assert made.num_rows == 160 - sum(made.manifest["rejects"].values())
    assert set(made.manifest["rejects"]) == {"equals a passage of the test t"}
    assert {row["file"].split("/")[0] for row in made.read("rejects").to_pylist()} == {"embeddings"}
    assert shard_without(chain, "big", [test.replace(name="renamed")]) == made


def test_a_source_that_is_held_out_whole_fills_no_batch(chain, as_test):
    texts = chain.pairs["half"].read().to_pylist()
    tests = [as_test([("", row["passage"], True) for row in texts], ["q"])]
    made = {source: shard_without(chain, source, tests) for source in ("big", "half")}
    assert made["half"].num_rows == 0 and made["big"].num_rows == 160 - len(texts)
    index = Shards(list(made.values())).index
    assert index.num_rows == made["big"].num_rows
    for strategy in ("random", "source", "cluster", "topic"):
        plan = Plan(index, BatchingConfig(strategy=strategy, global_batch_size=8, k=3))
        steps = plan.num_steps(1)
        rows = np.concatenate([plan.step(step, steps).rows for step in range(steps)])
        assert len(rows) == 8 * steps > 0 and rows.max() < index.num_rows
    with pytest.raises(StrataError, match="no pair is left to train on: all are held out"):
        _ = Shards([made["half"]]).index


def test_a_task_whose_data_cannot_be_had_ends_in_one_message(chain):
    task = TaskConfig(name="NanoMSMARCORetrieval")
    with pytest.raises(StrataError, match="hold_out: none"):
        shard_without(chain, "big", [task])
    assert shard_without(chain, "big", [task.replace(hold_out="none")]).num_rows == 160
