import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import cut_tree
from scipy.cluster.hierarchy import ward as scipy_ward

from clusterlib.clusters import kmeans
from clusterlib.clusters.tree import Tree, build, from_table, ward


def partition(labels):
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)}


def cut_partition(tree, order, k):
    """The clusters of a cut as sets of the leaves' old numbers."""
    return {
        frozenset(order[node.first_leaf : node.first_leaf + node.num_leaves].tolist())
        for node in tree.cut(k)
    }


def greedy_ward(means, sizes):
    """Reference: join the cheapest pair by trying all pairs; yields the partition at each k."""
    clusters = [
        ([leaf], mean, size) for leaf, (mean, size) in enumerate(zip(means, sizes, strict=True))
    ]
    while True:
        yield len(clusters), {frozenset(members) for members, _, _ in clusters}
        if len(clusters) == 1:
            return
        costs = {
            (i, j): clusters[i][2] * clusters[j][2] / (clusters[i][2] + clusters[j][2])
            * float(((clusters[i][1] - clusters[j][1]) ** 2).sum())
            for i in range(len(clusters))
            for j in range(i)
        }  # fmt: skip
        i, j = min(costs, key=lambda pair: costs[pair])
        (a, mean_a, n), (b, mean_b, m) = clusters[i], clusters[j]
        merged = (a + b, (n * mean_a + m * mean_b) / (n + m), n + m)
        clusters = [cluster for place, cluster in enumerate(clusters) if place not in (i, j)] + [
            merged
        ]


def test_equal_sizes_give_scipys_ward_tree():
    means = np.random.default_rng(0).standard_normal((200, 8))  # several blocks of them
    tree, order = ward(means, np.ones(200))
    reference = scipy_ward(means)
    for k in range(1, 201):
        assert cut_partition(tree, order, k) == partition(cut_tree(reference, n_clusters=k).ravel())


def test_sizes_weigh_as_in_the_greedy_definition():
    generator = np.random.default_rng(1)
    means, sizes = generator.standard_normal((25, 4)), generator.integers(1, 100, 25)
    tree, order = ward(means, sizes)
    for k, expected in greedy_ward(means, sizes):
        assert cut_partition(tree, order, k) == expected


def test_equal_leaves_come_together_first():
    """Empty leaves are all equal, whatever their number."""
    means = np.concatenate([np.zeros((150, 4)), np.random.default_rng(0).standard_normal((50, 4))])
    tree, order = ward(means, np.ones(200))
    assert frozenset(range(150)) in cut_partition(tree, order, 51)


def test_refined_cuts_are_tighter_than_wards_and_near_the_flat_ones():
    """Points of 30 blurred directions in 64 leaves; similarity of each to its cluster's
    direction.
    """
    generator = np.random.default_rng(0)
    points = generator.standard_normal((30, 16))[
        generator.integers(0, 30, 6000)
    ] + generator.standard_normal((6000, 16))
    points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
    leaves = kmeans.assign(points, kmeans.fit(points, 64, 10, 0).centroids)[0]
    sizes = np.bincount(leaves)
    means = np.stack([points[leaves == leaf].mean(axis=0) for leaf in range(64)])

    def inertia(tree, order, k):
        sums = means[order] * sizes[order, None]
        clusters = [
            sums[node.first_leaf : node.first_leaf + node.num_leaves].sum(axis=0)
            for node in tree.cut(k)
        ]
        return len(points) - sum(np.linalg.norm(total) for total in clusters)

    for k in (4, 16):
        refined = inertia(*build(means, sizes), k)
        flat = len(points) - kmeans.assign(points, kmeans.fit(points, k, 20, 0).centroids)[1].sum()
        assert refined < inertia(*ward(means, sizes), k)
        assert refined < 1.06 * flat


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 10_000), st.booleans())
def test_cuts_have_k_clusters_and_are_nested(num_leaves, seed, ties):
    generator = np.random.default_rng(seed)
    means = (
        generator.integers(0, 3, (num_leaves, 2))
        if ties
        else generator.standard_normal((num_leaves, 2))
    )
    tree, order = build(means.astype(float), generator.integers(1, 9, num_leaves))
    assert sorted(order.tolist()) == list(range(num_leaves))
    finer: set[int] = set()
    for k in range(num_leaves, 0, -1):
        nodes = tree.cut(k)
        assert len(nodes) == k
        edges = [node.first_leaf for node in nodes]
        assert edges[0] == 0
        assert [node.first_leaf + node.num_leaves for node in nodes] == [*edges[1:], num_leaves]
        assert (
            not finer or set(edges) <= finer
        )  # every edge of a coarser cut is one of the finer cut
        finer = set(edges)
    with pytest.raises(ValueError, match="has no cut"):
        tree.cut(num_leaves + 1)
    with pytest.raises(ValueError, match="has no cut"):
        tree.cut(0)


@pytest.mark.parametrize("k", [1, 4, 9])
def test_merges_above_a_cut_join_its_clusters_into_one(k):
    tree, _ = build(np.random.default_rng(2).standard_normal((9, 3)), np.ones(9))
    pools = {node.id: {node.first_leaf} for node in tree.cut(k)}
    for left, right, joined in tree.merges_above(k):
        pools[joined] = pools.pop(left) | pools.pop(right)
    assert len(pools) == 1


def test_trees_survive_a_table():
    trees = {}
    tables = []
    for source, num_leaves in (("b", 7), ("a", 1)):
        trees[source] = build(
            np.random.default_rng(3).standard_normal((num_leaves, 3)), np.ones(num_leaves)
        )[0]
        tables.append(trees[source].to_table(source, [2] * num_leaves))
    import pyarrow as pa

    table = pa.concat_tables(tables)
    assert table.filter(pa.compute.equal(table["node"], 12))["num_pairs"].to_pylist() == [14]
    for source, tree in from_table(table).items():
        assert isinstance(tree, Tree) and tree.num_leaves == trees[source].num_leaves
        np.testing.assert_array_equal(tree.children, trees[source].children)
