"""The merge tree of a source's leaves: one k-means fit serves every coarser k.

Leaves are numbered along the tree, so every node, and with it every cluster of every cut, is a
contiguous range of leaves.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clusterlib.artifacts.tables import TREE

_NODES_PER_CLUSTER = 4  # a level of the tree merges so many nodes, on average, in each cluster
_MOST_SWEEPS = 20  # a refinement that has not settled after so many passes over its nodes ends
# One matrix product takes so many rows times all others: with fewer it would wait for the memory.
_BLOCK_ROWS = 64


@dataclass(frozen=True)
class Node:
    """A cluster: leaves [first_leaf, first_leaf + num_leaves)."""

    id: int
    first_leaf: int
    num_leaves: int


@dataclass(frozen=True)
class Tree:
    """A binary tree over L leaves. Nodes 0..L-1 are the leaves, node L+i is the i-th merge,
    cheapest first.

    Attributes:
        children: int32 [L-1, 2], the nodes each merge joins, the one with lower leaves first.
    """

    num_leaves: int
    children: np.ndarray

    @functools.cached_property
    def nodes(self) -> list[Node]:
        """All 2L-1 nodes by id."""
        nodes = [Node(leaf, leaf, 1) for leaf in range(self.num_leaves)]
        for left, right in self.children.tolist():
            below = nodes[left], nodes[right]
            nodes.append(
                Node(len(nodes), below[0].first_leaf, below[0].num_leaves + below[1].num_leaves)
            )
        return nodes

    def cut(self, k: int) -> list[Node]:
        """The k clusters left when only the cheapest merges are made, in leaf order.

        Cuts are nested: every cluster of a coarser cut is a union of clusters of a finer one.

        >>> tree = Tree(num_leaves=4, children=np.array([[2, 3], [0, 1], [5, 4]]))
        >>> [(node.first_leaf, node.num_leaves) for node in tree.cut(3)]
        [(0, 1), (1, 1), (2, 2)]

        Raises:
            ValueError: k is not in 1..L.
        """
        if not 1 <= k <= self.num_leaves:
            raise ValueError(f"a tree of {self.num_leaves} leaves has no cut of {k}")
        made = 2 * self.num_leaves - k  # nodes that exist once L - k merges are done
        joined = set(self.children[: self.num_leaves - k].ravel().tolist())
        left = [node for node in self.nodes[:made] if node.id not in joined]
        return sorted(left, key=lambda node: node.first_leaf)

    def to_table(self, source: str, leaf_sizes: Sequence[int]) -> pa.Table:
        """All 2L-1 nodes as a table of schema TREE, leaves first; children of a leaf are null."""
        nodes = self.nodes
        edges = np.concatenate([[0], np.cumsum(leaf_sizes)])
        nothing = [None] * self.num_leaves
        columns: list[Any] = [
            [source] * len(nodes),
            [node.id for node in nodes],
            nothing + self.children[:, 0].tolist(),
            nothing + self.children[:, 1].tolist(),
            [node.first_leaf for node in nodes],
            [node.num_leaves for node in nodes],
            [edges[node.first_leaf + node.num_leaves] - edges[node.first_leaf] for node in nodes],
        ]
        return pa.table(columns, schema=TREE)

    def merges_above(self, k: int) -> Iterator[tuple[int, int, int]]:
        """The merges that `cut(k)` leaves undone, cheapest first: (left node, right node, joined
        node).
        """
        for merge in range(self.num_leaves - k, self.num_leaves - 1):
            left, right = self.children[merge]
            yield int(left), int(right), self.num_leaves + merge


def from_table(table: pa.Table) -> dict[str, Tree]:
    """source -> tree, from a table of schema TREE (more columns are ignored)."""
    trees = {}
    for source in pc.unique(table["source"]).to_pylist():
        nodes = table.filter(pc.equal(table["source"], source))
        merges = nodes.filter(pc.is_valid(nodes["left"]))
        children = np.stack([merges["left"].to_numpy(), merges["right"].to_numpy()], axis=1)
        trees[source] = Tree(nodes.num_rows - merges.num_rows, children)
    return trees


def build(means: np.ndarray, sizes: np.ndarray) -> tuple[Tree, np.ndarray]:
    """Merge leaves into a tree whose every cut is nearly as tight as a flat clustering of the
    points.

    By Ward's criterion, but not in one go: the cut into a quarter as many clusters is refined by
    moving single nodes, then the nodes are merged within the refined clusters, and so on with those
    as nodes. pipelines/recipes/RESULTS.md compares with plain Ward and with top-down splitting.

    Args:
        means: float [L, D], the mean of each leaf's unit vectors (not normalised).
        sizes: [L], the number of points in each leaf, all positive.

    Returns:
        The tree, and the order that renumbers the leaves: new leaf i is old leaf order[i].
    """
    num_leaves = len(means)
    nodes = np.arange(num_leaves)
    sizes = np.asarray(sizes, float)
    sums = means * sizes[:, None]
    merges: list[_Merge] = []
    level = 0
    while len(nodes) > 1:
        means, k = sums / sizes[:, None], max(1, len(nodes) // _NODES_PER_CLUSTER)
        clusters = _refine(sums, _ward_cut(means, sizes, k))
        tops = []
        for cluster in range(k):
            members = np.flatnonzero(clusters == cluster)
            names = nodes[members].tolist()
            for left, right, cost in _ward(means[members], sizes[members]):
                names.append(num_leaves + len(merges))
                merges.append(_Merge(names[left], names[right], level, cost))
            tops.append(names[-1])
        nodes = np.array(tops)
        sums = _sums(sums, clusters, k)
        sizes = np.bincount(clusters, sizes)
        level += 1
    return _number(num_leaves, merges)


def ward(means: np.ndarray, sizes: np.ndarray) -> tuple[Tree, np.ndarray]:
    """The plain Ward tree of the leaves; arguments and result as of `build`."""
    num_leaves = len(means)
    return _number(
        num_leaves, [_Merge(left, right, 0, cost) for left, right, cost in _ward(means, sizes)]
    )


def _ward_cut(means: np.ndarray, sizes: np.ndarray, k: int) -> np.ndarray:
    """Cluster of each leaf in the Ward tree's cut of k, int64 [L]."""
    tree, order = ward(means, sizes)
    clusters = np.empty(len(means), np.int64)
    clusters[order] = np.repeat(np.arange(k), [node.num_leaves for node in tree.cut(k)])
    return clusters


