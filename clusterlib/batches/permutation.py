"""Pseudorandom permutations evaluated entry by entry: a billion rows are shuffled without a table
of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ROUNDS = 6
_FILLING = 2**32  # a phase has fewer sources and strata, so none of them counts up to here

Key = tuple[int, int, int, int]


@dataclass(frozen=True)
class PhaseKeys:
    """Keys of all that is drawn at random in a phase, by what that is.

    >>> keys = PhaseKeys(seed=0, phase=1, num_sources=3)
    >>> keys.blocks(source=2, lap=5), keys.rows(stratum=0, lap=5)
    ((0, 1, 5, 3), (0, 1, 5, 4))
    """

    seed: int
    phase: int
    num_sources: int

    def batches(self, epoch: int) -> Key:
        """The order of an epoch's batches."""
        return self.seed, self.phase, epoch, 0

    def blocks(self, source: int, lap: int) -> Key:
        """The order of a source's blocks in a lap."""
        return self.seed, self.phase, lap, 1 + source

    def rows(self, stratum: int, lap: int) -> Key:
        """The order of a stratum's rows in a lap."""
        return self.seed, self.phase, lap, 1 + self.num_sources + stratum

    def filling(self, source: int, count: int) -> Key:
        """The rows that fill up batch `count` of a source, counted through all epochs."""
        return self.seed, self.phase, count, _FILLING + source

    def neighbors(self, epoch: int, index: int) -> Key:
        """The neighbors that a batch's seeds bring: no permutation, so its key may be one's too."""
        return self.seed, self.phase, epoch, index


def permute(places: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
    """Entries `places` of a pseudorandom permutation of range(size), without the other entries.

    A balanced Feistel network over the next even number of bits, walked along its cycle until the
    value is in range (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains",
    doi:10.1007/3-540-45760-7_9).

    >>> permute(np.arange(6), 6, key=(1, 2)).tolist()
    [4, 0, 1, 5, 2, 3]
    >>> permute(np.array([3]), 6, key=(1, 2)).tolist()
    [5]

    Args:
        places: [n], values in range(size).
        key: what makes this permutation differ from others, such as one of PhaseKeys.

    Returns:
        int64 [n], distinct for distinct places, values in range(size).
    """
    half = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    salts = np.random.SeedSequence(list(key)).generate_state(_ROUNDS, np.uint64)
    values = np.asarray(places, np.uint64).copy()
    pending = np.ones(len(values), bool)
    while pending.any():
        left, right = values[pending] >> half, values[pending] & mask
        for salt in salts:
            left, right = right, left ^ (mix(right + salt) & mask)
        values[pending] = (left << half) | right
        pending[pending] = values[pending] >= size
    return values.astype(np.int64)


def mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014, doi:10.1145/2714064.2660195), uint64 to
    uint64.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
