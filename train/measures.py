"""The measures of a step, one list: the loss, the table of steps, checkpoints, trackers and the
report's charts follow it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from clusterlib.batches.plan import Batch

_BINS = 20  # of the histograms of similarities, from -1 to 1
_HARDEST = 10  # negatives of a query that its hardness is taken of


@dataclass(frozen=True)
class Scores:
    """What the loss knows of a block: r of a rank's rows, their positives among N columns.

    Attributes:
        similarity: float32 [r, N].
        log_probability: float32 [r, N], of the softmax over a row's positive and negatives; -inf
            elsewhere.
        positive: int64 [r, 1], the column of each row's positive.
        masked: bool [r, N], columns that are neither.
        masked_by_teacher: bool [r, N], what the teacher alone masks, perhaps with the positive.
    """

    similarity: Tensor
    log_probability: Tensor
    positive: Tensor
    masked: Tensor
    masked_by_teacher: Tensor

    @cached_property
    def of_positive(self) -> Tensor:
        """Similarity of each row's positive, [r, 1]."""
        return self.similarity.gather(1, self.positive)

    @cached_property
    def of_negatives(self) -> Tensor:
        """Similarities of each row's negatives, [r, N]; -inf elsewhere."""
        others = self.masked.scatter(1, self.positive, True)
        return self.similarity.masked_fill(others, -torch.inf)

    @cached_property
    def of_hardest(self) -> Tensor:
        """The highest similarities of each row's negatives, falling, [r, 10 at most]; -inf where
        there are no more.
        """
        return self.of_negatives.topk(min(_HARDEST, self.masked.shape[1]), dim=1).values

    def share(self, columns: Tensor) -> Tensor:
        """Of all pairings but the positives, those in bool [r, N]: the sum over rows, a scalar."""
        return columns.sum() / max(columns.shape[1] - 1, 1)


@dataclass(frozen=True)
class Step:
    """What is known of a step when it is done.

    Attributes:
        number: steps before it.
        of_pairs: the measures of pairs, by name.
        gradient_norm: before clipping.
        num_tokens: of the global batch, padding left out.
        seconds: by part, as train.clock.Clock has them.
    """

    number: int
    batch: Batch
    of_pairs: Mapping[str, Any]
    learning_rate: float
    gradient_norm: float
    num_tokens: int
    seconds: Mapping[str, float]
    total_seconds: float


@dataclass(frozen=True)
class Measure:
    """A column of the table of steps; either of what follows makes it.

    Attributes:
        description: what it is, as a clause.
        of_pairs: the sum over a block's rows, a scalar or [bins]; the measure is the mean over the
            queries of the global batch.
        of_step: the value itself; where ranks differ, the first rank's counts.
        chart: title of the report's chart of it, if it has one.
    """

    name: str
    description: str
    of_pairs: Callable[[Scores], Tensor] | None = None
    of_step: Callable[[Step], Any] | None = None
    type: pa.DataType = pa.float64()
    chart: str | None = None


def _sum(values: Tensor) -> Tensor:
    return values.double().sum()


def _sum_of_means(similarity: Tensor) -> Tensor:
    """Of rows, with -inf left out; a row of nothing else counts as 0."""
    absent = similarity.isinf()
    sums = similarity.masked_fill(absent, 0).sum(dim=1)
    return _sum(sums / (~absent).sum(dim=1).clamp(min=1))


def _histogram(similarity: Tensor) -> Tensor:
    """How many lie in each of equal bins from -1 to 1, with room for rounding; -inf in none."""
    return torch.histc(similarity.float(), _BINS, min=-1.000001, max=1.000001)


def _part(name: str, description: str) -> Measure:
    """The seconds of a part of the step; none where it had no such part."""
    return Measure(f"{name}_seconds", description, of_step=lambda step: step.seconds.get(name))


_COUNT, _HISTOGRAM = pa.int64(), pa.list_(pa.float64(), _BINS)

