import faiss
import numpy as np
import pyarrow as pa
import pytest

from clusterlib.artifacts.tables import fixed_size_list
from clusterlib.clusters import kmeans
from clusterlib.errors import StrataError


def unit(generator, *shape):
    vectors = generator.standard_normal(shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def blobs():
    """3,000 unit vectors around 12 directions of 32 dimensions."""
    generator = np.random.default_rng(0)
    vectors = unit(generator, 12, 32).repeat(250, axis=0) + 0.15 * generator.standard_normal(
        (3000, 32)
    )
    vectors = vectors[generator.permutation(3000)].astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_assignment_is_the_largest_inner_product(blobs, dtype, monkeypatch):
    centroids = unit(np.random.default_rng(1), 37, 32)
    vectors = blobs.astype(dtype)
    scores = vectors.astype(np.float64) @ centroids.astype(np.float64).T
    monkeypatch.setattr(kmeans, "_ASSIGN_SCORES", 37 * 100)  # many blocks
    nearest, similarity = kmeans.assign(vectors, centroids)
    assert nearest.dtype == np.int32
    np.testing.assert_array_equal(nearest, scores.argmax(axis=1))
    np.testing.assert_allclose(similarity, scores.max(axis=1), atol=1e-5)


def test_fit_is_as_tight_as_faiss_on_every_point(blobs):
    fit = kmeans.fit(blobs, 12, 20, seed=3)
    reference = faiss.Kmeans(
        32, 12, niter=20, seed=5, spherical=True, nredo=3, max_points_per_centroid=10_000
    )
    reference.train(blobs)
    objective = kmeans.assign(blobs, fit.centroids)[1].sum()
    assert objective >= 0.99 * kmeans.assign(blobs, reference.centroids)[1].sum()
    np.testing.assert_allclose(np.linalg.norm(fit.centroids, axis=1), 1, atol=1e-5)
    assert len(fit.objective) <= 20 and fit.objective[-1] >= fit.objective[0]


def test_fit_uses_all_points_and_repeats(blobs):
    """FAISS's own limit of 256 points per centroid would leave 3,000 - 512 points out."""
    first, second = kmeans.fit(blobs, 2, 10, seed=0), kmeans.fit(blobs, 2, 10, seed=0)
    np.testing.assert_array_equal(first.centroids, second.centroids)
    # The objective is a sum over the points used: with all of them it matches what assignment
    # finds.
    assert first.objective[-1] == pytest.approx(
        kmeans.assign(blobs, first.centroids)[1].sum(), rel=0.01
    )


def test_more_clusters_than_points_is_refused():
    with pytest.raises(StrataError, match="k=5 is larger than the 4 vectors"):
        kmeans.fit(unit(np.random.default_rng(0), 4, 8), 5, 5, 0)


def test_a_gpu_is_taken_when_asked_for_and_only_then(blobs, monkeypatch):
    seen = []
    train = faiss.Kmeans
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    monkeypatch.setattr(
        faiss,
        "Kmeans",
        lambda *shape, gpu, **settings: seen.append(gpu) or train(*shape, gpu=False, **settings),
    )
    kmeans.fit(blobs, 2, 1, seed=0)
    kmeans.fit(blobs, 2, 1, seed=0, gpu=True)
    assert seen == [False, True]


def test_a_gpu_that_faiss_cannot_use_is_one_message(blobs, monkeypatch):
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0, raising=False)
    with pytest.raises(
        StrataError, match=r"cluster.gpus_per_worker .* no GPU that FAISS can use.*strata\[gpu\]"
    ):
        kmeans.fit(blobs, 2, 1, seed=0, gpu=True)


def test_field_vectors_of_both_sides_are_one_unit_vector():
    generator = np.random.default_rng(0)
    query, passage = (unit(generator, 7, 8).astype(np.float16) for _ in range(2))
    table = pa.table(
        {"query_embedding": fixed_size_list(query), "passage_embedding": fixed_size_list(passage)}
    )
    both = kmeans.field_vectors(table, "both")
    np.testing.assert_allclose(np.linalg.norm(both, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(
        both * np.sqrt(2), np.concatenate([query, passage], axis=1), atol=2e-3
    )
    np.testing.assert_allclose(kmeans.field_vectors(table, "query"), query, atol=1e-3)
    assert kmeans.columns("both") == ["query_embedding", "passage_embedding"]
