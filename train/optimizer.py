"""The optimizer, its parameter groups, and the schedules of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from clusterlib.artifacts.config import Config

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW remembers of each weight


@dataclass(frozen=True)
class Schedule:
    """How the learning rate goes on after warmup.

    Attributes:
        description: the same for people, as a clause about the rate.
        share: (steps left, steps from the peak on, steps of `decay_fraction`) -> share of the peak,
            above 0 as long as steps are left.
        decays_last: it falls over the steps of `decay_fraction` alone.
    """

    description: str
    share: Callable[[int, int, int], float]
    decays_last: bool = False


SCHEDULES = {
    "linear": Schedule("it falls evenly", lambda left, steps, _: left / steps),
    "cosine": Schedule(
        "it falls along half a cosine",
        lambda left, steps, _: (1 - math.cos(math.pi * (left / steps))) / 2,
    ),
    "wsd": Schedule(
        "it stays at the peak and falls evenly over the last decay_fraction (warmup-stable-decay, "
        "arXiv 2404.06395)",
        lambda left, steps, decay: min(1.0, left / min(steps, decay)),
        decays_last=True,
    ),
}

if TYPE_CHECKING:
    ScheduleName = str
else:
    ScheduleName = Literal[tuple(SCHEDULES)]


class OptimizerConfig(Config):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101); norms and biases do not decay."""

    learning_rate: float = Field(..., gt=0, description="the peak, which warmup ends at")
    schedule: ScheduleName = Field(
        "linear",
        description="how the learning rate goes from the peak to 0, where it is one step after the "
        "last. "
        + "; ".join(f"{name}: {schedule.description}" for name, schedule in SCHEDULES.items()),
    )
    warmup_fraction: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of the steps over which the learning rate rises evenly to the peak; it "
        "is above 0 in the first",
    )
    decay_fraction: float = Field(
        0.1, gt=0, le=1, description="share of the steps, the last, over which wsd falls"
    )
    weight_decay: float = Field(
        0.01, ge=0, description="a step takes this times the learning rate off each weight"
    )
    beta1: float = Field(
        0.9, ge=0, lt=1, description="share that the mean of gradients keeps of itself in a step"
    )
    beta2: float = Field(
        0.999, ge=0, lt=1, description="share that the mean of squared gradients keeps in a step"
    )
    max_gradient_norm: float = Field(
        1.0, gt=0, description="longer gradients are scaled down to this length"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        decays_last = SCHEDULES[self.schedule].decays_last
        if decays_last and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError("warmup_fraction and decay_fraction add up to more than 1")
        return self

    def rate(self, step: int, num_steps: int) -> float:
        """The learning rate of a step: a pure function, so a resumed run needs no schedule state.

        The first step learns too, as torchtitan's does.
        """
        warmup = int(self.warmup_fraction * num_steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        decay = max(1, int(self.decay_fraction * num_steps))
        share = SCHEDULES[self.schedule].share(num_steps - step, num_steps - warmup, decay)
        return self.learning_rate * share


def adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """The optimizer of a model's weights, in two groups: matrices, and norms and biases."""
    weights = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight in weights if weight.ndim > 1]},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=weights[0].device.type == "cuda",
    )


def start_moments(optimizer: torch.optim.AdamW) -> None:
    """Make the zeros that AdamW would make in its first update."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            num_updates = torch.zeros((), device=weight.device if group["fused"] else "cpu")
            moments = {moment: torch.zeros_like(weight) for moment in MOMENTS}
            optimizer.state[weight] = {"step": num_updates, **moments}
