"""Made-up indexes, and plans over them drawn by hypothesis."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import strategies as st

from clusterlib.artifacts.tables import INDEX
from clusterlib.batches.neighbors import NOBODY
from clusterlib.batches.plan import BatchingConfig, Phase, Plan
from clusterlib.batches.strategies import STRATEGIES
from clusterlib.clusters.shards import ShardIndex
from clusterlib.clusters.tree import build
from clusterlib.errors import StrataError


def _make_index(sizes, num_files=1):
    """An index over files that share every leaf's rows; `sizes` is source -> rows of each leaf."""
    rows, trees = [], {}
    first = [0] * num_files
    for source, leaf_sizes in sorted(sizes.items()):
        generator = np.random.default_rng(len(leaf_sizes))
        trees[source] = build(
            generator.standard_normal((len(leaf_sizes), 4)), np.ones(len(leaf_sizes))
        )[0]
        for leaf, count in enumerate(leaf_sizes):
            for file, share in enumerate(
                np.diff(np.arange(num_files + 1) * count // num_files).tolist()
            ):
                if share:
                    rows.append(
                        dict(
                            zip(
                                INDEX.names,
                                (source, leaf, file, 0, first[file], share),
                                strict=True,
                            )
                        )
                    )
                    first[file] += share
    return ShardIndex(pa.Table.from_pylist(rows, schema=INDEX), trees)


def _owners(index, k):
    """(source, cluster) of every row in leaf order, at a cut of k."""
    found = []
    for source in index.sources:
        tree = index.trees[source]
        leaf_sizes = np.diff(index.leaf_starts[source])
        for number, node in enumerate(tree.cut(min(k, tree.num_leaves))):
            rows = leaf_sizes[node.first_leaf : node.first_leaf + node.num_leaves].sum()
            found += [(source, number)] * int(rows)
    return found


def _some_neighbors(owner, width):
    """A table of neighbors drawn from each row's own cluster; some rows have none."""
    generator = np.random.default_rng(0)
    rows = {
        cluster: [row for row, other in enumerate(owner) if other == cluster]
        for cluster in set(owner)
    }
    table = np.full((len(owner), width), NOBODY)
    for row, cluster in enumerate(owner):
        others = [other for other in rows[cluster] if other != row]
        chosen = generator.permutation(others)[: generator.integers(0, width + 1)]
        table[row, : len(chosen)] = chosen
    return table


def _epoch_of(phase, epoch, neighbors=None):
    return [phase.batch(epoch, index, neighbors) for index in range(phase.num_batches)]


@pytest.fixture(scope="session")
def make_index():
    """Makes an index of source -> rows of each leaf."""
    return _make_index


@pytest.fixture(scope="session")
def index():
    """Three sources, of six leaves, two and one."""
    return _make_index({"a": [130, 7, 64, 33, 0, 90], "b": [50, 50], "c": [10]})


@pytest.fixture(scope="session")
def owners():
    return _owners


@pytest.fixture(scope="session")
def some_neighbors():
    return _some_neighbors


@pytest.fixture(scope="session")
def epoch_of():
    """Makes all batches of an epoch of a phase."""
    return _epoch_of


@dataclass
class Case:
    """A plan of one phase and what it is made of; `error` says why there is none."""

    sizes: dict[str, list[int]]
    config: BatchingConfig
    index: ShardIndex
    table: np.ndarray | None
    phase: Phase | None = None
    error: str = ""


all_sizes = st.dictionaries(
    st.sampled_from("abc"),
    st.lists(st.integers(0, 70), min_size=1, max_size=9),
    min_size=1,
    max_size=3,
)


@st.composite
def _cases(draw, names):
    sizes = draw(all_sizes)
    strategy = draw(st.sampled_from(names))
    parts = draw(st.integers(2, 5))  # of a topic batch; or pairs of a group of neighbors
    chosen = {
        "strategy": strategy,
        "k": draw(st.integers(1, max(len(leaves) for leaves in sizes.values()))),
        "clusters_per_batch": parts,
        "global_batch_size": draw(st.integers(1, 8)) * parts,
        "neighbors": {"per_seed": parts - 1, "last_rank": 6},
        "leftover": draw(st.sampled_from(["drop", "merge", "source"])),
        "seed": draw(st.integers(0, 5)),
    }
    if not STRATEGIES[strategy].mixes_sources:
        weight = st.sampled_from([0.1, 0.5, 1, 1.5, 3])
        chosen["source_weights"] = draw(st.dictionaries(st.sampled_from(sorted(sizes)), weight))
        chosen["max_source_fraction"] = draw(st.sampled_from([None, 0.4, 0.5, 0.8]))
    config, index = BatchingConfig(**chosen), _make_index(sizes)
    mines = STRATEGIES[strategy].mines
    case = Case(
        sizes, config, index, _some_neighbors(_owners(index, config.k), 6) if mines else None
    )
    try:
        (case.phase,) = Plan(index, config).phases
    except StrataError as error:
        case.error = str(error)
    return case


@pytest.fixture(scope="session")
def cases():
    """Draws plans of one phase, of these strategies or of any."""
    return lambda *names: _cases(names or list(STRATEGIES))
