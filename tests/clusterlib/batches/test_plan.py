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
from clusterlib.batches.visits import summarize
from clusterlib.clusters.shards import ShardIndex
from clusterlib.clusters.tree import Tree, build
from clusterlib.errors import StrataError


def make_index(sizes, num_files=1):
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


def owners(index, k):
    """(source, cluster) of every row in leaf order, at a cut of k."""
    found = []
    for source in index.sources:
        tree = index.trees[source]
        leaf_sizes = np.diff(index.leaf_starts[source])
        for number, node in enumerate(tree.cut(min(k, tree.num_leaves))):
            rows = leaf_sizes[node.first_leaf : node.first_leaf + node.num_leaves].sum()
            found += [(source, number)] * int(rows)
    return found


def epoch_of(phase, epoch, neighbors=None):
    return [phase.batch(epoch, index, neighbors) for index in range(phase.num_batches)]


def some_neighbors(owner, width):
    """A table of neighbours drawn from each row's own cluster; some rows have none."""
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


SIZES = {"a": [130, 7, 64, 33, 0, 90], "b": [50, 50], "c": [10]}

all_sizes = st.dictionaries(
    st.sampled_from("abc"),
    st.lists(st.integers(0, 70), min_size=1, max_size=9),
    min_size=1,
    max_size=3,
)


@st.composite
def settings_of_batches(draw):
    """Settings of one phase, valid but for what only the index tells."""
    strategy = draw(st.sampled_from(["random", "source", "cluster", "topic", "neighbors"]))
    parts = draw(st.integers(2, 5))  # of a topic batch; or pairs of a group of neighbours
    chosen = {
        "strategy": strategy,
        "k": draw(st.integers(1, 12)),
        "clusters_per_batch": parts,
        "global_batch_size": draw(st.integers(1, 8)) * parts
        if strategy in ("topic", "neighbors")
        else draw(st.integers(2, 40)),
        "neighbors": {"per_seed": parts - 1, "last_rank": 6},
        "leftover": draw(st.sampled_from(["drop", "merge", "source"])),
        "seed": draw(st.integers(0, 5)),
    }
    if strategy != "random":
        weight = st.sampled_from([0.1, 0.5, 1, 1.5, 3])
        chosen["source_weights"] = draw(st.dictionaries(st.sampled_from("abc"), weight))
        chosen["max_source_fraction"] = draw(st.sampled_from([None, 0.4, 0.5, 0.8]))
    return chosen


