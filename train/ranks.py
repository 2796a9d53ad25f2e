"""What ranks do together; a process without a process group is one rank alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def place() -> tuple[int, int]:
    """This rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait() -> None:
    """Until all ranks are here, or the process group's time is up."""
    if dist.is_initialized():
        dist.barrier()


def from_first(value: Any) -> Any:
    """The first rank's value, on all."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def from_all(value: Any) -> list[Any]:
    """The values of all ranks, in rank order, on all."""
    values = [value] * place()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def mean(values: Tensor) -> Tensor:
    """The mean over ranks of tensors of one shape, without a graph."""
    num_ranks = place()[1]
    if num_ranks == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / num_ranks


def concatenated(tensor: Tensor) -> Tensor:
    """The tensors [b, ...] of all ranks, in rank order, [N, ...]; gradients are summed over
    ranks.
    """
    if place()[1] == 1:
        return tensor
    whole: Tensor = _AllGather.apply(tensor.contiguous())
    return whole


class _AllGather(torch.autograd.Function):
    """all_gather whose backward is a reduce-scatter sum."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        num_ranks = dist.get_world_size()
        whole = tensor.new_empty(num_ranks * len(tensor), *tensor.shape[1:])
        dist.all_gather(list(whole.chunk(num_ranks)), tensor)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        num_ranks = dist.get_world_size()
        own = gradient.new_empty(len(gradient) // num_ranks, *gradient.shape[1:])
        dist.reduce_scatter(own, list(gradient.contiguous().chunk(num_ranks)))
        return own
