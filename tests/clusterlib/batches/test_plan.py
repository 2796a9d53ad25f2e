import hashlib
import time
import tracemalloc
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterlib.artifacts.config import fingerprint, validate
from clusterlib.artifacts.tables import INDEX
from clusterlib.batches.neighbors import NOBODY
from clusterlib.batches.plan import BatchingConfig, Mining, Plan
from clusterlib.batches.strategies import STRATEGIES
from clusterlib.clusters.shards import ShardIndex
from clusterlib.clusters.tree import Tree
from clusterlib.errors import StrataError


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_purity_a_block_is_of_one_stratum_and_a_batch_of_one_source(cases, epoch_of, data):
    case = data.draw(cases().filter(lambda case: case.phase))
    phase, shape, size = case.phase, case.phase.shape, case.config.global_batch_size
    firsts = [stratum.first_row for stratum in phase.strata]
    source_firsts = [source.strata[0].first_row for source in phase.sources]
    for batch in epoch_of(phase, 0, case.table):
        assert len(batch.rows) == len(set(batch.rows.tolist())) == size
        (source,) = set(np.searchsorted(source_firsts, batch.rows, "right").tolist())
        blocks = batch.rows[: shape.num_blocks * shape.block_rows].reshape(shape.num_blocks, -1)
        held = [set((np.searchsorted(firsts, block, "right") - 1).tolist()) for block in blocks]
        assert set.union(*held) == set(batch.strata)
        names = [phase.strata[stratum].name for stratum in batch.strata]
        mixed = f"{phase.sources[source - 1].name}/mixed"
        assert batch.label == (names[0] if len(names) == 1 else mixed)
        if case.config.leftover == "drop":
            assert {len(strata) for strata in held} == {1}


