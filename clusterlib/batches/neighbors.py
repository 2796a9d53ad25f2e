"""Batches of mined neighbors: pairs whose passages are hard negatives of each other's queries,
side by side.

A neighbor comes into the batch as a whole pair, so it is a hard negative of its seed, an example
of its own and an in-batch negative of all others, and a batch costs what any other costs (as in
NGAME, arXiv 2207.04452, and GCBS, arXiv 2210.12874). What is near is mined by train.mine and may
follow the student (ANCE, arXiv 2007.00808).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from clusterlib.artifacts.config import Config
from clusterlib.batches.permutation import mix

NOBODY = -1  # fills a row of a table of neighbors that has fewer than the others


class NeighborsConfig(Config):
    """What is mined for the batches of strategy neighbors, inside the k clusters of each source."""

    per_seed: int = Field(3, ge=1, description="neighbors that each seed brings into its batch")
    first_rank: int = Field(
        0,
        ge=0,
        description="the nearest this many are passed over: the nearer, the more likely a false "
        "negative",
    )
    last_rank: int = Field(
        16, ge=1, description="a seed's neighbors are drawn from those nearer than this rank"
    )
    margin: float = Field(
        0.05,
        ge=-2,
        le=2,
        description="a passage is no neighbor if its similarity to the query is over the "
        "positive's minus this (TopK-MarginPos of NV-Retriever, arXiv 2407.15831)",
    )
    duplicate_similarity: float = Field(
        0.95,
        ge=-1,
        description="a passage is no neighbor if its similarity to the positive passage is this "
        "or more",
    )
    refresh_every_steps: int | None = Field(
        None,
        ge=1,
        description="mine again with the student's vectors after every so many steps of a phase; "
        "its first steps, and by default all, use the teacher's",
    )

    @property
    def num_ranks(self) -> int:
        """Neighbors kept of each row."""
        return self.last_rank - self.first_rank

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.num_ranks < self.per_seed:
            raise ValueError(
                f"first_rank={self.first_rank} and last_rank={self.last_rank} leave fewer "
                f"neighbors than per_seed={self.per_seed}"
            )
        return self


def with_neighbors(
    seeds: np.ndarray, neighbors: np.ndarray, per_seed: int, key: Sequence[int]
) -> np.ndarray:
    """Seeds and, for each, `per_seed` of its neighbors, drawn at random among those not there yet.

    Where a seed has too few, the others bring more; where all have, there are fewer rows.

    >>> neighbors = np.array([[1, 2], [0, 3], [3, NOBODY], [2, 1]])
    >>> with_neighbors(np.array([0, 2]), neighbors, per_seed=1, key=(7,)).tolist()
    [0, 2, 1, 3]

    Args:
        seeds: int64 [s], distinct rows.
        neighbors: int64 [rows, w], neighbors of every row, NOBODY where there are fewer.
        key: what makes this draw differ from others.

    Returns:
        int64, distinct rows, the seeds first.
    """
    found = np.asarray(neighbors[seeds], np.int64)
    salt = np.random.SeedSequence(list(key)).generate_state(1, np.uint64)
    draws = mix(np.arange(found.size, dtype=np.uint64) + salt).reshape(found.shape)
    found = np.take_along_axis(found, np.argsort(draws, axis=1), axis=1)
    rows = seeds
    room = len(seeds) * per_seed
    num_brought = np.zeros(len(seeds), np.int64)
    for most in (per_seed, room):
        for candidates in found.T:
            free = np.flatnonzero(
                (candidates != NOBODY) & (num_brought < most) & ~np.isin(candidates, rows)
            )
            brought, firsts = np.unique(candidates[free], return_index=True)
            brought, firsts = brought[:room], firsts[:room]
            num_brought[free[firsts]] += 1
            room -= len(brought)
            rows = np.concatenate([rows, brought])
    return rows
