"""InfoNCE over the pairs of all ranks, with masks, and what it says about a batch.

Scores are computed a block of rows at a time, gradients with them, so that memory grows with the
embeddings and not with the square of the batch.

B pairs make a global batch, b of them on each rank; rows are a rank's b queries (or passages),
columns the N passages (or queries) gathered from all ranks; r rows make a block; D is the embedding
width, E the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.autograd.function import once_differentiable

from clusterlib.artifacts.config import Config
from clusterlib.errors import StrataError
from train.measures import LOSS, NUM_VALUES, Scores, totals

# Scores in memory at once; float32, so 4 MiB for each of a few intermediate results.
_BLOCK_SCORES = 2**20


class LossConfig(Config):
    """The contrastive loss."""

    temperature: float = Field(
        0.02, gt=0, description="divides similarities; arXiv 2407.18887 uses 0.02"
    )
    bidirectional: bool = Field(
        False,
        description="also tell each passage's query from the other queries; the loss is the mean "
        "of the two",
    )
    matryoshka_dims: tuple[PositiveInt, ...] = Field(
        (),
        description="lengths of prefixes of the embedding that shall serve alone; the loss is the "
        "mean over them and the whole embedding (arXiv 2205.13147)",
    )
    teacher_margin: float | None = Field(
        None,
        ge=-2,
        le=2,
        description="a negative is masked if its teacher similarity to the query is at least the "
        "positive's minus this. 0 is CDE's rule (arXiv 2410.02525), which moves the bound up by a "
        "negative value; a positive value is NV-Retriever's TopK-MarginPos (arXiv 2407.15831; 0.05 "
        "there). Needs shard.teacher_vectors",
    )

    def check_width(self, width: int) -> None:
        """Refuse prefixes longer than the embedding.

        Raises:
            StrataError: there is one.
        """
        if max(self.matryoshka_dims, default=0) > width:
            raise StrataError(
                f"train.loss.matryoshka_dims={list(self.matryoshka_dims)}: the student's embedding "
                f"has {width} dimensions; name none above that"
            )


@dataclass(frozen=True)
class Pairs:
    """What tells false negatives among n pairs.

    Attributes:
        query_id, passage_id: int64 [n].
        teacher_query, teacher_passage: float16 [n, E], unit norm; None where no teacher is asked.
    """

    query_id: Tensor
    passage_id: Tensor
    teacher_query: Tensor | None = None
    teacher_passage: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Pairs:
        """The pairs with `change` applied to every tensor."""
        teacher = (
            None if tensor is None else change(tensor)
            for tensor in (self.teacher_query, self.teacher_passage)
        )
        return Pairs(change(self.query_id), change(self.passage_id), *teacher)

    def teacher(self) -> tuple[Tensor, Tensor]:
        """The teacher's vectors of queries and of passages, float32 [n, E]."""
        assert self.teacher_query is not None and self.teacher_passage is not None
        return self.teacher_query.float(), self.teacher_passage.float()


# A block of rows -> columns that are no negatives of them, bool [r, N]: by id, and by the teacher
# alone. A row's own positive may be among them.
Masks = Callable[[slice], tuple[Tensor, Tensor]]


def false_negatives(
    own: Pairs, everyone: Pairs, teacher_margin: float | None, by_passage: bool = False
) -> Masks:
    """Which pairings of a query with a passage must not count as negatives.

    By id: the passage equals the query's positive, or another pair joins the two. By the teacher:
    see `LossConfig.teacher_margin`. What a query and a passage are to each other does not depend on
    the direction, so with `by_passage`, where rows are passages and columns queries, it is the same
    pairings.

    Args:
        own: this rank's b pairs.
        everyone: the N pairs of all ranks.
    """
    if teacher_margin is not None:
        (own_query, own_passage), (all_query, all_passage) = own.teacher(), everyone.teacher()
        if by_passage:
            row_vectors, column_vectors = own_passage, all_query
            # The bound is the query's, whatever the direction, so here it is each column's.
            of_positive = (all_query * all_passage).sum(dim=1)
        else:
            row_vectors, column_vectors = own_query, all_passage
            of_positive = (own_query * own_passage).sum(dim=1, keepdim=True)
        bound = (of_positive - teacher_margin).expand(len(row_vectors), len(column_vectors))

    def masks(rows: slice) -> tuple[Tensor, Tensor]:
        same_passage = own.passage_id[rows, None] == everyone.passage_id
        by_id = same_passage | (own.query_id[rows, None] == everyone.query_id)
        if teacher_margin is None:
            return by_id, torch.zeros_like(by_id)
        return by_id, (row_vectors[rows] @ column_vectors.T >= bound[rows]) & ~by_id

    return masks


