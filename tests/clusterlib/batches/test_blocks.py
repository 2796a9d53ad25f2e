import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterlib.artifacts.config import validate
from clusterlib.batches.blocks import LEFTOVERS, Segment, cut_blocks, fill
from clusterlib.batches.plan import BatchingConfig, Plan
from clusterlib.batches.strategies import FillConfig, by_cluster
from clusterlib.errors import StrataError


def places_of(segments):
    return [(part.stratum, at) for part in segments for at in range(part.start, part.stop)]


@pytest.mark.parametrize("leftover", LEFTOVERS)
def test_blocks_are_full_and_no_place_is_in_two(make_index, leftover):
    @settings(max_examples=50, deadline=None)
    @given(
        st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 8), st.integers(1, 20)
    )
    def check(leaves, k, block_rows):
        index = make_index({"a": leaves, "b": [30]})
        strata = by_cluster(index, min(k, len(leaves)))
        for source in cut_blocks(index, strata, leftover, block_rows):
            blocks = [source.block(number) for number in range(source.num_blocks)]
            places = [places_of(block) for block in blocks]
            assert all(len(each) == block_rows for each in places)
            assert all(len(block) == 1 for block in blocks[: source.num_pure_blocks])
            taken = {place for each in places for place in each}
            assert len(taken) == len(blocks) * block_rows
            assert taken <= {
                (source.first_stratum + number, at)
                for number, stratum in enumerate(source.strata)
                for at in range(stratum.num_rows)
            }
            # What joins fills as many blocks as the source's rows could at most.
            if leftover != "drop":
                assert source.num_blocks == source.num_rows // block_rows

    check()


@given(st.lists(st.integers(0, 30), max_size=8), st.integers(1, 20))
def test_segments_fill_blocks_in_order_and_the_rest_remains(counts, block_rows):
    segments = [Segment(stratum, 5, 5 + count) for stratum, count in enumerate(counts)]
    blocks, rest = fill(segments, block_rows)
    assert places_of([*(part for block in blocks for part in block), *rest]) == places_of(segments)
    assert [len(places_of(block)) for block in blocks] == [block_rows] * (sum(counts) // block_rows)


def test_each_policy_puts_other_leftovers_together(make_index):
    index = make_index({"a": [8, 8, 8, 8]})
    left, right, _ = next(index.trees["a"].merges_above(4))
    assert (left, right) != (0, 1)  # or the nearest would be the first
    mixed = {
        leftover: cut_blocks(index, by_cluster(index, 4), leftover, 16)[0].mixed
        for leftover in LEFTOVERS
    }
    assert mixed["drop"] == []
    assert mixed["merge"][0] == [Segment(left, 0, 8), Segment(right, 0, 8)]
    assert mixed["source"] == [
        [Segment(0, 0, 8), Segment(1, 0, 8)],
        [Segment(2, 0, 8), Segment(3, 0, 8)],
    ]


def test_settings_say_what_each_policy_does_and_which_there_are():
    for name, leftover in LEFTOVERS.items():
        said = FillConfig.model_fields["leftover"].description
        assert f"{name}: {leftover.description}" in said
    with pytest.raises(StrataError) as raised:
        validate(BatchingConfig, {"global_batch_size": 4, "leftover": "keep"}, "recipe")
    assert str(raised.value).startswith("recipe: leftover: Input should be 'drop', 'merge' ")
    assert all(f"'{name}'" in str(raised.value).splitlines()[0] for name in LEFTOVERS)


def test_merged_batches_join_the_nearest_first(make_index, epoch_of):
    """With four equal rests, the two nearest clusters fill a batch together before a third is
    asked.
    """
    index = make_index({"a": [8, 8, 8, 8]})
    (phase,) = Plan(index, BatchingConfig(global_batch_size=16, leftover="merge")).phases
    left, right, _ = next(index.trees["a"].merges_above(4))
    assert {left, right} in [set(batch.strata) for batch in epoch_of(phase, 0)]
    assert phase.num_batches == 2 and phase.sources[0].num_pure_blocks == 0
