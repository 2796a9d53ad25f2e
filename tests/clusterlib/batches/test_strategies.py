from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterlib.artifacts.config import fingerprint, validate
from clusterlib.batches.plan import BatchingConfig, Plan
from clusterlib.batches.strategies import STRATEGIES, BatchShape, FillConfig
from clusterlib.batches.visits import summarize
from clusterlib.errors import StrataError

# What each strategy's strata are: the name of that which a row of a source's cluster belongs to.
STRATUM = {
    "random": "all",
    "source": "{source}",
    "cluster": "{source}/{cluster}",
    "topic": "{source}/{cluster}",
    "neighbors": "{source}",
}
SHAPE = {"topic": BatchShape(8, 4), "neighbors": BatchShape(1, 16)}


@pytest.mark.parametrize("k", [1, 2, 4, None])
@pytest.mark.parametrize("name", STRATEGIES)
def test_strata_hold_what_the_strategy_says_in_leaf_order(index, owners, name, k):
    strata = STRATEGIES[name].strata(index, k)
    in_order = [stratum for each in strata.values() for stratum in each]
    ends = np.cumsum([stratum.num_rows for stratum in in_order])
    assert [stratum.first_row for stratum in in_order] == [0, *ends[:-1].tolist()]
    assert [stratum.name for stratum in in_order for _ in range(stratum.num_rows)] == [
        STRATUM[name].format(source=source, cluster=cluster)
        for source, cluster in owners(index, k or 6)
    ]


@pytest.mark.parametrize("name", STRATEGIES)
def test_shapes_of_batches(name):
    config = FillConfig(
        global_batch_size=32, clusters_per_batch=8, neighbors={"per_seed": 1, "last_rank": 4}
    )
    assert STRATEGIES[name].shape(config) == SHAPE.get(name, BatchShape(1, 32))


def test_settings_say_what_each_strategy_is_and_which_there_are():
    for name, strategy in STRATEGIES.items():
        assert f"{name}: {strategy.description}" in FillConfig.model_fields["strategy"].description
        assert set(strategy.uses) < set(FillConfig.model_fields)
    with pytest.raises(StrataError) as raised:
        validate(BatchingConfig, {"global_batch_size": 4, "strategy": "clutser"}, "recipe")
    assert str(raised.value).startswith("recipe: strategy: Input should be 'random', 'source', ")
    assert str(raised.value).endswith(" (got 'clutser')")
    assert all(f"'{name}'" in str(raised.value).splitlines()[0] for name in STRATEGIES)


def test_groups_of_neighbors_must_divide_the_batch():
    with pytest.raises(
        StrataError, match="neighbors.per_seed=3 makes groups of 4 pairs, which do not divide"
    ):
        validate(BatchingConfig, {"global_batch_size": 18, "strategy": "neighbors"}, "recipe")


def test_topic_fills_a_batch_from_several_clusters_topped_up_from_the_nearest(
    make_index, owners, epoch_of
):
    # Each cluster alone is smaller than a batch; that of 3 rows fills no quarter without its
    # neighbor.
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


def test_k_joins_leaves_along_the_tree(index):
    for k, expected in ((1, 3), (2, 5), (None, 9), (6, 9)):  # c has one leaf, b two, a six
        assert (
            len(Plan(index, BatchingConfig(global_batch_size=2, k=k)).phases[0].strata) == expected
        )


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


STRATEGY = st.sampled_from(list(STRATEGIES))
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
        names = {each["strategy"] or chosen["strategy"] for each in phases}
        if any(STRATEGIES[name].mixes_sources for name in names):
            del chosen["source_weights"], chosen["max_source_fraction"]
    return BatchingConfig(**first), BatchingConfig(**second)


def seen_of(index, config, neighbors_at):
    """All that a run sees of its plan; None where it has none.

    neighbors_at: k and width -> a table of neighbors.
    """
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
            table = neighbors_at(k or 9, config.neighbors.num_ranks)
            seen.append(config.neighbors)  # all of which says what is mined
        batch = plan.step(step, 6, table)
        seen.append(
            (mining, batch.rows.tolist(), batch.strata, batch.label, batch.phase, batch.epoch)
        )
    return seen


@pytest.mark.parametrize("name", DRAWN)
def test_a_setting_that_changes_any_batch_makes_another_model(
    make_index, owners, some_neighbors, name
):
    index = make_index({"a": [13, 7, 22], "b": [17, 9]})

    def neighbors_at(k, width):
        return some_neighbors(owners(index, k), width)

    @settings(max_examples=50, deadline=None)
    @given(similar_settings(name))
    def check(pair):
        first, second = (seen_of(index, config, neighbors_at) for config in pair)
        assert first == second or fingerprint(pair[0]) != fingerprint(pair[1])

    check()
