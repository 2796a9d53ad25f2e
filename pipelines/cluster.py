"""cluster: `embeddings` -> `centroids`, spherical k-means and the merge tree of every source."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from clusterlib.artifacts.artifact import Artifact, Root, Spec
from clusterlib.artifacts.config import Config, runtime
from clusterlib.artifacts.draft import Draft, Receipt
from clusterlib.artifacts.tables import centroids_schema, fixed_size_list
from clusterlib.batches.permutation import mix
from clusterlib.clusters import kmeans, tree
from clusterlib.clusters.diagnostics import agreement, imbalance
from clusterlib.errors import StrataError
from pipelines.stage import Task, Workers, largest_node_bytes, make

_LAST_SEED = 2**31 - 1  # FAISS takes an int32


class ClusterConfig(Config):
    """Spherical k-means of each source's pairs."""

    num_leaves: int = Field(
        ..., ge=1, description="clusters per source; batching.k may ask for any number up to it"
    )
    field: kmeans.ClusterField = Field(
        "passage", description="cluster pairs by their query, passage or both vectors"
    )
    points_per_centroid: int = Field(
        2000,
        ge=1,
        description="size of the sample a fit sees, per leaf; see pipelines/recipes/RESULTS.md for "
        "what it buys",
    )
    min_pairs_per_leaf: int = Field(
        39,
        ge=1,
        description="a source with fewer gets fewer leaves; FAISS warns below 39 points per "
        "centroid",
    )
    num_iterations: int = Field(20, ge=1)
    num_fits: int = Field(
        2,
        ge=1,
        description="fits of each source, from different seeds; the tightest is kept, and how well "
        "they agree is in "
        "the manifest",
    )
    seed: int = Field(0, ge=0, le=_LAST_SEED)

    cpus_per_worker: float = runtime(1, gt=0)
    gpus_per_worker: float = runtime(0, ge=0, description="needs faiss-gpu; 0 stays on the CPU")


def centroids_spec(config: ClusterConfig, embeddings: str) -> Spec:
    """What the centroids are made from; `embeddings` is a fingerprint."""
    return Spec("centroids", 1, {"cluster": config}, {"embeddings": embeddings})


