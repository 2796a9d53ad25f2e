"""Spherical k-means of 200,000 real vectors: our fit against faiss.Kmeans, sklearn's KMeans and
MiniBatchKMeans.

All see the same points, seeds and number of iterations. Inertia is the mean over all points of 1 -
similarity to the unit centroid. The second table says what the size of the sample buys
(cluster.points_per_centroid).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import command
import faiss
import numpy as np
from sklearn.cluster import KMeans, MiniBatchKMeans

from clusterlib.clusters import kmeans

ITERATIONS = 20
SOURCE = "law_ca"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="of our side and FAISS's, in turn; medians are compared",
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument(
        "--ks",
        type=int,
        nargs=2,
        default=[10, 1000],
        help="KMeans, which is slow, runs at the first",
    )
    parser.add_argument("--sample-ks", type=int, nargs="+", default=[10, 32])
    parser.add_argument("--samples", type=int, nargs="+", default=[50, 100, 256, 500, 1000, 2000])
    parser.add_argument(
        "--seeds", type=int, default=8, help="of the fits on samples; their mean is shown"
    )
    arguments = command.parse(
        parser, rounds=1, rows=400, ks=[4, 50], sample_ks=[4], samples=[10, 50], seeds=1
    )
    data = command.data(arguments)
    points = np.concatenate([data.vectors(source, "query", 32) for source in data.sources()])
    points = points[np.random.default_rng(0).permutation(len(points))[: arguments.rows]]
    print(f"{len(points):,} x {points.shape[1]}, {ITERATIONS} iterations")
    print(f"{'k':>5} {'side':<26} {'seconds':>8} {'inertia':>8}")
    worst = 0.0
    for k, others in zip(
        arguments.ks, ((KMeans, MiniBatchKMeans), (MiniBatchKMeans,)), strict=True
    ):
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(arguments.rounds * max(1, 50 // k)):  # a short fit's time scatters more
            theirs.append(timed(by_faiss, points, k)[0])
            ours.append(timed(by_us, points, k)[0])
        worst = max(worst, float(np.median(ours) / np.median(theirs)))
        show(k, "ours", float(np.median(ours)), points, by_us(points, k))
        show(k, "faiss.Kmeans", float(np.median(theirs)), points, by_faiss(points, k))
        for other in others:
            seconds, centroids = timed(by_sklearn, points, k, other)
            show(k, f"sklearn {other.__name__}", seconds, points, centroids)
    sample_sizes(
        data.vectors(SOURCE, "query", 32), arguments.sample_ks, arguments.samples, arguments.seeds
    )
    print(f"RESULT bench_kmeans ratio={worst:.3f}")


def sample_sizes(points: np.ndarray, ks: Sequence[int], samples: Sequence[int], seeds: int) -> None:
    """What a fit on a sample loses on all points of one source, as fits are by source."""
    points = points[np.random.default_rng(0).permutation(len(points))]
    print(
        f"\n{SOURCE}, {len(points):,} points: inertia by points per centroid over a fit on all; "
        f"mean of {seeds} seeds"
    )
    print(f"{'k':>5} {'all':>8} " + " ".join(f"{size:>7}" for size in samples))
    for k in ks:
        whole = np.mean(
            [
                inertia(points, kmeans.fit(points, k, ITERATIONS, seed).centroids)
                for seed in range(seeds)
            ]
        )
        losses = []
        for size in samples:
            starts = np.linspace(0, len(points) - size * k, seeds).astype(int)
            fits = [
                kmeans.fit(points[start : start + size * k], k, ITERATIONS, seed)
                for seed, start in enumerate(starts)
            ]
            losses.append(np.mean([inertia(points, fit.centroids) for fit in fits]) / whole - 1)
        print(f"{k:>5} {whole:>8.4f} " + " ".join(f"{loss:>+7.2%}" for loss in losses), flush=True)


def by_us(points: np.ndarray, k: int) -> np.ndarray:
    return kmeans.fit(points, k, ITERATIONS, seed=0).centroids


def by_faiss(points: np.ndarray, k: int) -> np.ndarray:
    other = faiss.Kmeans(
        points.shape[1],
        k,
        niter=ITERATIONS,
        seed=0,
        spherical=True,
        max_points_per_centroid=len(points),
    )
    other.train(points)
    return np.asarray(other.centroids)


def by_sklearn(points: np.ndarray, k: int, estimator: type) -> np.ndarray:
    found = estimator(k, n_init=1, max_iter=ITERATIONS, random_state=0).fit(points).cluster_centers_
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def timed(work: Callable[..., np.ndarray], *arguments: object) -> tuple[float, np.ndarray]:
    started = time.perf_counter()
    result = work(*arguments)
    return time.perf_counter() - started, result


def inertia(points: np.ndarray, centroids: np.ndarray) -> float:
    return float(1 - kmeans.assign(points, centroids)[1].mean())


def show(k: int, side: str, seconds: float, points: np.ndarray, centroids: np.ndarray) -> None:
    print(f"{k:>5} {side:<26} {seconds:>8.2f} {inertia(points, centroids):>8.4f}", flush=True)


if __name__ == "__main__":
    main()