MEASURES = (
    Measure("step", "steps before it", of_step=lambda step: step.number, type=_COUNT),
    Measure("phase", "number of its phase", of_step=lambda step: step.batch.phase, type=_COUNT),
    Measure("epoch", "epoch of the phase", of_step=lambda step: step.batch.epoch, type=_COUNT),
    Measure(
        "stratum",
        "what its batch was drawn from",
        of_step=lambda step: step.batch.label,
        type=pa.string(),
    ),
    Measure(
        "loss",
        "mean InfoNCE over the directions and widths that train.loss asks for",
        lambda scores: _sum(-scores.log_probability.gather(1, scores.positive)),
        chart="Loss",
    ),
    Measure(
        "accuracy",
        "share of queries nearer to their positive than to any negative",
        lambda scores: (scores.of_positive > scores.of_hardest[:, :1]).sum(),
        chart="In-batch accuracy",
    ),
    Measure(
        "positive_similarity",
        "similarity of a query to its positive",
        lambda scores: _sum(scores.of_positive),
        chart="Similarity of positives",
    ),
    Measure(
        "negative_similarity",
        "mean similarity of a query to its negatives",
        lambda scores: _sum_of_means(scores.of_negatives),
    ),
    Measure(
        "hardness",
        f"mean similarity of a query to its {_HARDEST} nearest negatives",
        lambda scores: _sum_of_means(scores.of_hardest),
        chart="Hardness",
    ),
    Measure(
        "masked_fraction",
        "share of the in-batch negatives that were masked, for whatever reason",
        lambda scores: scores.share(scores.masked),
    ),
    Measure(
        "teacher_masked_fraction",
        "share of the in-batch negatives that the teacher alone masked",
        lambda scores: scores.share(scores.masked & scores.masked_by_teacher),
    ),
    Measure(
        "positive_histogram",
        "positives of a query, by similarity",
        lambda scores: _histogram(scores.of_positive),
        type=_HISTOGRAM,
    ),
    Measure(
        "negative_histogram",
        "negatives of a query, by similarity",
        lambda scores: _histogram(scores.of_negatives),
        type=_HISTOGRAM,
    ),
    Measure("learning_rate", "the learning rate", of_step=lambda step: step.learning_rate),
    Measure(
        "gradient_norm",
        "length of the gradient before clipping",
        of_step=lambda step: step.gradient_norm,
    ),
    Measure(
        "skipped",
        "whether the gradient was not finite, so that no weight changed",
        of_step=lambda step: not math.isfinite(step.gradient_norm),
        type=pa.bool_(),
    ),
    Measure(
        "num_tokens",
        "tokens of the global batch, padding left out",
        of_step=lambda step: step.num_tokens,
        type=_COUNT,
    ),
    Measure("step_seconds", "how long it took", of_step=lambda step: step.total_seconds),
    _part("mining", "mining or fetching neighbours, before steps that need others"),
    _part("data", "reading the batch"),
    _part("forward", "encoding and the loss; with GradCache, its first pass"),
    _part("backward", "going back; with GradCache, its second pass, forward and backward"),
    _part("reduce", "reducing gradients and, for ZeRO, clipping them"),
    _part("optimizer", "updating weights and, for ZeRO, gathering them"),
)

# A row for every optimizer step.
STEPS = pa.schema([(measure.name, measure.type) for measure in MEASURES])

_OF_PAIRS = {measure.name: measure for measure in MEASURES if measure.of_pairs}
_SIZES = [_BINS if measure.type == _HISTOGRAM else 1 for measure in _OF_PAIRS.values()]
NUM_VALUES = sum(_SIZES)  # M, of all measures of pairs, one after the other
LOSS = sum(_SIZES[: list(_OF_PAIRS).index("loss")])  # the place of the loss among them


def totals(scores: Scores) -> Tensor:
    """Sums over a block's rows of all measures of pairs, float64 [M]."""
    values = [measure.of_pairs(scores) for measure in MEASURES if measure.of_pairs]
    return torch.cat([value.double().reshape(-1) for value in values])


def by_name(values: Tensor) -> dict[str, Any]:
    """The measures of pairs [M] under their names: numbers, and lists where they are histograms."""
    parts = zip(_OF_PAIRS, values.cpu().split(_SIZES), strict=True)  # one wait for the device
    return {name: part.tolist() if len(part) > 1 else float(part) for name, part in parts}


def record(step: Step) -> dict[str, Any]:
    """A row of schema STEPS."""
    return {
        measure.name: measure.of_step(step) if measure.of_step else step.of_pairs[measure.name]
        for measure in MEASURES
    }


def scalars(row: Mapping[str, Any], batch_size: int) -> dict[str, float]:
    """What trackers show of a row of schema STEPS, by their names."""
    numbers = {f"train/{name}": value for name, value in row.items() if isinstance(value, float)}
    return {**numbers, "train/pairs_per_second": batch_size / row["step_seconds"]}