def cluster(config: ClusterConfig, embeddings: Artifact, root: Root) -> Artifact:
    """Fit every source into the `centroids` artifact: one row for each node of its tree, leaves
    first.

    A source with too few pairs gets fewer leaves, and the manifest's stats say how many.

    Raises:
        StrataError: no source is large enough for `num_leaves`.
    """
    spec = centroids_spec(config, embeddings.fingerprint)
    draft = Draft(root, spec)
    made = draft.find()
    if made is not None:
        return made
    counts = {
        source: count for source, count in embeddings.stats["num_rows_by_source"].items() if count
    }
    largest = max(counts, key=lambda source: counts[source])
    most = max(1, counts[largest] // config.min_pairs_per_leaf)
    if config.num_leaves > most:
        raise StrataError(
            f"cluster.num_leaves={config.num_leaves} is too large for every source: the largest, "
            f"{largest}, has {counts[largest]} pairs and fits {most} leaves of "
            f"{config.min_pairs_per_leaf} or more; set at most {most}"
        )
    tasks = [Task(source, (source, count), source) for source, count in counts.items()]
    memory_bytes = _check_memory(config, embeddings.stats["width"], counts)
    workers = Workers(
        num_cpus=config.cpus_per_worker, num_gpus=config.gpus_per_worker, memory_bytes=memory_bytes
    )

    def publish(receipts: list[Receipt]) -> Artifact:
        # A fit reads pairs and makes nodes, which are other things: rows in = rows out holds for
        # neither.
        fits = {task.id: receipt.stats for task, receipt in zip(tasks, receipts, strict=True)}
        return draft.publish(receipts, {"fits": fits, "width": embeddings.stats["width"]})

    return make(
        draft,
        "cluster",
        tasks,
        functools.partial(_Worker, config, embeddings, draft),
        workers,
        publish,
    )


def _check_memory(config: ClusterConfig, width: int, counts: Mapping[str, int]) -> int:
    """Bytes that the largest source's fit takes: its sample twice, as read and put together.

    Raises:
        StrataError: no node of the Ray cluster has as much.
    """
    row_bytes = 2 * 4 * width * len(kmeans.columns(config.field))
    needs = {
        source: min(count, config.num_leaves * config.points_per_centroid)
        for source, count in counts.items()
    }
    source = max(needs, key=lambda source: needs[source])
    room = largest_node_bytes()
    if needs[source] * row_bytes > room:
        fitting = int(room // row_bytes // config.num_leaves)
        raise StrataError(
            f"cluster.points_per_centroid={config.points_per_centroid}: the fit of {source} takes "
            f"{needs[source] * row_bytes / 2**30:.1f} GiB and the largest node has "
            f"{room / 2**30:.1f} GiB; set at most {fitting}"
        )
    return needs[source] * row_bytes


class _Worker:
    def __init__(self, config: ClusterConfig, embeddings: Artifact, draft: Draft) -> None:
        self._config = config
        self._embeddings = embeddings
        self._draft = draft

    def __call__(self, work: tuple[str, int]) -> Receipt:
        source, num_pairs = work
        config = self._config
        num_leaves = max(1, min(config.num_leaves, num_pairs // config.min_pairs_per_leaf))
        vectors = sample(
            self._embeddings, source, num_pairs, num_leaves * config.points_per_centroid, config
        )
        num_leaves = min(num_leaves, len(vectors))
        fits = [
            kmeans.fit(
                vectors,
                num_leaves,
                config.num_iterations,
                seed & _LAST_SEED,
                gpu=config.gpus_per_worker > 0,
            )
            for seed in range(config.seed, config.seed + config.num_fits)
        ]
        assigned = [kmeans.assign(vectors, fit.centroids) for fit in fits]
        best = max(range(len(fits)), key=lambda number: float(assigned[number][1].sum()))
        fit, (nearest, similarity) = fits[best], assigned[best]
        sizes = np.bincount(nearest, minlength=num_leaves)
        # The mean of a leaf's unit vectors points along its centroid and is as long as their mean
        # similarity.
        lengths = np.bincount(nearest, similarity, minlength=num_leaves) / np.maximum(sizes, 1)
        merges, order = tree.build(fit.centroids * lengths[:, None], np.maximum(sizes, 1))
        table = _nodes(source, merges, fit.centroids[order], (lengths * sizes)[order], sizes[order])
        part = self._draft.write(
            "centroids", source, centroids_schema(fit.centroids.shape[1]), [table]
        )
        stats = {
            "num_pairs": num_pairs,
            "num_sampled": len(vectors),
            "num_leaves": num_leaves,
            "num_leaves_asked": config.num_leaves,
            "mean_similarity": float(similarity.mean()),
            "objective_by_iteration": [value / len(vectors) for value in fit.objective],
            "agreement": agreement([labels for labels, _ in assigned]),
            "imbalance": imbalance(sizes),
            "num_empty_leaves": int((sizes == 0).sum()),
        }
        return Receipt([part], table.num_rows, stats=stats)


def _nodes(
    source: str, merges: tree.Tree, centroids: np.ndarray, weights: np.ndarray, sizes: np.ndarray
) -> pa.Table:
    """The tree with the unit mean vector of each node."""
    nodes = merges.to_table(source, sizes.tolist())
    sums = centroids * weights[:, None]
    first, count = nodes["first_leaf"].to_numpy(), nodes["num_leaves"].to_numpy()
    means = np.stack(
        [sums[start : start + size].sum(axis=0) for start, size in zip(first, count, strict=True)]
    )
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    # Leaf centroids are what rows are assigned to: keep FAISS's own bits.
    means[: len(centroids)] = centroids
    return nodes.append_column("centroid", fixed_size_list(means.astype(np.float32)))


def sample(
    embeddings: Artifact, source: str, num_pairs: int, size: int, config: ClusterConfig
) -> np.ndarray:
    """About `size` of a source's vectors, float32 [n, D]; all of them when it has no more.

    A pair is taken by the hash of its id and the seed, so the sample depends on neither the blocks
    nor their order, and is in the order of the input.
    """
    threshold = (
        np.uint64(min(size / num_pairs, 1) * (2**64 - 1))
        if size < num_pairs
        else np.uint64(2**64 - 1)
    )
    chosen = []
    for table in of_source(embeddings, source, kmeans.columns(config.field)):
        keys = mix(table["pair_id"].to_numpy() + np.uint64(config.seed))
        chosen.append(kmeans.field_vectors(table.filter(pa.array(keys <= threshold)), config.field))
    return np.concatenate(chosen)


def of_source(embeddings: Artifact, source: str, columns: list[str]) -> Iterator[pa.Table]:
    """A source's rows, a row group at a time; row groups of other sources are not read."""
    for part in embeddings.parts():
        with embeddings.open_part(part) as file:
            place = file.schema_arrow.get_field_index("source")
            for group in range(file.num_row_groups):
                statistics: Any = file.metadata.row_group(group).column(place).statistics
                if statistics is not None and not statistics.min <= source <= statistics.max:
                    continue
                table = file.read_row_group(group, columns=["pair_id", "source", *columns])
                yield table.filter(pc.equal(table["source"], source))