def laps_by_size(case):
    """Batches that visit the rows of each source once, counted from the sizes of strata alone."""
    strategy, config = STRATEGIES[case.config.strategy], case.config
    shape, laps = strategy.shape(config), {}
    for source, strata in strategy.strata(case.index, config.k).items():
        rows = [stratum.num_rows for stratum in strata]
        each = sum(count // shape.block_rows for count in rows)
        whole = sum(rows) // shape.block_rows
        num_blocks = each if config.leftover == "drop" else whole
        laps[source] = (
            num_blocks // shape.num_blocks if sum(rows) >= config.global_batch_size else 0
        )
    return laps


def epochs_by_size(case, laps):
    """Batches of each source in an epoch: weights applied, then the cap found by trying."""
    weights, fraction = case.config.source_weights, case.config.max_source_fraction
    wanted = {name: int(np.ceil(weights.get(name, 1) * lap)) for name, lap in laps.items()}
    most = max(wanted.values())
    while fraction and most and most > fraction * sum(min(n, most) for n in wanted.values()) + 1e-9:
        most -= 1
    return {name: min(count, most) for name, count in wanted.items()}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_coverage_a_lap_visits_every_planned_row_once(cases, epoch_of, data):
    case = data.draw(cases())
    laps = laps_by_size(case)
    expected = epochs_by_size(case, laps)
    assert ("no stratum fills a batch" in case.error) == (not any(laps.values()))
    assert ("max_source_fraction" in case.error) == (
        any(laps.values()) and not any(expected.values())
    )
    if case.error:
        return
    phase, num_visited = case.phase, case.phase.shape.num_blocks * case.phase.shape.block_rows
    firsts = [source.strata[0].first_row for source in phase.sources]
    visits = {name: Counter() for name in laps}
    for epoch in range(3):
        counts = Counter()
        for batch in epoch_of(phase, epoch, case.table):
            number = int(np.searchsorted(firsts, batch.rows[0], "right")) - 1
            name = phase.sources[number].name
            counts[name] += 1
            visits[name].update(batch.rows[:num_visited].tolist())
        assert counts == Counter(expected)
    # No row comes again before the source's lap is over, whatever the weights and the cap.
    for source in phase.sources:
        rows, made = visits[source.name], 3 * expected[source.name]
        if made:
            lap = laps[source.name]
            assert max(rows.values()) <= -(-made // lap)
            if lap * num_visited == source.num_rows and made >= lap:
                assert len(rows) == source.num_rows and min(rows.values()) >= made // lap


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_determinism_any_batch_is_had_alone_and_from_other_files(cases, make_index, data):
    case = data.draw(cases().filter(lambda case: case.phase))
    places = st.tuples(st.integers(0, 3), st.integers(0, case.phase.num_batches - 1))
    asked = data.draw(st.lists(places, min_size=1, max_size=8))
    batches = [case.phase.batch(*place, case.table) for place in asked]
    (again,) = Plan(make_index(case.sizes, num_files=3), case.config).phases
    for place, batch in reversed(list(zip(asked, batches, strict=True))):
        other = again.batch(*place, case.table)
        np.testing.assert_array_equal(other.rows, batch.rows)
        assert (other.strata, other.label, other.epoch) == (batch.strata, batch.label, place[0])


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_rows_that_are_nobodys_neighbors_come_when_all_neighbors_are_there(cases, epoch_of, data):
    case = data.draw(cases("neighbors").filter(lambda case: case.phase))
    num_seeds = case.phase.shape.block_rows
    for batch in epoch_of(case.phase, 0, case.table):
        near = set(case.table[batch.rows[:num_seeds]].ravel().tolist()) - {NOBODY}
        strangers = [row for row in batch.rows[num_seeds:].tolist() if row not in near]
        assert not strangers or near <= set(batch.rows.tolist())


@settings(max_examples=60, deadline=None)
@given(
    shares=st.lists(
        st.tuples(
            st.integers(1, 9),
            st.sampled_from(["random", "source", "cluster", "topic"]),
            st.integers(1, 6),
        ),
        min_size=1,
        max_size=4,
    ),
    num_steps=st.integers(1, 300),
    epochs=st.floats(0.1, 9),
)
def test_phases_share_the_steps_and_each_runs_through_its_own_epochs(
    index, shares, num_steps, epochs
):
    whole = sum(share for share, _, _ in shares)
    phases = [
        {"fraction": share / whole, "strategy": strategy, "k": k} for share, strategy, k in shares
    ]
    plan = Plan(index, BatchingConfig(global_batch_size=16, phases=phases))
    batches = [plan.step(step, num_steps) for step in range(num_steps)]
    numbers = [batch.phase for batch in batches]
    assert numbers == sorted(numbers)
    for number, (phase, asked) in enumerate(zip(plan.phases, phases, strict=True)):
        mine = [batch for batch in batches if batch.phase == number]
        assert abs(len(mine) - asked["fraction"] * num_steps) <= 1
        # The phase's own epochs, one after the other, of the strata it would have alone.
        alone = Plan(
            index,
            BatchingConfig(global_batch_size=16, strategy=asked["strategy"], k=asked["k"]),
        )
        assert (
            phase.strata == alone.phases[0].strata
            and phase.num_batches == alone.phases[0].num_batches
        )
        assert [batch.epoch for batch in mine] == [
            place // phase.num_batches for place in range(len(mine))
        ]
        for epoch in {batch.epoch for batch in mine}:
            rows = Counter(
                row for batch in mine if batch.epoch == epoch for row in batch.rows.tolist()
            )
            assert max(rows.values()) == 1
    total = plan.num_steps(epochs)
    ran = sum(np.diff(plan.first_steps(total)) / [phase.num_batches for phase in plan.phases])
    assert abs(ran - epochs) <= sum(1.5 / phase.num_batches for phase in plan.phases)
    with pytest.raises(IndexError):
        plan.step(num_steps, num_steps)


def test_neighbors_are_mined_at_the_start_of_their_phase_and_refreshed(index):
    phases = [
        {"fraction": 0.3, "strategy": "source"},
        {"fraction": 0.7, "strategy": "neighbors", "k": 2},
    ]
    neighbors = {"per_seed": 3, "refresh_every_steps": 3}
    plan = Plan(index, BatchingConfig(global_batch_size=16, phases=phases, neighbors=neighbors))
    mined = [plan.mining(step, 10) for step in range(10)]
    assert mined[:3] == [None] * 3
    assert [mining.step for mining in mined[3:]] == [3, 3, 3, 6, 6, 6, 9]
    assert [mining.by_student for mining in mined[3:]] == [False] * 3 + [True] * 4
    assert [(s.name, s.num_rows) for s in plan.phases[1].searched] == [
        (s.name, s.num_rows)
        for s in Plan(index, BatchingConfig(global_batch_size=16, k=2)).phases[0].strata
    ]
    with pytest.raises(ValueError, match="without a table of neighbors"):
        plan.step(5, 10)
    once = BatchingConfig(global_batch_size=16, strategy="neighbors")
    assert {Plan(index, once).mining(step, 10) for step in range(10)} == {Mining(0, 0, False)}


def test_equal_phases_are_shuffled_apart(index):
    half = {"fraction": 0.5, "strategy": "source"}
    first, second = Plan(index, BatchingConfig(global_batch_size=16, phases=[half, half])).phases
    assert set(first.batch(0, 0).rows.tolist()) != set(second.batch(0, 0).rows.tolist())


def test_a_phase_takes_from_the_settings_what_it_does_not_set():
    config = BatchingConfig(
        global_batch_size=4,
        k=3,
        phases=[{"fraction": 0.5, "strategy": "source"}, {"fraction": 0.5}],
    )
    assert [(phase.strategy, phase.k, phase.title) for phase in config.schedule()] == [
        ("source", 3, "source"),
        ("cluster", 3, "cluster k=3"),
    ]


def test_epochs_and_seeds_differ_and_steps_run_through_epochs(index):
    plan = Plan(index, BatchingConfig(global_batch_size=16))
    (phase,) = plan.phases
    (other,) = Plan(index, BatchingConfig(global_batch_size=16, seed=1)).phases
    assert set(phase.batch(0, 0).rows.tolist()) != set(phase.batch(1, 0).rows.tolist())
    assert set(phase.batch(0, 0).rows.tolist()) != set(other.batch(0, 0).rows.tolist())
    np.testing.assert_array_equal(
        plan.step(phase.num_batches + 2, 1000).rows, phase.batch(1, 2).rows
    )
    with pytest.raises(IndexError):
        phase.batch(0, phase.num_batches)


def test_dropped_rows_change_every_epoch(make_index):
    plan = Plan(make_index({"a": [100]}), BatchingConfig(global_batch_size=64, leftover="drop"))
    seen = {row for step in range(12) for row in plan.step(step, 12).rows.tolist()}
    assert len(seen) == 100


def test_weights_repeat_rows_or_leave_them_to_the_next_epoch(make_index, epoch_of):
    index = make_index({"a": [64, 64], "b": [32, 32]})
    config = BatchingConfig(global_batch_size=8, source_weights={"a": 0.5, "b": 3})
    (phase,) = Plan(index, config).phases
    epochs = [
        Counter(row for batch in epoch_of(phase, epoch) for row in batch.rows.tolist())
        for epoch in (0, 1)
    ]
    for seen in epochs:
        assert {seen[row] for row in range(128, 192)} == {3}
        assert (
            max(seen[row] for row in range(128)) == 1 and sum(seen[row] for row in range(128)) == 64
        )
    assert {(epochs[0] + epochs[1])[row] for row in range(128)} == {1}


def test_a_cap_cuts_the_largest_sources_to_equal_shares(make_index, epoch_of):
    index = make_index({"a": [800], "b": [400], "c": [80]})
    for fraction, expected in (
        (None, [100, 50, 10]),
        (0.5, [60, 50, 10]),
        (0.4, [20, 20, 10]),
        (1 / 3, [10, 10, 10]),
    ):
        config = BatchingConfig(
            global_batch_size=8, strategy="source", max_source_fraction=fraction
        )
        (phase,) = Plan(index, config).phases
        labels = Counter(batch.label for batch in epoch_of(phase, 0))
        assert [labels[source] for source in "abc"] == expected
    with pytest.raises(StrataError, match=r"max_source_fraction=0\.3: 3 sources fill batches.*1/3"):
        Plan(index, BatchingConfig(global_batch_size=8, strategy="source", max_source_fraction=0.3))


def test_a_batch_larger_than_every_stratum_is_refused_with_the_largest(index):
    with pytest.raises(
        StrataError,
        match=r"global_batch_size=200: no stratum.*a/0 with 130 rows.*merge \(it is drop",
    ):
        Plan(index, BatchingConfig(global_batch_size=200, leftover="drop"))


def test_k_above_the_leaves_is_refused(index):
    with pytest.raises(StrataError, match=r"batching\.k=7 is larger than the 6 leaves"):
        Plan(index, BatchingConfig(global_batch_size=8, k=7))

    phases = [{"fraction": 0.5, "strategy": "random"}, {"fraction": 0.5, "k": 7}]
    with pytest.raises(StrataError, match=r"batching\.phases\.1\.k=7 is larger"):
        Plan(index, BatchingConfig(global_batch_size=8, phases=phases))


def test_weights_of_sources_that_are_not_there_are_refused(index):
    with pytest.raises(
        StrataError, match=r"batching\.source_weights\.d: no such source; there are a, b, c"
    ):
        Plan(index, BatchingConfig(global_batch_size=8, source_weights={"d": 2}))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"phases": [{"fraction": 0.5}, {"fraction": 0.4}]},
            "phases: the fractions of the 2 phases add up to 0.9",
        ),
        (
            {"phases": [{"fraction": 0}, {"fraction": 1}]},
            "phases.0.fraction: Input should be greater than 0",
        ),
        (
            {"phases": [{"fraction": 1, "kk": 3}]},
            r"phases.0.kk: unknown setting; did you mean phases.\*.k\?",
        ),
        (
            {"source_weights": {"a": 0}},
            r"source_weights.a: Input should be greater than 0 \(got 0\)",
        ),
        (
            {"strategy": "topic", "clusters_per_batch": 3},
            "clusters_per_batch=3 does not divide global_batch_size=16",
        ),
        ({"strategy": "random", "max_source_fraction": 0.5}, "a random batch mixes all sources"),
        (
            {"phases": [{"fraction": 1, "strategy": "random"}], "source_weights": {"a": 2}},
            "a random batch mixes",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(StrataError, match=message):
        validate(BatchingConfig, {"global_batch_size": 16, **changes}, "recipe")


def test_a_plan_costs_memory_and_time_in_strata_not_rows(make_index):
    tracemalloc.start()
    (phase,) = Plan(
        make_index({"a": [100_000_000] * 10}), BatchingConfig(global_batch_size=4096)
    ).phases
    phase.batch(0, 0)
    started = time.perf_counter()
    assert phase.batch(5, phase.num_batches - 1).rows.max() < 10**9
    assert (
        time.perf_counter() - started < 1
    )  # not a speed test: a scan of a billion rows would take far longer
    assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    tracemalloc.stop()


def written_out_index():
    """An index whose trees are written out, so that a record of its batches rests on no other
    code.
    """
    leaves = {"a": [130, 7, 64, 33, 0, 90], "b": [50, 50], "c": [10]}
    merges = {"a": [[0, 1], [3, 4], [6, 2], [7, 5], [8, 9]], "b": [[0, 1]], "c": []}
    rows = [
        {"source": source, "leaf": leaf, "file": 0, "row_group": 0, "num_rows": count}
        for source, counts in leaves.items()
        for leaf, count in enumerate(counts)
    ]
    first_rows = np.cumsum([0, *(row["num_rows"] for row in rows)]).tolist()
    rows = [{**row, "first_row": first} for row, first in zip(rows, first_rows, strict=False)]
    trees = {
        source: Tree(len(leaves[source]), np.array(pairs, np.int32).reshape(-1, 2))
        for source, pairs in merges.items()
    }
    return ShardIndex(pa.Table.from_pylist(rows, schema=INDEX), trees)


def written_out_neighbors(num_rows):
    """A table of neighbors by arithmetic; every seventh row has none, every fifth has two."""
    rows = np.arange(num_rows)[:, None]
    table = (rows + np.arange(1, 9) ** 2) % num_rows
    table[rows[:, 0] % 7 == 0] = NOBODY
    table[rows[:, 0] % 5 == 0, 2:] = NOBODY
    return table


THREE = [
    {"fraction": 0.2, "strategy": "random"},
    {"fraction": 0.5, "k": 3},
    {"fraction": 0.3, "strategy": "neighbors", "k": 2},
]
EQUAL = [{"fraction": 0.5, "strategy": "source"}, {"fraction": 0.5, "strategy": "source"}]
RECORDED = [
    ({"strategy": "random"}, "bc24eb8c5cd42e66", "7dd10923ff1527a7"),
    ({"strategy": "random", "seed": 7}, "fa2435bbed0089ff", "ec3714527a594b92"),
    ({"strategy": "source"}, "222b5f12f5cb37f7", "4adfa2c4b434480a"),
    (
        {"strategy": "source", "source_weights": {"a": 0.3, "b": 3}},
        "0029981cc111e4bd",
        "9b081a789cde741c",
    ),
    ({"strategy": "source", "max_source_fraction": 0.6}, "2853b28d7d5502d1", "bc1ab1661b5abcbd"),
    ({"strategy": "cluster", "leftover": "drop"}, "644f2e0fd52106a2", "6031120250076275"),
    ({"strategy": "cluster", "leftover": "merge"}, "348a0f892f0c7ae2", "73db248501d42494"),
    ({"strategy": "cluster", "leftover": "source"}, "6cd784f488b8337c", "ff41a59b8d9d3be2"),
    (
        {"k": 2, "source_weights": {"b": 2.5}, "max_source_fraction": 0.7, "seed": 1},
        "fe36855ae080464f",
        "a69fc47186775d60",
    ),
    ({"strategy": "topic", "leftover": "drop"}, "2ef34f7be8d8566c", "8573a3967d4c2df5"),
    (
        {"strategy": "topic", "leftover": "merge", "clusters_per_batch": 2, "k": 4},
        "c36819c4f05d03b0",
        "3dc79d1d6b9a06c7",
    ),
    (
        {"strategy": "topic", "leftover": "source", "clusters_per_batch": 8},
        "d663ab63a71a6dcd",
        "e8dbf79d5bc4ecda",
    ),
    (
        {"strategy": "topic", "source_weights": {"a": 1.5}, "max_source_fraction": 0.9},
        "46b1d2aebb32980b",
        "6673d41112c2dc57",
    ),
    ({"strategy": "neighbors"}, "c1a1e55b7f9a153a", "58960ba49cc6f817"),
    (
        {"strategy": "neighbors", "neighbors": {"per_seed": 7, "refresh_every_steps": 4}, "k": 3},
        "4f4fbd6a56ebb53d",
        "f5da9c051cdba66e",
    ),
    (
        {"strategy": "neighbors", "source_weights": {"a": 2, "b": 0.5}, "seed": 3},
        "81f0e5e63ce1c1c2",
        "4b5de8335f71433e",
    ),
    ({"phases": THREE}, "7160a89e8cda1b08", "50d772dff66e551d"),
    ({"phases": EQUAL}, "04488ec58b7b174d", "991bdb2fe722c985"),
]


def record(index, config, num_steps):
    """A digest of all that the batches of a run are, and of what they are trained on."""
    plan = Plan(index, config)
    digest = hashlib.sha256()
    for step in range(num_steps):
        mining = plan.mining(step, num_steps)
        table = written_out_neighbors(index.num_rows) if mining else None
        batch = plan.step(step, num_steps, table)
        digest.update(batch.rows.astype("<i8").tobytes())
        said = (batch.strata, batch.label, batch.phase, batch.epoch)
        mined = mining and (mining.step, mining.phase, mining.by_student)
        digest.update(repr((said, mined)).encode())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize("chosen, batches, name", RECORDED)
def test_same_settings_make_the_batches_recorded_before(chosen, batches, name):
    config = BatchingConfig(global_batch_size=24, **chosen)
    assert fingerprint(config) == name
    assert record(written_out_index(), config, 90) == batches
