"""The DeepSpeed engine: precision, gradient reduction, clipping, updates and state."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from train.clock import Clock
from train.model import Encoder
from train.optimizer import MOMENTS, OptimizerConfig, adamw, start_moments

_BUCKET_WEIGHTS = 50_000_000  # reduced at once: 200 MB, enough to fill any link


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
        self._optimizer = adamw(model, config)
        self._optimizer.register_step_pre_hook(lambda *_: self.clock.mark("reduce"))
        self._norm: float | None = None
        if zero_stage == 0:
            self._clip_before_updates(model, config.max_gradient_norm)
        self._optimizer.register_step_post_hook(lambda *_: self.clock.mark("optimizer"))
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self._optimizer,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": rank_batch_size,
                "gradient_accumulation_steps": 1,
                # `backward` only adds gradients up and `step` reduces them, as GradCache needs.
                "managed_gradient_accumulation": False,
                "gradient_clipping": config.max_gradient_norm if zero_stage else 0.0,
                "zero_optimization": {
                    "stage": zero_stage,
                    "overlap_comm": False,
                    **_bucket_sizes(model),
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
                # DeepSpeed's timer would wait for the GPU in every forward pass.
                "timers": {"throughput": {"enabled": False}},
            },
        )
        self.model: Encoder = self._engine.module
        self._zero = self._engine.optimizer if zero_stage else None
        # ZeRO ties all weights to their moments right after it updated the first parameter group,
        # when those of the second would not exist yet. (By now a group holds this rank's part of
        # its weights, flat.)
        start_moments(self._optimizer)
        if self._zero:
            self._zero._lazy_init_hp_params_optimizer_state()

    def _clip_before_updates(self, model: Encoder, max_norm: float) -> None:
        """Without ZeRO, DeepSpeed clips and does not tell the norm; so there torch clips."""

        def clip(*_: Any) -> None:
            self._norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm))
            if not math.isfinite(self._norm):
                # Without gradients AdamW changes nothing. ZeRO leaves such an update out by itself.
                self._optimizer.zero_grad(set_to_none=True)

        self._optimizer.register_step_pre_hook(clip)

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
            update was left out: weights and moments are as they were.
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
            for moment in MOMENTS:
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
            for moment in MOMENTS:
                value = state[f"{moment}/{name}"].to(weight.device)
                if self._zero:
                    safe_set_full_optimizer_state(weight, value, moment)
                else:
                    self._optimizer.state[weight][moment].copy_(value)
        if self._zero:
            self._zero.refresh_fp32_params()


def _bucket_sizes(model: Encoder) -> dict[str, int]:
    """ZeRO's settings of how many weights it reduces and gathers at once; by default buckets take
    2 GB whatever the student.
    """
    sizes = [weight.numel() for weight in model.parameters()]
    # A weight that does not fit into a bucket would be reduced outside it.
    size = max(*sizes, min(sum(sizes), _BUCKET_WEIGHTS))
    # DeepSpeed wants an even allgather_bucket_size.
    return {"reduce_bucket_size": size, "allgather_bucket_size": size + size % 2}


def _deepspeed(device: torch.device) -> Any:
    # DeepSpeed would find a GPU by itself, and Ray hides none from ranks that were given none.
    os.environ["DS_ACCELERATOR"] = device.type
    import deepspeed.ops

    # init_distributed would compile this op, which takes a minute and needs g++; training never
    # uses it. https://github.com/deepspeedai/DeepSpeed/issues/7625; delete when the op can be
    # turned off by a setting.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
