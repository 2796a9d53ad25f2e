"""Strategies: what a batch is filled with, from loose to tight.

The negatives of a query are the other passages of its batch, so what fills a batch says how hard
they are. Random batches and mined negatives are the ends of one axis:

    random      any pairs; most negatives are of other sources, and easy
    source      pairs of one source, so that none is told by its style (arXiv 2405.05374)
    topic       pairs of several clusters of one source (TAS-B, arXiv 2104.06967)
    cluster     pairs of one cluster (arXiv 2407.18887); the larger k, the tighter
    neighbors   pairs beside those that are hardest for them (ANCE, arXiv 2007.00808)

The tighter, the more negatives are false: train.loss masks them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from clusterlib.artifacts.config import Config
from clusterlib.batches.blocks import LEFTOVERS, LeftoverName, Strata, Stratum
from clusterlib.batches.neighbors import NeighborsConfig
from clusterlib.clusters.shards import ShardIndex


def undivided(index: ShardIndex, k: int | None) -> Strata:
    """All sources as one stratum."""
    return {"all": [Stratum("all", 0, index.num_rows)]}


def by_source(index: ShardIndex, k: int | None) -> Strata:
    """Each source as one stratum."""
    return {
        source: [Stratum(source, int(starts[0]), int(starts[-1] - starts[0]))]
        for source, starts in index.leaf_starts.items()
    }


def by_cluster(index: ShardIndex, k: int | None) -> Strata:
    """The k clusters of each source; all its leaves by default, or if it has fewer (being too small
    for more).
    """
    strata = {}
    for source, starts in index.leaf_starts.items():
        tree = index.trees[source]
        nodes = tree.cut(min(k or tree.num_leaves, tree.num_leaves))
        edges = [*starts[[node.first_leaf for node in nodes]].tolist(), int(starts[-1])]
        strata[source] = [
            Stratum(f"{source}/{place}", first, stop - first)
            for place, (first, stop) in enumerate(itertools.pairwise(edges))
        ]
    return strata


@dataclass(frozen=True)
class BatchShape:
    """A batch is `num_blocks` blocks of `block_rows` rows. Room that is left is for their
    neighbors, where these are mined, and then for rows of the source drawn at random.
    """

    num_blocks: int
    block_rows: int


def one_block(config: FillConfig) -> BatchShape:
    """The batch is one block."""
    return BatchShape(1, config.global_batch_size)


def equal_parts(config: FillConfig) -> BatchShape:
    """The batch is `clusters_per_batch` blocks."""
    num_rows, rest = divmod(config.global_batch_size, config.clusters_per_batch)
    if rest:
        raise ValueError(
            f"clusters_per_batch={config.clusters_per_batch} does not divide "
            f"global_batch_size={config.global_batch_size}; a topic batch has equal parts"
        )
    return BatchShape(config.clusters_per_batch, num_rows)


def seeds(config: FillConfig) -> BatchShape:
    """One block, each row of which brings `neighbors.per_seed` others."""
    group = 1 + config.neighbors.per_seed
    num_seeds, rest = divmod(config.global_batch_size, group)
    if rest:
        raise ValueError(
            f"neighbors.per_seed={config.neighbors.per_seed} makes groups of {group} pairs, "
            f"which do not divide global_batch_size={config.global_batch_size}"
        )
    return BatchShape(1, num_seeds)


@dataclass(frozen=True)
class Strategy:
    """A way to fill batches. Whoever needs to know about it asks it, none asks for its name.

    Attributes:
        description: what a batch is, for people.
        strata: index, k -> the strata of each source, in leaf order. A block is of one of them,
            leftovers apart, and a batch of one source.
        shape: the shape of a batch; raises ValueError where the settings allow none.
        uses: settings that not every strategy reads, and this one does.
        mixes_sources: whether a batch is of all sources, so that none can have a weight.
        mines: whether blocks bring neighbors, mined in the k clusters of each source; with the
            teacher's vectors at first, so shards must carry them.
    """

    description: str
    strata: Callable[[ShardIndex, int | None], Strata]
    shape: Callable[[FillConfig], BatchShape] = one_block
    uses: tuple[str, ...] = ()
    mixes_sources: bool = False
    mines: bool = False


STRATEGIES = {
    "random": Strategy("all sources mixed", undivided, mixes_sources=True),
    "source": Strategy("one source a batch", by_source),
    "cluster": Strategy(
        "one cluster of one source a batch (arXiv 2407.18887)", by_cluster, uses=("k", "leftover")
    ),
    "topic": Strategy(
        "equal parts of several clusters of one source, drawn at random (TAS-B, arXiv 2104.06967)",
        by_cluster,
        equal_parts,
        uses=("k", "leftover", "clusters_per_batch"),
    ),
    "neighbors": Strategy(
        "pairs of one source, drawn at random, each with mined neighbors of its cluster (see "
        "clusterlib.batches.neighbors)",
        by_source,
        seeds,
        uses=("k", "neighbors"),
        mines=True,
    ),
}

if TYPE_CHECKING:
    StrategyName = str
else:
    StrategyName = Literal[tuple(STRATEGIES)]


class FillConfig(Config):
    """What fills a batch.

    >>> config = FillConfig(strategy="topic", global_batch_size=32, clusters_per_batch=4)
    >>> STRATEGIES[config.strategy].shape(config)
    BatchShape(num_blocks=4, block_rows=8)
    """

    strategy: StrategyName = Field(
        "cluster",
        description="; ".join(f"{name}: {each.description}" for name, each in STRATEGIES.items()),
    )
    k: int | None = Field(
        None,
        ge=1,
        description="clusters per source, up to cluster.num_leaves; by default every leaf is one",
    )
    global_batch_size: int = Field(..., ge=2, description="pairs a step, over all ranks")
    clusters_per_batch: int = Field(
        4, ge=2, description="parts of a batch of strategy topic, each of one cluster"
    )
    neighbors: NeighborsConfig = Field(
        NeighborsConfig(), description="what strategy neighbors mines, and how it draws from that"
    )
    leftover: LeftoverName = Field(
        "merge",
        description="what becomes of the rows of a cluster that fill no batch (with topic: no part "
        "of one); which rows these are changes every lap of the source. "
        + "; ".join(f"{name}: {each.description}" for name, each in LEFTOVERS.items())
        + "; what then fills no batch is dropped",
    )