@settings(max_examples=200, deadline=None)
@given(all_sizes, settings_of_batches())
def test_purity_coverage_shares_and_determinism(sizes, chosen):
    index = make_index(sizes)
    k = chosen["k"] = min(chosen["k"], max(len(leaves) for leaves in sizes.values()))
    chosen["source_weights"] = {
        s: w for s, w in chosen.get("source_weights", {}).items() if s in sizes
    }
    config = BatchingConfig(**chosen)
    strategy, leftover, size = config.strategy, config.leftover, config.global_batch_size
    block = size // config.clusters_per_batch if strategy in ("topic", "neighbors") else size
    visited_rows = block if strategy == "neighbors" else size
    owner = owners(index, k)
    table = some_neighbors(owner, 6) if strategy == "neighbors" else None
    clusters = Counter(owner)
    sources = Counter(source for source, _ in owner)

    # How many batches there should be, counted from the sizes alone.
    laps = {}
    for source in sources:
        whole = [count for (name, _), count in clusters.items() if name == source]
        alone = strategy in ("cluster", "topic") and leftover == "drop"
        num_blocks = sum(count // block for count in whole) if alone else sum(whole) // block
        laps[source] = num_blocks * block // visited_rows if sum(whole) >= size else 0
    if strategy == "random":
        sources = Counter({"all": len(owner)})
        laps = {"all": len(owner) // size}
    wanted = {
        source: int(np.ceil(config.source_weights.get(source, 1) * lap))
        for source, lap in laps.items()
    }
    most = max(wanted.values(), default=0)
    if config.max_source_fraction:
        while (
            most
            and most
            > config.max_source_fraction * sum(min(n, most) for n in wanted.values()) + 1e-9
        ):
            most -= 1
    expected = {source: min(count, most) for source, count in wanted.items()}
    try:
        plan = Plan(index, config)
    except StrataError as error:
        assert ("no stratum fills a batch" in str(error)) == (not any(laps.values()))
        assert ("max_source_fraction" in str(error)) == (any(laps.values()) and not most)
        return
    (phase,) = plan.phases
    assert phase.num_batches == sum(expected.values())

    visits = {source: Counter() for source in sources}
    num_pure = 0
    for epoch in range(3):
        batches = epoch_of(phase, epoch, table)
        counts = Counter()
        for batch in batches:
            assert len(batch.rows) == len(set(batch.rows.tolist())) == size
            assert (batch.phase, batch.epoch) == (0, epoch)
            found = Counter(owner[row] for row in batch.rows)
            source = "all" if strategy == "random" else next(iter(found))[0]
            if strategy != "random":
                assert {name for name, _ in found} == {source}
            if strategy in ("cluster", "topic"):
                assert {phase.strata[s].name for s in batch.strata} == {
                    f"{name}/{c}" for name, c in found
                }
                if leftover == "drop":
                    assert all(count % block == 0 for count in found.values())
            assert batch.label == (
                phase.strata[batch.strata[0]].name if len(batch.strata) == 1 else f"{source}/mixed"
            )
            num_pure += len(batch.strata) == 1
            counts[source] += 1
            visits[source].update(batch.rows[:visited_rows].tolist())
            if strategy == "neighbors":
                near = set(table[batch.rows[:visited_rows]].ravel().tolist())
                brought = [row for row in batch.rows[visited_rows:].tolist() if row in near]
                # Rows that are nobody's neighbours come only when all neighbours are there.
                assert len(brought) == size - visited_rows or not near - set(
                    batch.rows.tolist()
                ) - {NOBODY}
        assert counts == Counter(expected)
        if epoch == 0:
            (summary,) = summarize(plan, 10 * phase.num_batches)
            total = summary.total
            assert (summary.num_epochs, total.num_batches, total.num_rows) == (
                10,
                len(batches),
                len(owner),
            )
            if strategy != "topic" and expected == laps:
                assert total.pure_fraction == pytest.approx(num_pure / len(batches))
            assert total.num_dropped_rows == len(owner) - visited_rows * sum(laps.values())
            visited = sum(len(rows) for rows in visits.values())
            repeated = len(batches) * visited_rows - visited
            if not total.num_repeated_rows:
                assert repeated == 0 and visited == pytest.approx(
                    total.coverage_fraction * len(owner)
                )
            elif not total.num_dropped_rows:
                assert repeated == total.num_repeated_rows

    # No row comes again before the source's lap is over, whatever the weights and the cap.
    for source, rows in visits.items():
        if expected.get(source):
            made = 3 * expected[source]
            assert max(rows.values()) <= -(-made // laps[source])
            if laps[source] * visited_rows == sources[source] and made >= laps[source]:
                assert len(rows) == sources[source] and min(rows.values()) >= made // laps[source]

    # Any batch alone, from a new plan over other files, is the same.
    again = Plan(make_index(sizes, num_files=3), config).phases[0]
    for some in {0, phase.num_batches // 2, phase.num_batches - 1}:
        np.testing.assert_array_equal(
            phase.batch(2, some, table).rows, again.batch(2, some, table).rows
        )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 9),
            st.sampled_from(["random", "source", "cluster", "topic"]),
            st.integers(1, 6),
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 300),
    st.floats(0.1, 9),
)
def test_phases_share_the_steps_and_each_runs_through_its_own_epochs(shares, num_steps, epochs):
    whole = sum(share for share, _, _ in shares)
    phases = [
        {"fraction": share / whole, "strategy": strategy, "k": k} for share, strategy, k in shares
    ]
    plan = Plan(make_index(SIZES), BatchingConfig(global_batch_size=16, phases=phases))
    batches = [plan.step(step, num_steps) for step in range(num_steps)]
    numbers = [batch.phase for batch in batches]
    assert numbers == sorted(numbers)
    for number, (phase, asked) in enumerate(zip(plan.phases, phases, strict=True)):
        mine = [batch for batch in batches if batch.phase == number]
        assert abs(len(mine) - asked["fraction"] * num_steps) <= 1
        # The phase's own epochs, one after the other, of the strata it would have alone.
        alone = Plan(
            make_index(SIZES),
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


def test_neighbors_are_mined_at_the_start_of_their_phase_and_refreshed():
    phases = [
        {"fraction": 0.3, "strategy": "source"},
        {"fraction": 0.7, "strategy": "neighbors", "k": 2},
    ]
    neighbors = {"per_seed": 3, "refresh_every_steps": 3}
    plan = Plan(
        make_index(SIZES), BatchingConfig(global_batch_size=16, phases=phases, neighbors=neighbors)
    )
    mined = [plan.mining(step, 10) for step in range(10)]
    assert mined[:3] == [None] * 3
    assert [mining.step for mining in mined[3:]] == [3, 3, 3, 6, 6, 6, 9]
    assert [mining.by_student for mining in mined[3:]] == [False] * 3 + [True] * 4
    assert [(s.name, s.num_rows) for s in plan.phases[1].searched] == [
        (s.name, s.num_rows)
        for s in Plan(make_index(SIZES), BatchingConfig(global_batch_size=16, k=2)).phases[0].strata
    ]
    with pytest.raises(ValueError, match="without a table of neighbours"):
        plan.step(5, 10)
    once = BatchingConfig(global_batch_size=16, strategy="neighbors")
    assert {Plan(make_index(SIZES), once).mining(step, 10) for step in range(10)} == {
        Mining(0, 0, False)
    }


def test_groups_of_neighbours_must_divide_the_batch():
    with pytest.raises(
        StrataError, match="neighbors.per_seed=3 makes groups of 4 pairs, which do not divide"
    ):
        validate(BatchingConfig, {"global_batch_size": 18, "strategy": "neighbors"}, "recipe")


def test_equal_phases_are_shuffled_apart():
    half = {"fraction": 0.5, "strategy": "source"}
    first, second = Plan(
        make_index(SIZES), BatchingConfig(global_batch_size=16, phases=[half, half])
    ).phases
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


def test_epochs_and_seeds_differ_and_steps_run_through_epochs():
    plan = Plan(make_index(SIZES), BatchingConfig(global_batch_size=16))
    (phase,) = plan.phases
    (other,) = Plan(make_index(SIZES), BatchingConfig(global_batch_size=16, seed=1)).phases
    assert set(phase.batch(0, 0).rows.tolist()) != set(phase.batch(1, 0).rows.tolist())
    assert set(phase.batch(0, 0).rows.tolist()) != set(other.batch(0, 0).rows.tolist())
    np.testing.assert_array_equal(
        plan.step(phase.num_batches + 2, 1000).rows, phase.batch(1, 2).rows
    )
    with pytest.raises(IndexError):
        phase.batch(0, phase.num_batches)


def test_dropped_rows_change_every_epoch():
    plan = Plan(make_index({"a": [100]}), BatchingConfig(global_batch_size=64, leftover="drop"))
    seen = {row for step in range(12) for row in plan.step(step, 12).rows.tolist()}
    assert len(seen) == 100


def test_weights_repeat_rows_or_leave_them_to_the_next_epoch():
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


def test_a_cap_cuts_the_largest_sources_to_equal_shares():
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


def test_topic_fills_a_batch_from_several_clusters_topped_up_from_the_nearest():
    # Each cluster alone is smaller than a batch; that of 3 rows fills no quarter without its
    # neighbour.
    index = make_index({"a": [8, 3, 8, 5, 8, 8]})
    plan = Plan(index, BatchingConfig(strategy="topic", global_batch_size=16, clusters_per_batch=4))
    (phase,) = plan.phases
    batches = [batch for epoch in range(20) for batch in epoch_of(phase, epoch)]
    assert phase.num_batches == 2
    assert (
        len({frozenset(batch.strata) for batch in batches}) > 10
    )  # which clusters meet changes every epoch
    owner = owners(index, 6)
    merged = [Counter(owner[row] for row in batch.rows) for batch in batches]
    assert {
        count for found in merged for (_, cluster), count in found.items() if cluster not in (1, 3)
    } <= {4, 8}
    assert any(("a", 1) in found for found in merged) and any(found["a", 3] % 4 for found in merged)


def test_k_joins_leaves_along_the_tree():
    index = make_index(SIZES)
    for k, expected in ((1, 3), (2, 5), (None, 9), (6, 9)):  # c has one leaf, b two, a six
        assert (
            len(Plan(index, BatchingConfig(global_batch_size=2, k=k)).phases[0].strata) == expected
        )


def test_merged_batches_join_neighbours_first():
    """With four equal rests, the two nearest clusters fill a batch together before a third is
    asked.
    """
    index = make_index({"a": [8, 8, 8, 8]})
    (phase,) = Plan(index, BatchingConfig(global_batch_size=16, leftover="merge")).phases
    left, right, _ = next(index.trees["a"].merges_above(4))
    assert {left, right} in [set(batch.strata) for batch in epoch_of(phase, 0)]
    assert phase.num_batches == 2 and phase.sources[0].num_pure_blocks == 0


def test_a_batch_larger_than_every_stratum_is_refused_with_the_largest():
    with pytest.raises(
        StrataError,
        match=r"global_batch_size=200: no stratum.*a/0 with 130 rows.*merge \(it is drop",
    ):
        Plan(make_index(SIZES), BatchingConfig(global_batch_size=200, leftover="drop"))


def test_k_above_the_leaves_is_refused():
    with pytest.raises(StrataError, match=r"batching\.k=7 is larger than the 6 leaves"):
        Plan(make_index(SIZES), BatchingConfig(global_batch_size=8, k=7))

    phases = [{"fraction": 0.5, "strategy": "random"}, {"fraction": 0.5, "k": 7}]
    with pytest.raises(StrataError, match=r"batching\.phases\.1\.k=7 is larger"):
        Plan(make_index(SIZES), BatchingConfig(global_batch_size=8, phases=phases))


def test_weights_of_sources_that_are_not_there_are_refused():
    with pytest.raises(
        StrataError, match=r"batching\.source_weights\.d: no such source; there are a, b, c"
    ):
        Plan(make_index(SIZES), BatchingConfig(global_batch_size=8, source_weights={"d": 2}))


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
        ({"source_weights": {"a": 0}}, "source_weights: a has weight 0.0; give a positive number"),
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


def test_a_plan_costs_memory_and_time_in_strata_not_rows():
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


BASE = {"global_batch_size": 24, "seed": 3}
HALVES = [{"fraction": 0.5, "strategy": "random"}, {"fraction": 0.5, "strategy": "cluster", "k": 2}]
UNUSED = [
    ({"strategy": "random"}, {"k": 5}),
    (
        {"strategy": "random"},
        {"leftover": "drop", "clusters_per_batch": 2, "neighbors": {"per_seed": 2}},
    ),
    ({"strategy": "source", "k": 2}, {"k": 5}),
    ({"strategy": "source"}, {"leftover": "source", "clusters_per_batch": 3}),
    ({"strategy": "cluster", "k": 2}, {"clusters_per_batch": 2, "neighbors": {"margin": 0.5}}),
    ({"strategy": "topic", "k": 2}, {"neighbors": {"refresh_every_steps": 9}}),
    ({"strategy": "neighbors", "k": 2}, {"leftover": "drop", "clusters_per_batch": 2}),
    ({"strategy": "cluster"}, {"phases": [{"fraction": 1}]}),
    (
        {"strategy": "cluster"},
        {"strategy": "source", "phases": [{"fraction": 1, "strategy": "cluster"}]},
    ),
    ({"phases": HALVES}, {"strategy": "topic", "k": 6}),
    ({"phases": HALVES}, {"phases": [{**HALVES[0], "k": 5}, HALVES[1]]}),
    ({"strategy": "source"}, {"source_weights": {"a": 1}, "max_source_fraction": 1}),
]


@pytest.mark.parametrize("settings, changes", UNUSED)
def test_settings_that_a_strategy_does_not_use_make_no_other_model(settings, changes):
    before, after = (
        BatchingConfig(**BASE, **settings),
        BatchingConfig(**{**BASE, **settings, **changes}),
    )
    assert before != after and fingerprint(before) == fingerprint(after)


STRATEGY = st.sampled_from(["random", "source", "cluster", "topic", "neighbors"])
K = st.sampled_from([None, 1, 2, 3])
DRAWN = {
    "strategy": STRATEGY,
    "k": K,
    "global_batch_size": st.sampled_from([6, 12]),
    "clusters_per_batch": st.sampled_from([2, 3]),
    "neighbors": st.sampled_from(
        [
            {"last_rank": 4, "per_seed": 1, **changes}
            for changes in (
                {},
                {"per_seed": 2},
                {"first_rank": 1},
                {"margin": 1},
                {"refresh_every_steps": 2},
            )
        ]
    ),
    "leftover": st.sampled_from(["drop", "merge", "source"]),
    "phases": st.lists(
        st.fixed_dictionaries({"strategy": st.none() | STRATEGY, "k": K}), min_size=1, max_size=2
    ),
    "source_weights": st.dictionaries(st.sampled_from("ab"), st.sampled_from([0.5, 1, 2])),
    "max_source_fraction": st.sampled_from([None, 0.6, 1]),
    "seed": st.integers(0, 1),
}


@st.composite
def similar_settings(draw, name):
    """Two settings of batches that differ in one."""
    first = {name: draw(values) for name, values in DRAWN.items()}
    second = {**first, name: draw(DRAWN[name].filter(lambda value: value != first[name]))}
    for chosen in (first, second):
        phases = chosen["phases"]
        chosen["phases"] = [{**each, "fraction": 1 / len(phases)} for each in phases]
        if "random" in {each["strategy"] or chosen["strategy"] for each in phases}:
            del chosen["source_weights"], chosen["max_source_fraction"]
    return BatchingConfig(**first), BatchingConfig(**second)


def seen_of(index, config):
    """All that a run sees of its plan; None where it has none."""
    try:
        plan = Plan(index, config)
    except StrataError:
        return None
    seen = [summarize(plan, 6), plan.num_steps(3), [phase.searched for phase in plan.phases]]
    for step in range(6):
        mining = plan.mining(step, 6)
        table = None
        if mining:
            k = plan.phases[mining.phase].settings.k
            table = some_neighbors(owners(index, k or 9), config.neighbors.num_ranks)
            seen.append(config.neighbors)  # all of which says what is mined
        batch = plan.step(step, 6, table)
        seen.append(
            (mining, batch.rows.tolist(), batch.strata, batch.label, batch.phase, batch.epoch)
        )
    return seen


@pytest.mark.parametrize("name", DRAWN)
def test_a_setting_that_changes_any_batch_makes_another_model(name):
    index = make_index({"a": [13, 7, 22], "b": [17, 9]})

    @settings(max_examples=50, deadline=None)
    @given(similar_settings(name))
    def check(pair):
        first, second = (seen_of(index, config) for config in pair)
        assert first == second or fingerprint(pair[0]) != fingerprint(pair[1])

    check()


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
