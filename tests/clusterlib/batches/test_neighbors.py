import numpy as np
import pytest

from clusterlib.artifacts.config import validate
from clusterlib.batches.neighbors import NOBODY, NeighborsConfig, with_neighbors
from clusterlib.errors import StrataError


def test_seeds_bring_distinct_neighbors_of_their_own():
    generator = np.random.default_rng(0)
    table = np.stack([generator.permutation(60)[:8] for _ in range(60)])
    table[np.arange(60)[:, None] == table] = NOBODY
    table[7] = NOBODY
    seeds = np.array([5, 7, 50, 31, 2])
    rows = with_neighbors(seeds, table, 3, (0, 1))
    assert rows[:5].tolist() == seeds.tolist()
    assert len(set(rows.tolist())) == len(rows) == 5 + 5 * 3  # the others bring what seed 7 has not
    assert NOBODY not in rows
    brought = set(rows[5:].tolist())
    for seed in (5, 50, 31, 2):
        assert len(brought & set(table[seed].tolist())) >= 3
    assert brought <= set(table[seeds].ravel().tolist())


def test_draws_are_repeatable_and_differ_by_key():
    table = np.stack([np.roll(np.arange(1000, 1040), row) for row in range(1000)])
    seeds = np.arange(4)
    draws = {tuple(with_neighbors(seeds, table, 2, (0, turn)).tolist()) for turn in (0, 0, 1, 2)}
    assert len(draws) == 3
    counts = np.bincount(
        np.concatenate(
            [with_neighbors(np.array([3]), table, 2, (turn,))[1:] for turn in range(4000)]
        )
        - 1000,
        minlength=40,
    )
    assert counts.min() > 140 and counts.max() < 260  # 200 expected, standard deviation 14


def test_seeds_that_share_neighbors_do_not_take_one_twice():
    table = np.array([[2, 3, 4]] * 5)
    rows = with_neighbors(np.array([0, 1]), table, 2, (0,))
    assert sorted(rows.tolist()) == [0, 1, 2, 3, 4]
    rows = with_neighbors(np.array([0, 3]), table, 2, (0,))  # 3 is a seed already
    assert sorted(rows.tolist()) == [0, 2, 3, 4]
    assert (
        len(with_neighbors(np.array([0, 1]), np.array([[NOBODY] * 5, [2, 3, 4, 5, 6]]), 2, (0,)))
        == 6
    )


def test_a_window_too_small_is_refused():
    with pytest.raises(
        StrataError, match="first_rank=5 and last_rank=7 leave fewer neighbors than per_seed=3"
    ):
        validate(NeighborsConfig, {"first_rank": 5, "last_rank": 7}, "recipe")
