"""InfoNCE over the passages of all ranks, with masks, and what it says about a batch.

B pairs make a global batch, b of them on each rank; N passages are gathered from all ranks; D is the
embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from clusterlib.config import Config

_HARDEST = 10  # hardness is the mean similarity of this many most similar negatives


class LossConfig(Config):
    """The contrastive loss."""

    temperature: float = Field(0.02, gt=0, description="divides similarities; arXiv 2407.18887 uses 0.02")


@dataclass(frozen=True)
class LossOutput:
    """Loss and measures of one rank's rows, all means over its b queries.

    Attributes:
        loss: scalar with a graph.
        measures: float64 [6], in the order of MEASURES, without a graph.
    """

    loss: Tensor
    measures: Tensor


MEASURES = ("loss", "accuracy", "positive_similarity", "negative_similarity", "hardness", "masked_fraction")


def false_negatives(query_id: Tensor, passage_id: Tensor, all_query_id: Tensor, all_passage_id: Tensor) -> Tensor:
    """Passages that must not count as negatives, bool [b, N]; a query's own positive is among them.

    A passage is one if it equals the query's positive, or is known positive for the query because another
    pair joins the two.

    Args:
        query_id, passage_id: int64 [b], of this rank's pairs.
        all_query_id, all_passage_id: int64 [N], of all pairs.
    """
    return (passage_id[:, None] == all_passage_id) | (query_id[:, None] == all_query_id)


def info_nce(query: Tensor, passage: Tensor, positive: Tensor, masked: Tensor, temperature: float) -> LossOutput:
    """Mean over queries of -log softmax(similarity / temperature)[positive] (van den Oord et al. 2018,
    arXiv 1807.03748, eq. 4).

    Args:
        query: float32 [b, D], unit norm.
        passage: float32 [N, D], unit norm.
        positive: int64 [b], the column of each query's positive.
        masked: bool [b, N], passages left out of the softmax; the positive is kept whatever this says.
    """
    similarity = query @ passage.T
    is_positive = F.one_hot(positive, len(passage)).bool()
    excluded = masked & ~is_positive
    loss = F.cross_entropy((similarity / temperature).masked_fill(excluded, -torch.inf), positive)
    with torch.no_grad():
        no_negative = masked | is_positive
        of_positive = similarity.gather(1, positive[:, None]).squeeze(1)
        negatives = similarity.masked_fill(no_negative, -torch.inf)
        count = (~no_negative).sum(dim=1)
        top = negatives.topk(min(_HARDEST, len(passage)), dim=1).values
        usable = top.isfinite()
        measures = torch.stack(
            [
                loss.double(),
                (of_positive > negatives.max(dim=1).values).double().mean(),
                of_positive.double().mean(),
                _mean(similarity.masked_fill(no_negative, 0).sum(dim=1), count),
                _mean(top.masked_fill(~usable, 0).sum(dim=1), usable.sum(dim=1)),
                excluded.sum(dim=1).double().mean() / max(len(passage) - 1, 1),
            ]
        )
    return LossOutput(loss, measures)


def _mean(sums: Tensor, counts: Tensor) -> Tensor:
    """Mean over queries of sums / counts; a query without negatives counts as 0."""
    return (sums.double() / counts.clamp(min=1)).mean()
