"""Every measure against its definition, and the table they make."""

import math
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

from train.measures import MEASURES, STEPS, Scores, Step, by_name, record, scalars, totals

ROWS, COLUMNS = 5, 14
EDGES = np.linspace(-1, 1, 21)
TEMPERATURE = 0.1

# What a measure is for one query: of the similarity of its positive, those of its negatives, and
# the numbers of columns that ids and that the teacher masked.
OF_QUERY = {
    "loss": lambda positive, negatives, *_: (
        np.logaddexp.reduce(np.array([positive, *negatives]) / TEMPERATURE) - positive / TEMPERATURE
    ),
    "accuracy": lambda positive, negatives, *_: positive > max(negatives, default=-np.inf),
    "positive_similarity": lambda positive, *_: positive,
    "negative_similarity": lambda _, negatives, *__: np.mean(negatives or [0]),
    "hardness": lambda _, negatives, *__: np.mean(sorted(negatives)[-10:] or [0]),
    "masked_fraction": lambda *_, by_id, by_teacher: (by_id + by_teacher) / (COLUMNS - 1),
    "teacher_masked_fraction": lambda *_, by_id, by_teacher: by_teacher / (COLUMNS - 1),
    "positive_histogram": lambda positive, *_: np.histogram([positive], EDGES)[0],
    "negative_histogram": lambda _, negatives, *__: np.histogram(negatives, EDGES)[0],
}


@pytest.fixture
def masks():
    """Which columns ids and the teacher mask, bool [rows, columns] each; positives among them."""
    chance = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))
    by_id, by_teacher = chance < 0.1, (chance >= 0.1) & (chance < 0.3)
    by_id[0], by_teacher[0] = True, False  # a query with no negative at all
    by_teacher[:, :ROWS] |= torch.eye(ROWS, dtype=torch.bool)
    return by_id, by_teacher


def scores_of(similarity, masks, rows=slice(None)):
    """What the loss makes of these rows; the positive of row i is column i."""
    by_id, by_teacher = (mask[rows] for mask in masks)
    positive = torch.arange(ROWS)[rows, None]
    masked = (by_id | by_teacher).scatter(1, positive, False)
    logits = (similarity[rows] / TEMPERATURE).masked_fill(masked, -torch.inf)
    return Scores(similarity[rows], logits.log_softmax(dim=1), positive, masked, by_teacher)


@pytest.fixture
def similarity():
    generator = torch.Generator().manual_seed(0)
    rows, columns = (
        F.normalize(torch.randn(count, 3, generator=generator), dim=1) for count in (ROWS, COLUMNS)
    )
    return rows @ columns.T


def test_measures_of_pairs_equal_their_definitions(similarity, masks):
    found = by_name(totals(scores_of(similarity, masks)) / ROWS)
    assert set(found) == set(OF_QUERY)
    by_id, by_teacher = (mask.tolist() for mask in masks)
    expected = {name: [] for name in OF_QUERY}
    for row, values in enumerate(similarity.double().tolist()):
        others = [column for column in range(COLUMNS) if column != row]
        masked = [column for column in others if by_id[row][column]]
        by_teacher_alone = [column for column in others if by_teacher[row][column]]
        negatives = [values[c] for c in others if c not in (*masked, *by_teacher_alone)]
        counts = {"by_id": len(masked), "by_teacher": len(by_teacher_alone)}
        for name, measure in OF_QUERY.items():
            takes_counts = name.endswith("masked_fraction")
            value = measure(values[row], negatives, **(counts if takes_counts else {}))
            expected[name].append(value)
    for name, values in expected.items():
        assert found[name] == pytest.approx(np.mean(values, axis=0), abs=1e-6), name


@pytest.mark.parametrize("cut", range(1, ROWS))
def test_totals_of_blocks_add_up(similarity, masks, cut):
    parts = [totals(scores_of(similarity, masks, rows)) for rows in (slice(cut), slice(cut, None))]
    torch.testing.assert_close(sum(parts), totals(scores_of(similarity, masks)))


HISTOGRAM = pa.list_(pa.float64(), 20)


def test_the_table_of_steps_has_the_columns_that_files_hold():
    numbers = ("step", "phase", "epoch", "num_tokens")
    reals = (
        *("loss", "accuracy", "positive_similarity", "negative_similarity", "hardness"),
        *("masked_fraction", "teacher_masked_fraction", "learning_rate", "gradient_norm"),
        *("step_seconds", "mining_seconds", "data_seconds", "forward_seconds", "backward_seconds"),
        *("reduce_seconds", "optimizer_seconds"),
    )
    wanted = dict.fromkeys(numbers, pa.int64()) | dict.fromkeys(reals, pa.float64())
    wanted |= dict.fromkeys(("positive_histogram", "negative_histogram"), HISTOGRAM)
    wanted |= {"stratum": pa.string(), "skipped": pa.bool_()}
    found = {field.name: field.type for field in STEPS}
    assert {name: found.get(name) for name in wanted} == wanted


def step(similarity, masks, **changes):
    of_pairs = by_name(totals(scores_of(similarity, masks)) / ROWS)
    known = {
        "number": 7,
        "batch": SimpleNamespace(phase=1, epoch=2, label="a/mixed"),
        "of_pairs": of_pairs,
        "learning_rate": 0.5,
        "gradient_norm": 0.25,
        "num_tokens": 99,
        "seconds": {"data": 0.125, "forward": 1.0},
        "total_seconds": 2.0,
    }
    return Step(**{**known, **changes})


def test_a_record_is_a_row_of_the_table(similarity, masks):
    row = record(step(similarity, masks))
    assert pa.Table.from_pylist([row], schema=STEPS).to_pylist() == [row]
    wanted = {"step": 7, "phase": 1, "epoch": 2, "stratum": "a/mixed", "learning_rate": 0.5}
    wanted |= {"gradient_norm": 0.25, "skipped": False, "num_tokens": 99, "step_seconds": 2.0}
    wanted |= {"data_seconds": 0.125, "forward_seconds": 1.0, "reduce_seconds": None}
    assert {name: row[name] for name in wanted} == wanted
    for norm in (math.nan, math.inf):
        assert record(step(similarity, masks, gradient_norm=norm))["skipped"]


def test_trackers_show_numbers_and_the_rate(similarity, masks):
    shown = scalars(record(step(similarity, masks)), batch_size=8)
    assert shown["train/pairs_per_second"] == 4 and shown["train/data_seconds"] == 0.125
    of_pairs = set(OF_QUERY) - {"positive_histogram", "negative_histogram"}
    assert {f"train/{name}" for name in of_pairs} <= set(shown)
    assert not {"train/stratum", "train/skipped", "train/reduce_seconds"} & set(shown)


def test_every_measure_is_taken_in_one_way_and_says_what_it_is():
    for measure in MEASURES:
        assert (measure.of_pairs is None) != (measure.of_step is None), measure.name
        assert len(measure.description.split()) >= 3, measure.name
