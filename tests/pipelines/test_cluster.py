import numpy as np
import pytest

from clusterlib import kmeans
from clusterlib.errors import StrataError
from clusterlib.tables import vectors
from clusterlib.tree import from_table
from pipelines.cluster import cluster, of_source, sample


def source_vectors(chain, source):
    table = chain.embeddings.read()
    rows = np.array([name == source for name in table["source"].to_pylist()])
    matrix = vectors(table["passage_embedding"])[rows].astype(np.float32)
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def test_every_source_has_a_tree_with_unit_centroids(chain):
    table = chain.centroids.read()
    trees = from_table(table)
    assert {source: tree.num_leaves for source, tree in trees.items()} == {"big": 6, "half": 3}
    np.testing.assert_allclose(np.linalg.norm(vectors(table["centroid"]), axis=1), 1, atol=1e-5)


def test_a_small_source_gets_fewer_leaves_and_the_manifest_says_so(chain):
    fits = chain.centroids.stats["fits"]
    assert (fits["big"]["num_leaves"], fits["big"]["num_leaves_asked"]) == (6, 6)
    assert (fits["half"]["num_leaves"], fits["half"]["num_leaves_asked"]) == (fits["half"]["num_pairs"] // 20, 6)


def test_node_centroids_are_the_mean_directions_of_their_pairs(chain):
    found = source_vectors(chain, "big")
    nodes = [row for row in chain.centroids.read().to_pylist() if row["source"] == "big"]
    leaves = np.array([row["centroid"] for row in nodes if row["left"] is None], np.float32)
    nearest, _ = kmeans.assign(found, leaves)
    for row in nodes:
        members = found[(nearest >= row["first_leaf"]) & (nearest < row["first_leaf"] + row["num_leaves"])]
        assert row["num_pairs"] == len(members)
        mean = members.sum(axis=0)
        assert float(mean @ np.array(row["centroid"]) / np.linalg.norm(mean)) > 0.995


def test_leaves_are_one_k_means_fit_of_all_pairs(chain):
    found = source_vectors(chain, "big")
    reference = kmeans.fit(found, 6, 5, seed=0)
    nodes = [row for row in chain.centroids.read().to_pylist() if row["source"] == "big" and row["left"] is None]
    leaves = np.array([row["centroid"] for row in nodes], np.float32)
    similarity = kmeans.assign(found, leaves)[1]
    assert similarity.mean() == pytest.approx(chain.centroids.stats["fits"]["big"]["mean_similarity"], rel=1e-4)
    assert similarity.sum() >= 0.99 * kmeans.assign(found, reference.centroids)[1].sum()


def test_a_sample_has_about_the_size_asked_and_repeats(chain):
    config = chain.configs.cluster
    first = sample(chain.embeddings, "big", 160, 80, config)
    assert 50 < len(first) < 110
    np.testing.assert_array_equal(first, sample(chain.embeddings, "big", 160, 80, config))
    assert len(sample(chain.embeddings, "big", 160, 160, config)) == 160
    other = sample(chain.embeddings, "big", 160, 80, config.replace(seed=1))
    assert len(other) != len(first) or not np.array_equal(first, other)


def test_rows_of_a_source_are_all_its_rows(chain):
    assert sum(table.num_rows for table in of_source(chain.embeddings, "big", ["query"])) == 160


def test_both_sides_cluster_in_twice_the_width(chain):
    made = cluster(chain.configs.cluster.replace(field="both"), chain.embeddings, chain.root)
    assert vectors(made.read()["centroid"]).shape[1] == 64


def test_more_leaves_than_any_source_can_fill_are_refused(chain):
    with pytest.raises(
        StrataError, match=r"num_leaves=9 is too large for every source: the largest, big, has 160 pairs and fits 8"
    ):
        cluster(chain.configs.cluster.replace(num_leaves=9), chain.embeddings, chain.root)
