import itertools

import numpy as np
import pytest

import pipelines.cluster as stages
from clusterlib.artifacts.artifact import Part
from clusterlib.artifacts.config import validate
from clusterlib.artifacts.tables import vectors
from clusterlib.clusters import kmeans
from clusterlib.clusters.tree import from_table
from clusterlib.errors import StrataError
from pipelines.cluster import ClusterConfig, centroids_spec, sample
from pipelines.stage import find_or_make


def source_vectors(chain, source):
    table = chain.embeddings[source].read()
    matrix = vectors(table["passage_embedding"]).astype(np.float32)
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def fit(chain, source, **changes):
    """The centroids of a source with other settings."""
    config = chain.configs.cluster.replace(**changes)
    spec = centroids_spec(config, chain.specs.embeddings[source])
    return find_or_make(stages.STAGE, [spec], chain.root)[0]


def test_every_source_has_a_tree_with_unit_centroids(chain):
    found = {}
    for source, centroids in chain.centroids.items():
        table = centroids.read()
        ((name, tree),) = from_table(table).items()
        assert name == centroids.label == source
        found[source] = tree.num_leaves
        np.testing.assert_allclose(np.linalg.norm(vectors(table["centroid"]), axis=1), 1, atol=1e-5)
    assert found == {"big": 6, "half": 3}


def test_a_small_source_gets_fewer_leaves_and_the_manifest_says_so(chain):
    big, half = (chain.centroids[source].stats for source in ("big", "half"))
    assert (big["num_leaves"], big["num_leaves_asked"]) == (6, 6)
    assert (half["num_leaves"], half["num_leaves_asked"]) == (half["num_pairs"] // 20, 6)


def test_node_centroids_are_the_mean_directions_of_their_pairs(chain):
    found = source_vectors(chain, "big")
    nodes = chain.centroids["big"].read().to_pylist()
    leaves = np.array([row["centroid"] for row in nodes if row["left"] is None], np.float32)
    nearest, _ = kmeans.assign(found, leaves)
    for row in nodes:
        members = found[
            (nearest >= row["first_leaf"]) & (nearest < row["first_leaf"] + row["num_leaves"])
        ]
        assert row["num_pairs"] == len(members)
        mean = members.sum(axis=0)
        assert float(mean @ np.array(row["centroid"]) / np.linalg.norm(mean)) > 0.995


def test_leaves_are_one_k_means_fit_of_all_pairs(chain):
    found = source_vectors(chain, "big")
    reference = kmeans.fit(found, 6, 5, seed=0)
    nodes = [row for row in chain.centroids["big"].read().to_pylist() if row["left"] is None]
    leaves = np.array([row["centroid"] for row in nodes], np.float32)
    similarity = kmeans.assign(found, leaves)[1]
    assert similarity.mean() == pytest.approx(
        chain.centroids["big"].stats["mean_similarity"], rel=1e-4
    )
    assert similarity.sum() >= 0.99 * kmeans.assign(found, reference.centroids)[1].sum()


def test_a_sample_has_about_the_size_asked_and_repeats(chain):
    config = chain.configs.cluster
    first = sample(chain.embeddings["big"], 80, config)
    assert 50 < len(first) < 110
    np.testing.assert_array_equal(first, sample(chain.embeddings["big"], 80, config))
    assert len(sample(chain.embeddings["big"], 160, config)) == 160
    other = sample(chain.embeddings["big"], 80, config.replace(seed=1))
    assert len(other) != len(first) or not np.array_equal(first, other)


def test_both_sides_cluster_in_twice_the_width(chain):
    made = fit(chain, "big", field="both")
    assert vectors(made.read()["centroid"]).shape[1] == 64


def test_more_leaves_than_any_source_can_fill_are_refused(chain):
    def wanted(**changes):
        config = chain.configs.cluster.replace(**changes)
        return [centroids_spec(config, spec) for spec in chain.specs.embeddings.values()]

    with pytest.raises(
        StrataError,
        match=r"num_leaves=9 is too large for every source: the largest, big, has 160 pairs and "
        r"fits 8",
    ):
        find_or_make(stages.STAGE, wanted(num_leaves=9), chain.root)
    find_or_make(stages.STAGE, wanted(num_leaves=8), chain.root)


def test_a_fit_beyond_any_nodes_memory_is_refused_with_the_number_that_fits(chain, monkeypatch):
    """Room for 60 of the 160 vectors of 32 dimensions, held twice in float32, at 6 leaves."""
    monkeypatch.setattr(stages, "largest_node_bytes", lambda: 60 * 2 * 4 * 32)
    with pytest.raises(
        StrataError, match=r"points_per_centroid=500: the fit of big takes .* set at most 10"
    ):
        fit(chain, "big", points_per_centroid=500)
    fit(chain, "big", points_per_centroid=10)


def test_fits_of_other_seeds_are_compared_and_the_tightest_is_kept(chain):
    found = source_vectors(chain, "big")
    config = chain.configs.cluster.replace(num_fits=3, num_leaves=4)
    fits = [kmeans.fit(found, 4, config.num_iterations, seed) for seed in range(3)]
    assigned = [kmeans.assign(found, fit.centroids) for fit in fits]
    stats = fit(chain, "big", num_fits=3, num_leaves=4).stats
    assert stats["mean_similarity"] == pytest.approx(
        max(similarity.mean() for _, similarity in assigned), rel=1e-3
    )
    expected = [
        adjusted_rand(first[0], second[0]) for first, second in itertools.combinations(assigned, 2)
    ]
    assert stats["agreement"] == pytest.approx(np.mean(expected), abs=0.05)


def adjusted_rand(first, second):
    """From all pairs of points: Hubert & Arabie 1985, eq. 5."""
    same_first, same_second = first[:, None] == first, second[:, None] == second
    upper = np.triu_indices(len(first), 1)
    both, one, other = (
        pairs[upper].sum() for pairs in (same_first & same_second, same_first, same_second)
    )
    expected = one * other / len(upper[0])
    return (both - expected) / ((one + other) / 2 - expected)


@pytest.mark.parametrize("gpus", [0, 1])
def test_the_device_of_a_fit_follows_the_resources_asked_for(chain, monkeypatch, gpus):
    """FAISS would take any GPU it sees, and Ray shows them all."""
    asked = []
    whole = kmeans.fit
    monkeypatch.setattr(kmeans, "fit", lambda *settings, gpu: asked.append(gpu) or whole(*settings))
    config = chain.configs.cluster.replace(gpus_per_worker=gpus)
    stages._fit(stages._Fit(config, chain.embeddings["big"]), _Paper())
    assert asked == [bool(gpus)] * 2


def test_the_largest_seed_fits_and_a_larger_one_is_refused(chain):
    seed = 2**31 - 1
    settings = chain.configs.cluster.model_dump()
    with pytest.raises(
        StrataError, match=r"seed: .* less than or equal to 2147483647 \(got 2147483648\)"
    ):
        validate(ClusterConfig, {**settings, "seed": seed + 1}, "recipe")
    config = validate(ClusterConfig, {**settings, "seed": seed}, "recipe")
    receipt = stages._fit(stages._Fit(config, chain.embeddings["big"]), _Paper())
    assert receipt.stats["num_leaves"] == 6


class _Paper:
    """A draft that keeps nothing."""

    def write(self, table, part_id, schema, groups):
        return Part(table, part_id, sum(group.num_rows for group in groups), 0, "")
