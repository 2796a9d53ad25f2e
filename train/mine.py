"""Mining neighbors: exact search inside clusters, shared out over ranks, with the teacher's or the
student's vectors.

A finished table lies in storage in the run's draft, where a run that is continued finds it, and on
each node as a file that all its ranks map.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from clusterlib.artifacts.artifact import open_part
from clusterlib.artifacts.draft import Draft, Receipt
from clusterlib.artifacts.tables import fixed_size_list, neighbors_schema, vectors
from clusterlib.batches.blocks import Stratum
from clusterlib.batches.neighbors import NOBODY, NeighborsConfig
from clusterlib.batches.plan import Mining, Plan
from clusterlib.errors import StrataError
from train import ranks
from train.cache import building
from train.data import TokenStore
from train.engine import Engine

_TABLE = "neighbors"
_BLOCK_SCORES = 2**24  # similarities in memory at once
_READ_ROWS = 4096  # rows whose tokens are in memory at once


@dataclass(frozen=True)
class Miner:
    """Gets the neighbors that a step needs; every rank calls it.

    Attributes:
        draft: of the model.
        cache_dir: folder on this node's own disk.
        micro_batch_size: rows the student encodes at once.
        writes_cache: whether this rank is the one of its node that writes there.
    """

    draft: Draft
    cache_dir: Path
    plan: Plan
    store: TokenStore
    engine: Engine
    micro_batch_size: int
    writes_cache: bool

    def __call__(self, mining: Mining, step: int) -> np.ndarray:
        """The table of neighbors for `step`, int64 [rows, w], mapped from a file.

        Raises:
            StrataError: they were mined by the student of an earlier step, and are gone.
        """
        name = f"{_TABLE}-{mining.step:09d}"
        receipt = self.draft.receipt(name)
        if receipt is None:
            if mining.by_student and mining.step != step:
                raise StrataError(
                    f"{self.draft.path}: the neighbors that the student mined at step "
                    f"{mining.step} are gone; delete this folder, and the run starts anew"
                )
            receipt = self._mine(mining, name)
        # Named by content: what an earlier try at this run left on a node may be of other weights.
        digest = hashlib.sha256(
            "".join(part.sha256 for part in receipt.parts).encode()
        ).hexdigest()[:12]
        path = self.cache_dir.expanduser() / f"{self.draft.spec.fingerprint}-{name}-{digest}.npy"
        if self.writes_cache:
            self._copy(receipt, path)
        ranks.wait()
        return np.load(path, mmap_mode="r")

    def _mine(self, mining: Mining, name: str) -> Receipt:
        rank, num_ranks = ranks.place()
        config = self.plan.config.neighbors
        clusters = share(self.plan.phases[mining.phase].searched, num_ranks)[rank]
        schema = neighbors_schema(config.num_ranks)
        part = self.draft.write(
            _TABLE,
            f"{mining.step:09d}-{rank:04d}",
            schema,
            (
                pa.Table.from_arrays(
                    [fixed_size_list(self._search(cluster, mining, config))], schema=schema
                )
                for cluster in clusters
                if cluster.num_rows
            ),
        )
        receipt = Receipt(ranks.from_all(part))
        if rank == 0:
            self.draft.commit(name, receipt)
        return receipt

    def _search(self, cluster: Stratum, mining: Mining, config: NeighborsConfig) -> np.ndarray:
        rows = np.arange(cluster.first_row, cluster.first_row + cluster.num_rows)
        pairs = self.store.pairs(rows).map(lambda tensor: tensor.to(self.engine.device))
        query, passage = self._embed(rows) if mining.by_student else pairs.teacher()
        found = nearest(query, passage, pairs.query_id, pairs.passage_id, config).cpu().numpy()
        return np.where(found == NOBODY, NOBODY, found + cluster.first_row)

    @torch.no_grad()
    def _embed(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """The student's vectors of queries and passages, float32 [n, D], without dropout."""
        sides: list[Tensor] = []
        self.engine.model.eval()
        for first in range(0, len(rows), _READ_ROWS):
            batch = self.store.read(rows[first : first + _READ_ROWS], 0, 1, self.micro_batch_size)
            batch = batch.to(self.engine.device)
            for number, side in enumerate((batch.query, batch.passage)):
                embedded = torch.cat([self.engine.encode(*part) for part in side.micro_batches])[
                    side.places
                ]
                if len(sides) <= number:
                    sides.append(embedded.new_empty(len(rows), embedded.shape[1]))
                sides[number][batch.rows - rows[0]] = embedded
        self.engine.model.train()
        query, passage = sides
        return query, passage

    def _copy(self, receipt: Receipt, path: Path) -> None:
        """Put a table together in a file of this node, whole or not at all, in place of an earlier
        one.
        """
        if path.exists():
            return
        num_rows = sum(part.num_rows for part in receipt.parts)
        shape = (num_rows, self.plan.config.neighbors.num_ranks)
        with building(path.parent) as folder:
            table = np.lib.format.open_memmap(folder / "table.npy", "w+", np.int64, shape)
            first = 0
            for part in receipt.parts:
                with open_part(self.draft.root.fs, self.draft.path, part) as file:
                    for batch in file.iter_batches():
                        table[first : first + batch.num_rows] = vectors(batch["neighbors"])
                        first += batch.num_rows
            table.flush()
            (folder / "table.npy").rename(path)
        self.forget(path)

    def forget(self, needed: Path | None = None) -> None:
        """Delete this run's tables on this node but the one that is needed."""
        if self.writes_cache:
            for path in self.cache_dir.expanduser().glob(
                f"{self.draft.spec.fingerprint}-{_TABLE}-*.npy"
            ):
                if path != needed:
                    path.unlink()


