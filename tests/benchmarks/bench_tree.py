"""One tree for every k: the inertia of `cut(k)` of a fit with many leaves, against flat k-means
with that k.

Inertia is the sum over points of 1 - similarity to the unit mean of the point's cluster. The flat
side is FAISS's spherical k-means on the same points, the best of as many seeds as the leaves are
fitted with.
"""

from __future__ import annotations

import argparse

import command
import numpy as np

from clusterlib.clusters import kmeans, tree
from clusterlib.clusters.diagnostics import imbalance

ITERATIONS = 20
SEEDS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", nargs="+", default=["law_ca", "cpp_docs", "squad"])
    parser.add_argument("--rows", type=int, default=10_000, help="passages of each source")
    parser.add_argument("--leaves", type=int, default=200)
    parser.add_argument("--cuts", type=int, nargs="+", default=[5, 10, 20, 50, 100, 200])
    arguments = command.parse(parser, sources=["made up"], rows=300, leaves=20, cuts=[5, 10])
    print(
        f"{arguments.leaves} leaves, {arguments.rows:,} passages of each source, all-MiniLM-L6-v2"
    )
    print(
        f"{'source':<10} {'k':>4} {'flat':>9} {'tree':>9} {'ratio':>7} {'imbalance':>10} "
        f"{'of the tree':>12}"
    )
    worst = 0.0
    for source in arguments.sources:
        points = command.data(arguments).vectors(source, "passage", 64, arguments.rows)
        leaves = best_fit(points, arguments.leaves)
        sizes = np.bincount(leaves, minlength=arguments.leaves)
        means = np.stack([points[leaves == leaf].mean(axis=0) for leaf in range(arguments.leaves)])
        merges, order = tree.build(means, sizes)
        place = np.argsort(order)[leaves]
        for k in arguments.cuts:
            flat = best_fit(points, k)
            starts = [node.first_leaf for node in merges.cut(k)]
            cut = np.searchsorted(starts, place, side="right") - 1
            values = inertia(points, flat), inertia(points, cut)
            ratio = values[1] / values[0]
            worst = max(worst, ratio)
            print(
                f"{source:<10} {k:>4} {values[0]:>9.1f} {values[1]:>9.1f} {ratio:>7.4f} "
                f"{imbalance(np.bincount(flat)):>10.2f} {imbalance(np.bincount(cut)):>12.2f}",
                flush=True,
            )
    print(f"RESULT bench_tree ratio={worst:.4f}")


def best_fit(points: np.ndarray, k: int) -> np.ndarray:
    """Cluster of each point, from the tightest of SEEDS fits."""
    fits = [kmeans.fit(points, k, ITERATIONS, seed) for seed in range(SEEDS)]
    return max(
        (kmeans.assign(points, fit.centroids) for fit in fits),
        key=lambda found: float(found[1].sum()),
    )[0]


def inertia(points: np.ndarray, clusters: np.ndarray) -> float:
    sums = np.zeros((clusters.max() + 1, points.shape[1]))
    np.add.at(sums, clusters, points)
    return float(len(points) - np.linalg.norm(sums, axis=1).sum())


if __name__ == "__main__":
    main()
