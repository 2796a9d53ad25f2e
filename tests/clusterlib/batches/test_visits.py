from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterlib.batches.plan import BatchingConfig, Plan
from clusterlib.batches.visits import summarize


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_a_summary_says_what_an_epoch_does(cases, epoch_of, data):
    case = data.draw(cases().filter(lambda case: case.phase))
    phase, plan = case.phase, Plan(case.index, case.config)
    (summary,) = summarize(plan, 10 * phase.num_batches)
    total = summary.total
    assert summary.num_epochs == 10 and summary.title == phase.settings.title
    assert (total.num_batches, total.num_rows) == (phase.num_batches, case.index.num_rows)
    batches = epoch_of(phase, 0, case.table)
    num_visited = phase.shape.num_blocks * phase.shape.block_rows
    visits = Counter(row for batch in batches for row in batch.rows[:num_visited].tolist())
    # Where an epoch is less or more than a lap, other blocks of it may be pure or visited again.
    if phase.epoch_batches == phase.lap_batches and phase.shape.num_blocks == 1:
        num_pure = sum(len(batch.strata) == 1 for batch in batches)
        assert total.pure_fraction == pytest.approx(num_pure / len(batches))
    assert total.num_dropped_rows == case.index.num_rows - num_visited * sum(phase.lap_batches)
    num_repeated = len(batches) * num_visited - len(visits)
    if not total.num_repeated_rows:
        assert num_repeated == 0
        assert len(visits) == pytest.approx(total.coverage_fraction * case.index.num_rows)
    elif not total.num_dropped_rows:
        assert num_repeated == total.num_repeated_rows


def test_a_source_has_its_own_line_and_the_phases_their_steps(index):
    phases = [{"fraction": 0.25, "strategy": "source"}, {"fraction": 0.75, "strategy": "cluster"}]
    plan = Plan(index, BatchingConfig(global_batch_size=16, phases=phases))
    first, second = summarize(plan, 40)
    assert (first.num_steps, second.num_steps) == (10, 30)
    for summary in (first, second):
        assert [source.source for source in summary.sources] == ["a", "b", "c"]
        assert sum(s.num_batches for s in summary.sources) == summary.total.num_batches
    assert second.total.num_strata == 9
    assert second.sources[0].batches_per_stratum == (
        0,
        np.median([130, 7, 64, 33, 0, 90]) / 16,
        130 / 16,
    )
