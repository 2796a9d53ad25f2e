"""The contrastive step's gradient: exact for the whole global batch, in the memory of a micro-batch.

GradCache (Gao et al. 2021, arXiv 2101.06983): encode every micro-batch without a graph, take the loss and
its gradient at the embeddings, then encode each micro-batch again with a graph and push that gradient
through it. With one micro-batch a side the plain way is the same and costs one pass less.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from train.clock import Clock
from train.data import RankBatch
from train.loss import LossConfig, LossOutput, Pairs, contrast


class Learner(Protocol):
    """What the step asks of an engine: gradients add up over `backward` calls until its own step."""

    clock: Clock

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor: ...

    def backward(self, loss: Tensor) -> None: ...


def accumulate_gradient(learner: Learner, batch: RankBatch, config: LossConfig) -> Tensor:
    """Add the gradient of the global batch's loss to the learner.

    A rank adds W times its share, W the number of ranks, so that the learner's mean over ranks is the
    gradient of the mean loss over all B queries.

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

    states, leaves = [], []
    for side in sides:
        embedded = []
        with torch.no_grad():
            for micro_batch in side.micro_batches:
                states.append(_RandomState(micro_batch[0]))
                embedded.append(learner.encode(*micro_batch))
        leaves.append(torch.cat(embedded).requires_grad_())
    output = global_loss(leaves[0][batch.query.places], leaves[1][batch.passage.places], batch.pairs, config)
    output.loss.backward()
    learner.clock.mark("forward")

    replays = iter(states)
    for side, leaf in zip(sides, leaves, strict=True):
        assert leaf.grad is not None
        sizes = [len(input_ids) for input_ids, _ in side.micro_batches]
        for micro_batch, gradient in zip(side.micro_batches, leaf.grad.split(sizes), strict=True):
            with next(replays).replayed():
                embedding = learner.encode(*micro_batch)
            learner.backward((embedding * gradient).sum())
    learner.clock.mark("backward")
    return _mean_over_ranks(output.measures)


def global_loss(query: Tensor, passage: Tensor, own: Pairs, config: LossConfig) -> LossOutput:
    """The loss of this rank's pairs, with embeddings [b, D], against the pairs of all ranks."""
    first = len(query) * (dist.get_rank() if dist.is_initialized() else 0)
    all_query = gather(query) if config.bidirectional else None
    return contrast(query, passage, all_query, gather(passage), own, own.map(gather), first, config)


def gather(tensor: Tensor) -> Tensor:
    """The tensors [b, ...] of all ranks, in rank order, [N, ...]; gradients are summed over ranks."""
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


class _RandomState:
    """The random generators before a forward pass, so that dropout falls the same way the second time."""

    def __init__(self, *tensors: Tensor) -> None:
        self._cpu = torch.get_rng_state()
        self._devices, self._states = get_device_states(*tensors)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=self._devices):
            torch.set_rng_state(self._cpu)
            set_device_states(self._devices, self._states)
            yield