@dataclass(frozen=True)
class LossOutput:
    """Loss and measures of one rank's rows, all means over them.

    Attributes:
        loss: scalar with a graph.
        measures: those of pairs, float64 [M], without a graph; see train.measures.by_name.
    """

    loss: Tensor
    measures: Tensor


def contrast(
    query: Tensor,
    passage: Tensor,
    all_query: Tensor | None,
    all_passage: Tensor,
    own: Pairs,
    everyone: Pairs,
    first: int,
    config: LossConfig,
) -> LossOutput:
    """The loss of one rank's pairs against those of all ranks.

    Args:
        query, passage: float32 [b, D], unit norm, of this rank's pairs `own`.
        all_query, all_passage: float32 [N, D], unit norm, of all pairs `everyone`; the queries are
            needed for both directions only.
        first: the row of `everyone` where `own` begins.
    """
    positive = torch.arange(first, first + len(query), device=query.device)
    margin = config.teacher_margin
    directions = [(query, all_passage, false_negatives(own, everyone, margin))]
    if config.bidirectional:
        assert all_query is not None
        masks = false_negatives(own, everyone, margin, by_passage=True)
        directions.append((passage, all_query, masks))
    whole = query.shape[1]
    outputs = [
        info_nce(_prefix(rows, width), _prefix(columns, width), positive, masks, config.temperature)
        for width in sorted({whole, *config.matryoshka_dims}, reverse=True)
        for rows, columns, masks in directions
    ]
    loss = torch.stack([output.loss for output in outputs]).mean()
    measures = outputs[0].measures.clone()  # those of queries against passages in full width
    measures[LOSS] = loss.detach()
    return LossOutput(loss, measures)


def _prefix(vectors: Tensor, width: int) -> Tensor:
    return vectors if width == vectors.shape[1] else F.normalize(vectors[:, :width], dim=-1)


def info_nce(
    rows: Tensor, columns: Tensor, positive: Tensor, masks: Masks, temperature: float
) -> LossOutput:
    """Mean over rows of -log softmax(similarity / temperature)[positive] (van den Oord et al. 2018,
    arXiv 1807.03748, eq. 4).

    Args:
        rows: float32 [b, D], unit norm.
        columns: float32 [N, D], unit norm.
        positive: int64 [b], the column of each row's positive.
        masks: columns left out of the softmax; the positive is kept whatever they say.
    """
    return LossOutput(*_InfoNCE.apply(rows, columns, positive, masks, temperature))


class _InfoNCE(torch.autograd.Function):
    """Loss and measures; the gradients are made with the loss, while a block's scores are at hand
    (as Liger Kernel does for the cross-entropy of language models, arXiv 2410.10989)."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, positive: Tensor, masks: Masks, temperature: float
    ) -> tuple[Tensor, Tensor]:
        of_rows, of_columns = torch.empty_like(rows), torch.zeros_like(columns)
        sums = torch.zeros(NUM_VALUES, dtype=torch.float64, device=rows.device)
        size = max(1, _BLOCK_SCORES // len(columns))
        for start in range(0, len(rows), size):
            block = slice(start, start + size)
            scores = _scores(
                rows[block] @ columns.T, positive[block, None], masks(block), temperature
            )
            sums += totals(scores)
            gradient = scores.log_probability.exp_()
            at = scores.positive
            gradient.scatter_add_(1, at, gradient.new_full((1, 1), -1).expand_as(at))
            gradient /= temperature * len(rows)
            of_rows[block] = gradient @ columns
            of_columns.addmm_(gradient.T, rows[block])
        measures = sums / len(rows)
        ctx.gradients = (of_rows, of_columns)
        ctx.mark_non_differentiable(measures)
        return measures[LOSS].to(rows.dtype), measures

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        of_rows, of_columns = ctx.gradients
        ctx.gradients = None  # the loss outlives this pass, and its second one would be wrong
        return of_rows.mul_(scale), of_columns.mul_(scale), None, None, None


def _scores(
    similarity: Tensor, positive: Tensor, masks: tuple[Tensor, Tensor], temperature: float
) -> Scores:
    by_id, by_teacher = masks
    masked = (by_id | by_teacher).scatter_(1, positive, False)
    logits = (similarity / temperature).masked_fill_(masked, -torch.inf)
    log_probability = logits.sub_(logits.logsumexp(dim=1, keepdim=True))
    return Scores(similarity, log_probability, positive, masked, by_teacher)