def _refine(sums: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Move one node at a time while that tightens the clusters (Hartigan & Wong 1979,
    doi:10.2307/2346830).

    The similarity of all unit vectors of a cluster to their mean direction adds up to the length of
    their sum; a move is made where it raises the lengths' total. No cluster is emptied.

    Args:
        sums: float [n, D], the sum of the unit vectors of each node's points.
        clusters: int64 [n].
    """
    clusters = clusters.copy()
    totals = _sums(sums, clusters, int(clusters.max()) + 1)
    lengths = np.linalg.norm(totals, axis=1)
    counts = np.bincount(clusters)
    squares = (sums**2).sum(axis=1)
    for _ in range(_MOST_SWEEPS):
        num_moved = 0
        for start in range(0, len(sums), _BLOCK_ROWS):
            block = np.arange(start, min(start + _BLOCK_ROWS, len(sums)))
            homes, rows = clusters[block], block - start
            products = sums[block] @ totals.T
            gains = np.sqrt(lengths**2 + 2 * products + squares[block, None]) - lengths
            remaining = np.maximum(
                lengths[homes] ** 2 - 2 * products[rows, homes] + squares[block], 0
            )
            gains[rows, homes] = lengths[homes] - np.sqrt(remaining)
            targets = gains.argmax(axis=1)
            for row in np.flatnonzero(targets != homes).tolist():
                node, pair = start + row, [homes[row], targets[row]]
                # The gains are from before this block's first move: measure the move once more.
                moved = totals[pair] + np.outer([-1, 1], sums[node])
                lengths_after = np.linalg.norm(moved, axis=1)
                if counts[pair[0]] == 1 or lengths_after.sum() <= lengths[pair].sum() * (1 + 1e-12):
                    continue
                totals[pair], lengths[pair] = moved, lengths_after
                counts[pair] += [-1, 1]
                clusters[node] = pair[1]
                num_moved += 1
        if not num_moved:
            break
    return clusters


def _sums(rows: np.ndarray, clusters: np.ndarray, k: int) -> np.ndarray:
    sums = np.zeros((k, rows.shape[1]))
    np.add.at(sums, clusters, rows)
    return sums


@dataclass(frozen=True)
class _Merge:
    """Joins two nodes: leaves, or L + the number of an earlier merge."""

    left: int
    right: int
    level: int
    cost: float


def _ward(means: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """The merges of Ward's criterion weighted by size, (node, node, cost), children before parents.

    Joining clusters of n and m points with means a and b costs n m / (n + m) |a - b|^2, the growth
    of the within-cluster sum of squares (Ward 1963, doi:10.1080/01621459.1963.10500845). Two
    clusters that are each other's nearest are joined in the greedy tree too, whatever is joined
    before them, so they need not wait for the cheapest merge, and only clusters whose nearest was
    joined seek anew (Murtagh 1983, doi:10.1093/comjnl/26.4.354). Memory is O(L D); no matrix of L^2
    distances is kept.
    """
    num_nodes = len(means)
    # Row i of every array is a cluster still to be joined; nearest[i] is the row of the one that it
    # is cheapest to join it with, at costs[i], or i itself while that is not known.
    names, nearest, costs = np.arange(num_nodes), np.arange(num_nodes), np.zeros(num_nodes)
    centers, weights = np.array(means, float), np.array(sizes, float)
    squares = (centers**2).sum(axis=1)
    while len(names) > 1:
        rows = np.arange(len(names))
        unknown = nearest == rows
        # Clusters that are others' nearest seek first: a chain from nearest to nearest ends at a
        # pair to join. Then small ones: to join with them costs least, so they are the nearest of
        # many, and what a large cluster found before they are joined would be sought again.
        awaited = np.bincount(nearest[~unknown], minlength=len(rows)) > 0
        block = np.lexsort((weights, ~awaited, ~unknown))[: min(_BLOCK_ROWS, unknown.sum())]
        gaps = np.maximum(squares - 2 * (centers[block] @ centers.T) + squares[block, None], 0)
        growth = weights / (weights + weights[block, None]) * weights[block, None] * gaps
        growth[np.arange(len(block)), block] = np.inf
        nearest[block], costs[block] = growth.argmin(axis=1), growth.min(axis=1)

        left = np.flatnonzero((nearest[nearest] == rows) & (rows < nearest))
        # Costs that are equal but for rounding can make a circle of clusters, no two of which are
        # each other's nearest.
        if not len(left) and (nearest != rows).all():
            left = np.array([costs.argmin()])
        right = nearest[left]
        yield from zip(
            names[left].tolist(), names[right].tolist(), costs[left].tolist(), strict=True
        )
        joined = np.zeros(len(rows), bool)
        joined[left] = joined[right] = True
        union = rows.copy()
        union[right] = left
        # A cluster whose nearest was joined seeks anew, unless their own cost is 0: both lie at one
        # point then, so what its nearest was joined with does too, and so does the union.
        nearest = np.where(joined | (joined[nearest] & (costs > 0)), rows, union[nearest])
        names[left] = np.arange(num_nodes, num_nodes + len(left))
        num_nodes += len(left)
        total = weights[left] + weights[right]
        share = (weights[right] / total)[:, None]
        centers[left] += share * (centers[right] - centers[left])
        squares[left] = (centers[left] ** 2).sum(axis=1)
        weights[left] = total

        # Rows at the end of the arrays move to where joined clusters were.
        num_left = len(rows) - len(left)
        freed, moved = right[right < num_left], np.setdiff1d(rows[num_left:], right)
        place = rows.copy()
        place[moved] = freed
        nearest = place[nearest]
        for array in (names, nearest, costs, centers, weights, squares):
            array[freed] = array[moved]
        names, nearest, costs = names[:num_left], nearest[:num_left], costs[:num_left]
        centers, weights, squares = centers[:num_left], weights[:num_left], squares[:num_left]


def _number(num_leaves: int, merges: Sequence[_Merge]) -> tuple[Tree, np.ndarray]:
    """Renumber merges cheapest first within each level, and leaves along the tree.

    Ward's merges are found out of order. A merge never costs less than the merges of its level
    below it (Ward's criterion is reducible), so a stable sort by cost keeps children before
    parents.
    """
    costs: list[float] = []
    for merge in merges:  # rounding may have made a parent cheaper than its child by a little
        below = [child - num_leaves for child in (merge.left, merge.right) if child >= num_leaves]
        costs.append(
            max(
                [
                    merge.cost,
                    *(costs[child] for child in below if merges[child].level == merge.level),
                ]
            )
        )
    by_cost = np.lexsort((costs, [merge.level for merge in merges])).tolist()
    renamed = {num_leaves + old: num_leaves + new for new, old in enumerate(by_cost)}
    children = [
        [renamed.get(child, child) for child in (merges[old].left, merges[old].right)]
        for old in by_cost
    ]
    order: list[int] = []
    stack = [2 * num_leaves - 2]
    while stack:
        node = stack.pop()
        if node < num_leaves:
            order.append(node)
        else:
            left, right = children[node - num_leaves]
            stack += [right, left]
    place = {old: new for new, old in enumerate(order)}
    numbered = [[place.get(child, child) for child in pair] for pair in children]
    return Tree(num_leaves, np.array(numbered, np.int32).reshape(-1, 2)), np.array(order, np.int64)