def share(clusters: Sequence[Stratum], num_ranks: int) -> list[list[Stratum]]:
    """Each rank's clusters, in order, so that all have about as many similarities to compute."""
    costs = np.cumsum([cluster.num_rows**2 for cluster in clusters], dtype=float)
    edges = np.searchsorted(costs, costs[-1] * np.arange(1, num_ranks) / num_ranks).tolist()
    return [
        list(clusters[first:stop]) for first, stop in itertools.pairwise([0, *edges, len(clusters)])
    ]


def nearest(
    query: Tensor, passage: Tensor, query_id: Tensor, passage_id: Tensor, config: NeighborsConfig
) -> Tensor:
    """The pairs of a cluster whose passages are the hardest true negatives of each query.

    Left out are a query's known positives, passages as near to it as its positive or nearly so, and
    near duplicates of the positive. A passage that several pairs have is found once, with the first
    of them.

    Args:
        query, passage: float32 [n, D], unit norm.
        query_id, passage_id: int64 [n].

    Returns:
        int64 [n, w], the places of pairs of ranks first_rank to last_rank, hardest first, then
        NOBODY.
    """
    num_rows = len(query)
    ids, column = torch.unique(passage_id, return_inverse=True)
    places = torch.arange(num_rows, device=query.device)
    firsts = torch.full_like(ids, num_rows).scatter_reduce(0, column, places, "amin")
    columns = passage[firsts]
    bound = (query * passage).sum(dim=1, keepdim=True) - config.margin
    found = torch.full((num_rows, config.num_ranks), NOBODY, device=query.device)
    size = max(1, _BLOCK_SCORES // num_rows)
    for start in range(0, num_rows, size):
        block = slice(start, start + size)
        similarity = query[block] @ columns.T
        excluded = (similarity > bound[block]) | (
            passage[block] @ columns.T >= config.duplicate_similarity
        )
        row, positive = (query_id[block, None] == query_id).nonzero(as_tuple=True)
        excluded[row, column[positive]] = True
        similarity.masked_fill_(excluded, -torch.inf)
        hardest = similarity.topk(min(config.last_rank, len(ids)), dim=1)
        chosen = firsts[hardest.indices].masked_fill(hardest.values.isinf(), NOBODY)[
            :, config.first_rank :
        ]
        found[block, : chosen.shape[1]] = chosen
    return found
