import time
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterlib.errors import StrataError
from clusterlib.plan import BatchingConfig, Plan, permute
from clusterlib.shards import ShardIndex
from clusterlib.tables import INDEX
from clusterlib.tree import build


def make_index(sizes):
    """An index over one file; `sizes` is source -> rows of each leaf."""
    rows, trees, first = [], {}, 0
    for source, leaf_sizes in sorted(sizes.items()):
        generator = np.random.default_rng(len(leaf_sizes))
        trees[source] = build(generator.standard_normal((len(leaf_sizes), 4)), np.ones(len(leaf_sizes)))[0]
        for leaf, count in enumerate(leaf_sizes):
            if count:
                rows.append(dict(zip(INDEX.names, (source, leaf, 0, 0, first, count), strict=True)))
                first += count
    return ShardIndex(pa.Table.from_pylist(rows, schema=INDEX), trees)


def owners(index):
    """(source, leaf) of every row in leaf order."""
    found = []
    for source in index.sources:
        for leaf, count in enumerate(np.diff(index.leaf_starts[source])):
            found += [(source, leaf)] * int(count)
    return found


SIZES = {"a": [130, 7, 64, 33, 0, 90], "b": [50, 50], "c": [10]}


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3000), st.lists(st.integers(0, 2**40), min_size=1, max_size=3))
def test_permutation_is_one_and_every_entry_is_had_alone(size, key):
    whole = permute(np.arange(size), size, key)
    assert sorted(whole.tolist()) == list(range(size))
    some = np.random.default_rng(0).integers(0, size, 5)
    np.testing.assert_array_equal(permute(some, size, key), whole[some])


