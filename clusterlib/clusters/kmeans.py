"""Spherical k-means: fit with FAISS on a sample, assign by the largest inner product."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from clusterlib.artifacts.tables import vectors as to_matrix
from clusterlib.errors import StrataError

ClusterField = Literal["query", "passage", "both"]

_ASSIGN_SCORES = 2**24  # similarities held at once by `assign`: 64 MiB of float32


@dataclass(frozen=True)
class Fit:
    """Result of `fit`.

    Attributes:
        centroids: float32 [k, D], unit norm.
        objective: sum over the sample of the similarity to the nearest centroid, after each
            iteration.
    """

    centroids: np.ndarray
    objective: list[float]


def columns(field: ClusterField) -> list[str]:
    """The embedding columns that a clustering by `field` reads."""
    sides = ("query", "passage") if field == "both" else (field,)
    return [f"{side}_embedding" for side in sides]


def field_vectors(table: pa.Table, field: ClusterField) -> np.ndarray:
    """What is clustered: one side's unit vectors, or both sides' put end to end and renormalised.

    Returns:
        float32 [rows, D], or [rows, 2 D] for both; unit norm.
    """
    matrix = np.concatenate(
        [to_matrix(table[name]) for name in columns(field)], axis=1, dtype=np.float32
    )
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    return matrix


def fit(vectors: np.ndarray, k: int, num_iterations: int, seed: int, gpu: bool = False) -> Fit:
    """Spherical k-means of all of `vectors` (Dhillon & Modha 2001, doi:10.1023/A:1007612920971), by
    FAISS.

    Args:
        vectors: float32 [n, D], unit norm, n >= k.
        gpu: whether to use the GPUs that this process sees; they are left alone otherwise.

    Raises:
        StrataError: k is larger than n, FAISS can use no GPU though one is asked for, or both
            faiss-cpu and faiss-gpu are installed.
    """
    faiss = _faiss()
    if gpu and not getattr(faiss, "get_num_gpus", int)():
        raise StrataError(
            f"cluster.gpus_per_worker is more than 0, and this worker's node, {platform.node()}, "
            "has no GPU that FAISS can use; install 'strata[gpu]' there in a fresh environment, or "
            "set it to 0"
        )
    num_vectors, width = vectors.shape
    if k > num_vectors:
        raise StrataError(
            f"k={k} is larger than the {num_vectors} vectors to cluster; set at most {num_vectors}"
        )
    # FAISS would take 256 points per centroid and drop the rest; the sample was drawn on purpose,
    # so use all of it. The limit counts only when it is given to the constructor.
    # https://github.com/facebookresearch/faiss/issues/1196
    kmeans = faiss.Kmeans(
        width,
        k,
        niter=num_iterations,
        seed=seed,
        spherical=True,
        gpu=gpu,
        min_points_per_centroid=1,
        max_points_per_centroid=-(-num_vectors // k),
    )
    kmeans.train(vectors)
    return Fit(kmeans.centroids, [float(value) for value in kmeans.obj])


def assign(vectors: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest centroid of each vector by inner product; the first one where several are equally
    near.

    Args:
        vectors: float16 or float32 [n, D].
        centroids: float32 [k, D].

    Returns:
        Index of the centroid, int32 [n], and the similarity to it, float32 [n].
    """
    nearest = np.empty(len(vectors), np.int32)
    similarity = np.empty(len(vectors), np.float32)
    block = max(1, _ASSIGN_SCORES // len(centroids))
    for start in range(0, len(vectors), block):
        scores = vectors[start : start + block].astype(np.float32, copy=False) @ centroids.T
        nearest[start : start + block] = scores.argmax(axis=1)
        similarity[start : start + block] = scores.max(axis=1)
    return nearest, similarity


def _faiss() -> Any:
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("faiss-cpu", "faiss-gpu"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    if len(found) != 1:
        raise StrataError(
            f"{' and '.join(found) or 'no FAISS'} installed: both own the same folder, so install "
            "exactly one, with pip install 'strata[cpu]' or 'strata[gpu]' in a fresh environment"
        )
    import faiss

    return faiss
