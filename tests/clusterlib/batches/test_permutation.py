import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterlib.batches.permutation import PhaseKeys, permute


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3000), st.lists(st.integers(0, 2**40), min_size=1, max_size=3))
def test_permutation_is_one_and_every_entry_is_had_alone(size, key):
    whole = permute(np.arange(size), size, key)
    assert sorted(whole.tolist()) == list(range(size))
    some = np.random.default_rng(0).integers(0, size, 5)
    np.testing.assert_array_equal(permute(some, size, key), whole[some])


def test_permutation_looks_random_and_depends_on_its_key():
    first, second = (
        permute(np.arange(10_000), 10_000, (1, 2)),
        permute(np.arange(10_000), 10_000, (1, 3)),
    )
    assert abs(np.corrcoef(first, np.arange(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert (
        abs((first == np.arange(10_000)).sum() - 1) < 8
    )  # a random permutation has one fixed point
    # A billion rows: no table is made.
    assert len(set(permute(np.arange(1000), 10**9, (0,)).tolist())) == 1000


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 30))
def test_no_two_permutations_share_a_key(num_sources, num_strata, num_turns):
    found = []
    for phase in range(2):
        keys = PhaseKeys(3, phase, num_sources)
        for turn in range(num_turns):
            found.append(keys.batches(turn))
            for source in range(num_sources):
                found += [keys.blocks(source, turn), keys.filling(source, turn)]
            found += [keys.rows(stratum, turn) for stratum in range(num_strata)]
    assert len(found) == len(set(found))