def test_permutation_looks_random_and_depends_on_its_key():
    first, second = permute(np.arange(10_000), 10_000, (1, 2)), permute(np.arange(10_000), 10_000, (1, 3))
    assert abs(np.corrcoef(first, np.arange(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert abs((first == np.arange(10_000)).sum() - 1) < 8  # a random permutation has one fixed point
    # A billion rows: no table is made.
    assert len(set(permute(np.arange(1000), 10**9, (0,)).tolist())) == 1000


@settings(max_examples=120, deadline=None)
@given(
    sizes=st.dictionaries(
        st.sampled_from("abc"), st.lists(st.integers(0, 70), min_size=1, max_size=9), min_size=1, max_size=3
    ),
    size=st.integers(2, 40),
    strategy=st.sampled_from(["random", "source", "cluster"]),
    leftover=st.sampled_from(["drop", "merge", "source"]),
    k=st.integers(1, 12),
    seed=st.integers(0, 5),
)
def test_purity_coverage_and_determinism(sizes, size, strategy, leftover, k, seed):
    index = make_index(sizes)
    k = min(k, max(len(leaves) for leaves in sizes.values()))
    config = BatchingConfig(strategy=strategy, global_batch_size=size, leftover=leftover, k=k, seed=seed)
    try:
        plan = Plan(index, config)
    except StrataError as error:
        assert "no stratum fills a batch" in str(error)
        return
    owner = owners(index)
    cluster_of = {}
    for source in index.sources:
        for number, node in enumerate(index.trees[source].cut(min(k, index.trees[source].num_leaves))):
            for leaf in range(node.first_leaf, node.first_leaf + node.num_leaves):
                cluster_of[source, leaf] = number
    seen = []
    num_pure = 0
    for number in range(plan.num_batches):
        batch = plan.batch(3, number)
        assert len(batch.rows) == size
        found = {owner[row] for row in batch.rows}
        clusters = {(source, cluster_of[source, leaf]) for source, leaf in found}
        if strategy != "random":
            assert len({source for source, _ in found}) == 1
        if strategy == "cluster":
            assert {plan.strata[s].name for s in batch.strata} == {f"{source}/{c}" for source, c in clusters}
            num_pure += len(clusters) == 1
            if leftover == "drop":
                assert len(clusters) == 1
        seen += batch.rows.tolist()
    assert len(seen) == len(set(seen)) == plan.num_planned_rows <= plan.num_rows == len(owner)
    if strategy == "cluster":
        assert num_pure == plan.num_pure_batches
        counts = {}
        for source, leaf in owner:
            stratum = (source, cluster_of[source, leaf])
            counts[stratum] = counts.get(stratum, 0) + 1
        if leftover == "drop":
            assert plan.num_planned_rows == sum(count // size * size for count in counts.values())
        else:  # pooled per source, by either policy, less than one batch a source is lost
            per_source = {source: sum(n for (s, _), n in counts.items() if s == source) for source in index.sources}
            assert plan.num_planned_rows == sum(count // size * size for count in per_source.values())
    again = Plan(make_index(sizes), config)
    some = plan.num_batches // 2
    np.testing.assert_array_equal(plan.batch(3, some).rows, again.batch(3, some).rows)


def test_epochs_and_seeds_differ_and_steps_run_through_epochs():
    plan = Plan(make_index(SIZES), BatchingConfig(global_batch_size=16))
    other = Plan(make_index(SIZES), BatchingConfig(global_batch_size=16, seed=1))
    assert set(plan.batch(0, 0).rows.tolist()) != set(plan.batch(1, 0).rows.tolist())
    assert set(plan.batch(0, 0).rows.tolist()) != set(other.batch(0, 0).rows.tolist())
    np.testing.assert_array_equal(plan.step(plan.num_batches + 2).rows, plan.batch(1, 2).rows)
    with pytest.raises(IndexError):
        plan.batch(0, plan.num_batches)


def test_dropped_rows_change_every_epoch():
    plan = Plan(make_index({"a": [100]}), BatchingConfig(global_batch_size=64, leftover="drop"))
    seen = {row for epoch in range(12) for row in plan.batch(epoch, 0).rows.tolist()}
    assert len(seen) == 100


def test_k_joins_leaves_along_the_tree():
    index = make_index(SIZES)
    for k, expected in ((1, 3), (2, 5), (None, 9), (6, 9)):  # c has one leaf, b two, a six
        assert len(Plan(index, BatchingConfig(global_batch_size=2, k=k)).strata) == expected


def test_merged_batches_join_neighbours_first():
    """With four equal rests, the two nearest clusters fill a batch together before a third is asked."""
    index = make_index({"a": [8, 8, 8, 8]})
    plan = Plan(index, BatchingConfig(global_batch_size=16, leftover="merge"))
    tree = index.trees["a"]
    left, right, _ = next(tree.merges_above(4))
    assert {left, right} in [set(plan.batch(0, number).strata) for number in range(plan.num_batches)]
    assert plan.num_batches == 2 and plan.num_pure_batches == 0


def test_a_batch_larger_than_every_stratum_is_refused_with_the_largest():
    with pytest.raises(StrataError, match=r"global_batch_size=200: no stratum.*a/0 with 130 rows.*merge \(it is drop"):
        Plan(make_index(SIZES), BatchingConfig(global_batch_size=200, leftover="drop"))


def test_k_above_the_leaves_is_refused():
    with pytest.raises(StrataError, match=r"batching\.k=7 is larger than the 6 leaves"):
        Plan(make_index(SIZES), BatchingConfig(global_batch_size=8, k=7))


def test_a_plan_costs_memory_and_time_in_strata_not_rows():
    tracemalloc.start()
    plan = Plan(make_index({"a": [100_000_000] * 10}), BatchingConfig(global_batch_size=4096))
    plan.batch(0, 0)
    started = time.perf_counter()
    assert plan.batch(5, plan.num_batches - 1).rows.max() < 10**9
    assert time.perf_counter() - started < 1  # not a speed test: a scan of a billion rows would take far longer
    assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    tracemalloc.stop()
