"""The contrastive step's gradient: exact for the whole global batch, in the memory of a
micro-batch.

GradCache (Gao et al. 2021, arXiv 2101.06983): encode every micro-batch without a graph, take the
loss and its gradient at the embeddings, then encode each micro-batch again with a graph and push
that gradient through it. With one micro-batch a side the plain way is the same and costs one pass
less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from train.clock import Clock
from train.data import RankBatch, Side
from train.loss import LossConfig, LossOutput, Pairs, contrast


class Learner(Protocol):
    """What the step asks of an engine: gradients add up over `backward` calls until its own
    step.
    """

    clock: Clock

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor: ...

    def backward(self, loss: Tensor) -> None: ...


def accumulate_gradient(learner: Learner, batch: RankBatch, config: LossConfig) -> Tensor:
    """Add the gradient of the global batch's loss to the learner.

    A rank adds W times its share, W the number of ranks, so that the learner's mean over ranks is
    the gradient of the mean loss over all B queries.

    Returns:
        The measures over the global batch, float64 [M]; see train.loss.as_record.
    """
    sides = (batch.query, batch.passage)
    if all(len(side.micro_batches) == 1 for side in sides):
        query, passage = (learner.encode(*side.micro_batches[0])[side.places] for side in sides)
        output = global_loss(query, passage, batch.pairs, config)
        learner.clock.mark("forward")
        learner.backward(output.loss)
        learner.clock.mark("backward")
        return _mean_over_ranks(output.measures)

    # Dropout must fall the same way in both passes, so each micro-batch has a seed of its own.
    seeds = torch.randint(2**62, (2, max(len(side.micro_batches) for side in sides))).tolist()
    leaves = [_embed(learner, side, of_side) for side, of_side in zip(sides, seeds, strict=True)]
    output = global_loss(
        leaves[0][batch.query.places], leaves[1][batch.passage.places], batch.pairs, config
    )
    output.loss.backward()
    learner.clock.mark("forward")

    for side, leaf, of_side in zip(sides, leaves, seeds, strict=True):
        assert leaf.grad is not None
        sizes = [len(input_ids) for input_ids, _ in side.micro_batches]
        for micro_batch, gradient, seed in zip(
            side.micro_batches, leaf.grad.split(sizes), of_side, strict=False
        ):
            torch.manual_seed(seed)
            learner.backward((learner.encode(*micro_batch) * gradient).sum())
    learner.clock.mark("backward")
    return _mean_over_ranks(output.measures)


@torch.no_grad()
def _embed(learner: Learner, side: Side, seeds: Sequence[int]) -> Tensor:
    """The embeddings of a side's micro-batches, one after the other, float32 [b, D], to take a
    gradient at.
    """
    embedded = torch.empty(0)
    first = 0
    for micro_batch, seed in zip(side.micro_batches, seeds, strict=False):
        torch.manual_seed(seed)
        part = learner.encode(*micro_batch)
        if first == 0:  # one tensor for all: small ones that stay would leave holes in memory
            embedded = part.new_empty(len(side.places), part.shape[1])
        embedded[first : first + len(part)] = part
        first += len(part)
    return embedded.requires_grad_()


def global_loss(query: Tensor, passage: Tensor, own: Pairs, config: LossConfig) -> LossOutput:
    """The loss of this rank's pairs, with embeddings [b, D], against the pairs of all ranks."""
    first = len(query) * (dist.get_rank() if dist.is_initialized() else 0)
    all_query = gather(query) if config.bidirectional else None
    return contrast(query, passage, all_query, gather(passage), own, own.map(gather), first, config)


def gather(tensor: Tensor) -> Tensor:
    """The tensors [b, ...] of all ranks, in rank order, [N, ...]; gradients are summed over
    ranks.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    gathered: Tensor = _Gather.apply(tensor.contiguous())
    return gathered


class _Gather(torch.autograd.Function):
    """all_gather whose backward is a reduce-scatter sum."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        gathered = tensor.new_empty(dist.get_world_size() * len(tensor), *tensor.shape[1:])
        dist.all_gather(list(gathered.chunk(dist.get_world_size())), tensor)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        own = gradient.new_empty(len(gradient) // dist.get_world_size(), *gradient.shape[1:])
        dist.reduce_scatter(own, list(gradient.contiguous().chunk(dist.get_world_size())))
        return own


def _mean_over_ranks(measures: Tensor) -> Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        measures = measures.clone()
        dist.all_reduce(measures)
        measures /= dist.get_world_size()
    return measures
