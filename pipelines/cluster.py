"""cluster: `embeddings` -> `centroids`, spherical k-means and the merge tree of every source."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from clusterlib.artifacts.artifact import Artifact, Root, Spec
from clusterlib.artifacts.config import Config, runtime
from clusterlib.artifacts.draft import Draft, Receipt
from clusterlib.artifacts.tables import centroids_schema, fixed_size_list
from clusterlib.batches.permutation import mix
from clusterlib.clusters import kmeans, tree
from clusterlib.clusters.diagnostics import agreement, imbalance
from clusterlib.errors import StrataError
from pipelines.stage import Stage
from pipelines.tasks import Job, Task, Workers, largest_node_bytes, make

if TYPE_CHECKING:
    from pipelines.run import Arm

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
    num_iterations: int = Field(
        20, ge=1, description="rounds of assignment and new centroids in a fit"
    )
    num_fits: int = Field(
        2,
        ge=1,
        description="fits of each source, from different seeds; the tightest is kept, and how well "
        "they agree is in "
        "the manifest",
    )
    seed: int = Field(
        0, ge=0, le=_LAST_SEED, description="of the sample and of the first fit's initial centroids"
    )

    cpus_per_worker: float = runtime(
        1, gt=0, description="logical CPUs that the fit of a source takes"
    )
    gpus_per_worker: float = runtime(0, ge=0, description="needs faiss-gpu; 0 stays on the CPU")


class Cluster(Stage):
    """A source's tree: one row for each of its nodes, leaves first."""

    kind = "centroids"

    def specs(self, arm: Arm) -> dict[str, Spec]:
        return {
            source: centroids_spec(arm.sources[source].cluster, embeddings)
            for source, embeddings in arm.specs("embeddings").items()
        }

    def check(self, specs: Sequence[Spec], root: Root) -> None:
        """Refuse a number of leaves that no source is large enough for.

        Raises:
            StrataError: it is too large for every source.
        """
        fits = [_Fit.of(spec, root) for spec in specs]
        largest = max(fits, key=lambda fit: fit.embeddings.num_rows)
        if all(fit.num_leaves < fit.config.num_leaves for fit in fits):
            raise StrataError(
                f"cluster.num_leaves={largest.config.num_leaves} is too large for every source: "
                f"the largest, {largest.embeddings.label}, has {largest.embeddings.num_rows} pairs "
                f"and fits {largest.num_leaves} leaves of {largest.config.min_pairs_per_leaf} or "
                f"more; set at most {largest.num_leaves}"
            )

    def make(self, specs: Sequence[Spec], root: Root) -> None:
        """Fit each source by itself, side by side.

        A source with too few pairs gets fewer leaves, and the manifest's stats say how many.

        Raises:
            StrataError: a fit takes more memory than any node has.
        """
        fits = [_Fit.of(spec, root) for spec in specs]
        first = fits[0].config  # how many processors a fit takes is no source's own
        memory_bytes = max(fit.memory_bytes for fit in fits)
        _check_memory(max(fits, key=lambda fit: fit.memory_bytes))
        workers = Workers(
            num_cpus=first.cpus_per_worker,
            num_gpus=first.gpus_per_worker,
            memory_bytes=memory_bytes,
        )
        jobs = [_job(fit, Draft(root, spec)) for fit, spec in zip(fits, specs, strict=True)]
        make("cluster", jobs, workers)


STAGE = Cluster()


def centroids_spec(config: ClusterConfig, embeddings: Spec) -> Spec:
    """What a source's centroids are made from."""
    return Spec(
        "centroids", 1, {"cluster": config}, {"embeddings": embeddings}, label=embeddings.label
    )


@dataclass(frozen=True)
class _Fit:
    """What is asked of the fit of one source."""

    config: ClusterConfig
    embeddings: Artifact

    @staticmethod
    def of(spec: Spec, root: Root) -> _Fit:
        return _Fit(spec.config["cluster"], root.open(spec.inputs["embeddings"]))

    @property
    def num_leaves(self) -> int:
        most = self.embeddings.num_rows // self.config.min_pairs_per_leaf
        return max(1, min(self.config.num_leaves, most))

    @property
    def row_bytes(self) -> int:
        """A pair of the sample takes these twice, as read and put together."""
        return 2 * 4 * int(self.embeddings.stats["width"]) * len(kmeans.columns(self.config.field))

    @property
    def memory_bytes(self) -> int:
        most = self.num_leaves * self.config.points_per_centroid
        return self.row_bytes * min(self.embeddings.num_rows, most)


def _check_memory(fit: _Fit) -> None:
    """Raise StrataError where no node of the Ray cluster has the memory of the largest fit."""
    room = largest_node_bytes()
    if fit.memory_bytes > room:
        fitting = int(room // fit.row_bytes // fit.num_leaves)
        raise StrataError(
            f"cluster.points_per_centroid={fit.config.points_per_centroid}: the fit of "
            f"{fit.embeddings.label} takes {fit.memory_bytes / 2**30:.1f} GiB and the largest node "
            f"has {room / 2**30:.1f} GiB; set at most {fitting}"
        )


def _job(fit: _Fit, draft: Draft) -> Job:
    source = fit.embeddings.label

    def publish(receipts: list[Receipt]) -> Artifact:
        return draft.publish(receipts, receipts[0].stats)

    worker = functools.partial(_worker, fit, draft)
    return Job(draft, [Task("fit", fit.embeddings.num_rows, source)], worker, publish)


def _worker(fit: _Fit, draft: Draft) -> Callable[[Any], Receipt]:
    return lambda _: _fit(fit, draft)


def _fit(asked: _Fit, draft: Draft) -> Receipt:
    """A fit reads pairs and makes nodes, which are other things: rows in = rows out holds for
    neither.
    """
    config, embeddings = asked.config, asked.embeddings
    vectors = sample(embeddings, asked.num_leaves * config.points_per_centroid, config)
    num_leaves = min(asked.num_leaves, len(vectors))
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
    table = _nodes(
        embeddings.label, merges, fit.centroids[order], (lengths * sizes)[order], sizes[order]
    )
    part = draft.write("centroids", "fit", centroids_schema(fit.centroids.shape[1]), [table])
    stats = {
        "width": embeddings.stats["width"],
        "num_pairs": embeddings.num_rows,
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


def sample(embeddings: Artifact, size: int, config: ClusterConfig) -> np.ndarray:
    """About `size` of a source's vectors, float32 [n, D]; all of them when it has no more.

    A pair is taken by the hash of its id and the seed, so the sample depends on neither the blocks
    nor their order, and is in the order of the input.
    """
    last = 2**64 - 1
    if size < embeddings.num_rows:
        last = int(size / embeddings.num_rows * last)
    chosen = []
    for table in embeddings.row_groups(["pair_id", *kmeans.columns(config.field)]):
        keys = mix(table["pair_id"].to_numpy() + np.uint64(config.seed))
        taken = table.filter(pa.array(keys <= np.uint64(last)))
        chosen.append(kmeans.field_vectors(taken, config.field))
    return np.concatenate(chosen)
