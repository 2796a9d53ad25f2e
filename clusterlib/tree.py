"""The merge tree of a source's leaves: one k-means fit serves every coarser k.

Leaves are numbered along the tree, so every node, and with it every cluster of every cut, is a contiguous
range of leaves.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clusterlib.tables import TREE


@dataclass(frozen=True)
class Node:
    """A cluster: leaves [first_leaf, first_leaf + num_leaves)."""

    id: int
    first_leaf: int
    num_leaves: int


@dataclass(frozen=True)
class Tree:
    """A binary tree over L leaves. Nodes 0..L-1 are the leaves, node L+i is the i-th merge, cheapest first.

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
            nodes.append(Node(len(nodes), below[0].first_leaf, below[0].num_leaves + below[1].num_leaves))
        return nodes

    def cut(self, k: int) -> list[Node]:
        """The k clusters left when only the cheapest merges are made, in leaf order.

        Cuts are nested: every cluster of a coarser cut is a union of clusters of a finer one.

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
        """The merges that `cut(k)` leaves undone, cheapest first: (left node, right node, joined node)."""
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
    """Merge leaves by Ward's criterion weighted by size, with the nearest-neighbour chain algorithm.

    Joining clusters of n and m points with means a and b costs n m / (n + m) |a - b|^2, the growth of the
    within-cluster sum of squares (Ward 1963, doi:10.1080/01621459.1963.10500845; chain: Murtagh 1983,
    doi:10.1093/comjnl/26.4.354). Memory is O(L D); no matrix of L^2 distances is kept.

    Args:
        means: float [L, D], the mean of each leaf's points (not normalised).
        sizes: [L], the number of points in each leaf, all positive.

    Returns:
        The tree, and the order that renumbers the leaves: new leaf i is old leaf order[i].
    """
    num_leaves = len(means)
    centers = np.zeros((2 * num_leaves - 1, means.shape[1]))
    centers[:num_leaves] = means
    weights = np.zeros(2 * num_leaves - 1)
    weights[:num_leaves] = sizes
    squares = (centers**2).sum(axis=1)
    active = np.zeros(2 * num_leaves - 1, bool)
    active[:num_leaves] = True
    pairs: list[tuple[int, int]] = []
    costs: list[float] = []
    chain: list[int] = []
    for merged in range(num_leaves, 2 * num_leaves - 1):
        if not chain:
            chain.append(int(np.flatnonzero(active)[0]))
        while True:
            tip = chain[-1]
            others = np.flatnonzero(active)
            others = others[others != tip]
            gaps = np.maximum(squares[others] - 2 * centers[others] @ centers[tip] + squares[tip], 0)
            cost = weights[tip] * weights[others] / (weights[tip] + weights[others]) * gaps
            best = int(cost.argmin())
            # Prefer going back on ties, or the chain could circle between equal clusters for ever.
            if len(chain) > 1 and cost[np.searchsorted(others, chain[-2])] <= cost[best]:
                best = int(np.searchsorted(others, chain[-2]))
                break
            chain.append(int(others[best]))
        left, right = chain.pop(), chain.pop()
        pairs.append((left, right))
        costs.append(float(cost[best]))
        active[[left, right]] = False
        active[merged] = True
        weights[merged] = weights[left] + weights[right]
        centers[merged] = (weights[left] * centers[left] + weights[right] * centers[right]) / weights[merged]
        squares[merged] = centers[merged] @ centers[merged]
    return _number(num_leaves, pairs, costs)


def _number(num_leaves: int, pairs: list[tuple[int, int]], costs: list[float]) -> tuple[Tree, np.ndarray]:
    """Renumber merges cheapest first and leaves along the tree.

    The chain finds merges out of order. A merge never costs less than the merges below it (Ward's criterion
    is reducible), so a stable sort by cost keeps children before parents.
    """
    for index, pair in enumerate(pairs):  # guard the sort against rounding of near-equal costs
        below = [costs[child - num_leaves] for child in pair if child >= num_leaves]
        costs[index] = max([costs[index], *below])
    by_cost = np.argsort(costs, kind="stable")
    renamed = {num_leaves + int(old): num_leaves + new for new, old in enumerate(by_cost)}
    children = [tuple(renamed.get(child, child) for child in pairs[old]) for old in by_cost]
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
