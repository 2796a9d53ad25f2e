"""The DeepSpeed engine: optimizer, schedule, precision, gradient reduction and engine state."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from clusterlib.config import Config
from train.model import Encoder


class OptimizerConfig(Config):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101); norms and biases do not decay."""

    learning_rate: float = Field(..., gt=0, description="peak, after warmup")
    schedule: Literal["linear", "cosine"] = Field("linear", description="how it falls to 0 at the last step")
    warmup_fraction: float = Field(0.1, ge=0, lt=1, description="of the steps, rising linearly from 0")
    weight_decay: float = Field(0.01, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    max_gradient_norm: float = Field(1.0, gt=0, description="longer gradients are scaled down to it")


class Engine:
    """One rank's part of the student under DeepSpeed, with ZeRO 0, 1 or 2.

    Gradients add up over `backward` calls; `step` reduces them over ranks and updates the weights.

    Attributes:
        model: the student; its weights are whole on every rank.
        device: where batches must be.
    """

    def __init__(
        self,
        model: Encoder,
        config: OptimizerConfig,
        num_steps: int,
        precision: Literal["fp32", "bf16"],
        zero_stage: int,
        rank_batch_size: int,
    ) -> None:
        deepspeed = _deepspeed()
        from transformers import get_scheduler

        self.device = torch.device(deepspeed.get_accelerator().current_device_name())
        decayed = [weight for weight in model.parameters() if weight.ndim > 1]
        plain = [weight for weight in model.parameters() if weight.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            fused=self.device.type == "cuda",
        )
        # Without ZeRO, DeepSpeed clips without telling the norm; so there torch clips, right before the update.
        self._norm: float | None = None
        if zero_stage == 0:

            def clip(*_: Any) -> None:
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient_norm)
                self._norm = float(norm)

            optimizer.register_step_pre_hook(clip)
        self._engine, _, _, self._scheduler = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=get_scheduler(config.schedule, optimizer, int(config.warmup_fraction * num_steps), num_steps),
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": rank_batch_size,
                "gradient_accumulation_steps": 1,
                # `backward` only adds up, and `step` reduces: what GradCache needs.
                "managed_gradient_accumulation": False,
                "gradient_clipping": config.max_gradient_norm if zero_stage else 0.0,
                "zero_optimization": {"stage": zero_stage, "overlap_comm": False},
                "zero_allow_untested_optimizer": True,
                # Weights stay float32: what is exported is what was trained.
                "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16"},
                "steps_per_print": None,
            },
        )
        self.model: Encoder = self._engine.module

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Unit vectors float32 [m, D]."""
        embedding: Tensor = self._engine(input_ids, attention_mask)
        return embedding

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> tuple[float, float]:
        """Reduce, clip, update.

        Returns:
            The gradient's norm before clipping, and the learning rate that was used.
        """
        learning_rate = self._scheduler.get_last_lr()[0]
        self._engine.step()
        norm = self._engine.get_global_grad_norm() if self._norm is None else self._norm
        return float(norm), learning_rate

    def save(self, folder: Path) -> None:
        """Write weights, optimizer and schedule; every rank calls it and writes its own files."""
        self._engine.save_checkpoint(str(folder), tag="engine")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, with the same number of ranks and ZeRO stage."""
        self._engine.load_checkpoint(str(folder), tag="engine")


def _deepspeed() -> Any:
    # Told, DeepSpeed neither searches for accelerators nor warns that it found none.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed.ops

    # init_distributed would compile this op, which takes a minute and needs g++; training never uses it.
    # https://github.com/deepspeedai/DeepSpeed/issues/7625; delete when the op can be turned off by a setting.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
