"""The contrastive step's gradient: exact for the whole global batch, in the memory of a
micro-batch.

GradCache (Gao et al. 2021, arXiv 2101.06983): encode every micro-batch without a graph, take the
loss and its gradient at the embeddings, then encode each micro-batch again with a graph and push
that gradient through it. With one micro-batch a side, one pass with a graph gives the same and
costs one less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from train import ranks
from train.clock import Clock
from train.data import RankBatch, Side
from train.loss import LossConfig, LossOutput, Pairs, contrast


class Student(Protocol):
    """What a step's gradient asks of an engine: gradients add up over `backward` calls until its
    own step.
    """

    clock: Clock

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor: ...

    def backward(self, loss: Tensor) -> None: ...


def accumulate_gradient(student: Student, batch: RankBatch, config: LossConfig) -> Tensor:
    """Add the gradient of the global batch's loss to the student.

    A rank adds W times its share, W the number of ranks, so that the student's mean over ranks is
    the gradient of the mean loss over all B queries.

    Returns:
        The measures of pairs over the global batch, float64 [M]; see train.measures.by_name.
    """
    is_whole = all(len(side.micro_batches) == 1 for side in (batch.query, batch.passage))
    output = (_in_one_pass if is_whole else _in_two_passes)(student, batch, config)
    student.clock.mark("backward")
    return ranks.mean(output.measures)


def _in_one_pass(student: Student, batch: RankBatch, config: LossConfig) -> LossOutput:
    query, passage = (
        student.encode(*side.micro_batches[0])[side.places] for side in (batch.query, batch.passage)
    )
    output = global_loss(query, passage, batch.pairs, config)
    student.clock.mark("forward")
    student.backward(output.loss)
    return output


def _in_two_passes(student: Student, batch: RankBatch, config: LossConfig) -> LossOutput:
    sides = (batch.query, batch.passage)
    # Dropout must fall the same way in both passes, so each micro-batch has a seed of its own.
    seeds = torch.randint(2**62, (2, max(len(side.micro_batches) for side in sides))).tolist()
    query, passage = embedded = [
        _embed(student, side, side_seeds) for side, side_seeds in zip(sides, seeds, strict=True)
    ]
    output = global_loss(
        query[batch.query.places], passage[batch.passage.places], batch.pairs, config
    )
    output.loss.backward()
    student.clock.mark("forward")
    for side, embeddings, side_seeds in zip(sides, embedded, seeds, strict=True):
        assert embeddings.grad is not None
        sizes = [len(input_ids) for input_ids, _ in side.micro_batches]
        gradients = embeddings.grad.split(sizes)
        for micro_batch, gradient, seed in zip(
            side.micro_batches, gradients, side_seeds, strict=False
        ):
            torch.manual_seed(seed)
            student.backward((student.encode(*micro_batch) * gradient).sum())
    return output


@torch.no_grad()
def _embed(student: Student, side: Side, seeds: Sequence[int]) -> Tensor:
    """The embeddings of a side's micro-batches, one after the other, float32 [b, D], to take a
    gradient at.
    """
    embeddings = torch.empty(0)
    first = 0
    for micro_batch, seed in zip(side.micro_batches, seeds, strict=False):
        torch.manual_seed(seed)
        part = student.encode(*micro_batch)
        if first == 0:  # one tensor for all: small ones that stay would leave holes in memory
            embeddings = part.new_empty(len(side.places), part.shape[1])
        embeddings[first : first + len(part)] = part
        first += len(part)
    return embeddings.requires_grad_()


def global_loss(query: Tensor, passage: Tensor, own: Pairs, config: LossConfig) -> LossOutput:
    """The loss of this rank's pairs, with embeddings [b, D], against the pairs of all ranks."""
    first = len(query) * ranks.place()[0]
    all_query = ranks.concatenated(query) if config.bidirectional else None
    all_passage, everyone = ranks.concatenated(passage), own.map(ranks.concatenated)
    return contrast(query, passage, all_query, all_passage, own, everyone, first, config)
