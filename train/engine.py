"""The DeepSpeed engine: optimizer, schedule, precision, gradient reduction and state."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from clusterlib.artifacts.config import Config
from train.clock import Clock
from train.model import Encoder

_MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW remembers of each weight
_BUCKET_WEIGHTS = 50_000_000  # reduced at once: 200 MB, enough to fill any link


class OptimizerConfig(Config):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101); norms and biases do not decay."""

    learning_rate: float = Field(..., gt=0, description="peak, after warmup")
    schedule: Literal["linear", "cosine", "wsd"] = Field(
        "linear",
        description="how it falls, to 0 one step after the last; wsd stays at the peak and falls "
        "linearly over the "
        "last decay_fraction (warmup-stable-decay, arXiv 2404.06395)",
    )
    warmup_fraction: float = Field(
        0.1, ge=0, lt=1, description="of the steps, rising linearly; the first is above 0"
    )
    decay_fraction: float = Field(0.1, gt=0, le=1, description="of the steps, for wsd")
    weight_decay: float = Field(0.01, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    max_gradient_norm: float = Field(
        1.0, gt=0, description="longer gradients are scaled down to it"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError("warmup_fraction and decay_fraction add up to more than 1")
        return self

    def rate(self, step: int, num_steps: int) -> float:
        """The learning rate of a step: a pure function, so a resumed run needs no schedule
        state.
        """
        warmup = int(self.warmup_fraction * num_steps)
        if step < warmup:
            return (
                self.learning_rate * (step + 1) / (warmup + 1)
            )  # the first step learns too, as torchtitan's
        falling = num_steps - warmup
        if self.schedule == "wsd":
            falling = min(falling, max(1, int(self.decay_fraction * num_steps)))
        left = min(1.0, (num_steps - step) / falling)
        return self.learning_rate * (
            (1 - math.cos(math.pi * left)) / 2 if self.schedule == "cosine" else left
        )


class Engine:
    """One rank's part of the student under DeepSpeed, with ZeRO 0, 1 or 2.

    Gradients add up over `backward` calls; `step` reduces them over ranks, in float32 whatever the
    precision, and updates the weights.

    Attributes:
        model: the student; its weights are whole on every rank.
        device: the student's, where batches must be.
        clock: `step` marks "reduce" and "optimizer" on it.
    """

    def __init__(
        self,
        model: Encoder,
        config: OptimizerConfig,
        precision: Literal["fp32", "bf16"],
        zero_stage: int,
        rank_batch_size: int,
    ) -> None:
        self.device = next(model.parameters()).device
        deepspeed = _deepspeed(self.device)
        self.clock = Clock(self.device)
        decayed = [weight for weight in model.parameters() if weight.ndim > 1]
        plain = [weight for weight in model.parameters() if weight.ndim <= 1]
        sizes = [weight.numel() for weight in model.parameters()]
        # By default buckets take 2 GB whatever the student; smaller than a weight, that weight
        # would go past them.
        bucket_size = max(*sizes, min(sum(sizes), _BUCKET_WEIGHTS))
        self._optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            fused=self.device.type == "cuda",
        )
        # Without ZeRO, DeepSpeed clips without telling the norm; so there torch clips, right before
        # the update.
        self._norm: float | None = None
        self._optimizer.register_step_pre_hook(lambda *_: self.clock.mark("reduce"))
        if zero_stage == 0:

            def clip(*_: Any) -> None:
                self._norm = float(
                    torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient_norm)
                )
                if not math.isfinite(self._norm):
                    # AdamW passes over weights without a gradient; ZeRO leaves such an update out
                    # by itself.
                    self._optimizer.zero_grad(set_to_none=True)

            self._optimizer.register_step_pre_hook(clip)
        self._optimizer.register_step_post_hook(lambda *_: self.clock.mark("optimizer"))
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self._optimizer,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": rank_batch_size,
                "gradient_accumulation_steps": 1,
                # `backward` only adds up, and `step` reduces: what GradCache needs.
                "managed_gradient_accumulation": False,
                "gradient_clipping": config.max_gradient_norm if zero_stage else 0.0,
                "zero_optimization": {
                    "stage": zero_stage,
                    "overlap_comm": False,
                    "reduce_bucket_size": bucket_size,
                    "allgather_bucket_size": bucket_size
                    + bucket_size % 2,  # DeepSpeed wants it even
                },
                "zero_allow_untested_optimizer": True,
                # Weights stay float32: what is exported is what was trained. ZeRO would reduce the
                # gradients of the modules listed here in bf16; autocast does not look at the list.
                "torch_autocast": {
                    "enabled": precision == "bf16",
                    "dtype": "bfloat16",
                    "lower_precision_safe_modules": [],
                },
                "steps_per_print": None,
                # It would wait for the GPU in every forward pass.
                "timers": {"throughput": {"enabled": False}},
            },
        )
        self.model: Encoder = self._engine.module
        self._zero = self._engine.optimizer if zero_stage else None
        # AdamW's zeros, made now: DeepSpeed ties weights to moments after the first group's first
        # update, and would not find the second's. Under ZeRO a group holds this rank's part of its
        # weights, flat.
        for group in self._optimizer.param_groups:
            for weight in group["params"]:
                num_updates = torch.zeros((), device=weight.device if group["fused"] else "cpu")
                moments = {moment: torch.zeros_like(weight) for moment in _MOMENTS}
                self._optimizer.state[weight] = {"step": num_updates, **moments}
        if self._zero:
            self._zero._lazy_init_hp_params_optimizer_state()

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Unit vectors float32 [m, D]."""
        embedding: Tensor = self._engine(input_ids, attention_mask)
        return embedding

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self, learning_rate: float) -> float:
        """Reduce, clip, update; a gradient that is not finite changes nothing.

        Returns:
            The gradient's norm before clipping, the same on all ranks. Where it is not finite, the
            update was left
            out: weights and moments are as they were.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        self.clock.mark("optimizer")
        return float(self._engine.get_global_grad_norm() if self._norm is None else self._norm)

    def state(self) -> dict[str, Tensor]:
        """Weights and AdamW's moments, float32 on the CPU, by kind and name of the weight; all
        ranks call it and rank 0 gets it.

        Every tensor is whole, so the state is the same for any number of ranks and any ZeRO stage.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        state: dict[str, Tensor] = {}
        for name, weight in self.model.named_parameters():
            parts = {"weight": weight}
            for moment in _MOMENTS:
                if self._zero:
                    parts[moment] = safe_get_full_optimizer_state(weight, moment)
                else:
                    parts[moment] = self._optimizer.state[weight][moment]
            if self._engine.global_rank == 0:
                state |= {
                    f"{kind}/{name}": part.detach().to("cpu", copy=True)
                    for kind, part in parts.items()
                }
        return state

    def restore(self, state: Mapping[str, Tensor], num_updates: int) -> None:
        """Continue from a `state` after `num_updates` steps; every rank calls it with the whole
        state.
        """
        from deepspeed.utils import safe_set_full_optimizer_state

        for values in self._optimizer.state.values():
            values["step"].fill_(num_updates)
        for name, weight in self.model.named_parameters():
            weight.data.copy_(state[f"weight/{name}"])
            for moment in _MOMENTS:
                value = state[f"{moment}/{name}"].to(weight.device)
                if self._zero:
                    safe_set_full_optimizer_state(weight, value, moment)
                else:
                    self._optimizer.state[weight][moment].copy_(value)
        if self._zero:
            self._zero.refresh_fp32_params()


def _deepspeed(device: torch.device) -> Any:
    # What was asked for, which need not be what DeepSpeed would find: Ray hides no GPU from ranks
    # that have none.
    os.environ["DS_ACCELERATOR"] = device.type
    import deepspeed.ops

    # init_distributed would compile this op, which takes a minute and needs g++; training never
    # uses it. https://github.com/deepspeedai/DeepSpeed/issues/7625; delete when the op can be
    # turned off by a setting.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
