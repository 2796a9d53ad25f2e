"""The settings of training."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from clusterlib.artifacts.config import Config, runtime
from clusterlib.batches.plan import BatchingConfig, Plan
from train.loss import LossConfig
from train.model import StudentConfig
from train.optimizer import OptimizerConfig
from train.trackers import TrackerName


class TrainConfig(Config):
    """The student, what it learns by and for how long, and where it trains."""

    student: StudentConfig = Field(..., description="the encoder that is trained")
    loss: LossConfig = Field(LossConfig(), description="what the student learns by")
    optimizer: OptimizerConfig = Field(..., description="how its weights follow the gradient")
    steps: int | None = Field(
        None, ge=1, description="optimizer steps of the run; set this or epochs"
    )
    epochs: float | None = Field(
        None,
        gt=0,
        le=1_000_000,
        description="epochs of the plan; with phases, their number of epochs added up",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="precision of the encoder's arithmetic; weights, similarities and the loss are "
        "float32",
    )
    seed: int = Field(
        0,
        ge=0,
        description="what initial weights and dropout are drawn from; batching.seed is the plan's",
    )
    test_every_steps: int | None = Field(
        None,
        ge=1,
        description="score the student on the tests and tasks of `evaluate` this often, and after "
        "the last step; rank 0 does it while the others wait. By default never",
    )
    keep: Literal["last", "best"] = Field(
        "last",
        description="which weights become the model: those after the last step, or those with the "
        "best mean NDCG@10 of the tests in the loop",
    )

    num_workers: int = runtime(
        1, ge=1, description="number of ranks; each takes one GPU, or one CPU without GPUs"
    )
    use_gpu: bool = runtime(
        False, description="whether ranks need a GPU each; they talk over NCCL then, else over gloo"
    )
    zero_stage: Literal[0, 1, 2] = runtime(
        0,
        description="what ranks share out (ZeRO, arXiv 1910.02054). 0: nothing; 1: the optimizer's "
        "moments; 2: gradients too",
    )
    micro_batch_size: int = runtime(
        64, ge=1, description="rows a rank encodes at once, which bounds its memory"
    )
    gradient_checkpointing: bool = runtime(
        False,
        description="keep only layers' inputs for the backward pass (arXiv 1604.06174): longer, in "
        "less memory",
    )
    compile: bool = runtime(
        False,
        description="compile the encoder with torch.compile: a minute or more at the start. On a "
        "CPU core a step took 16% longer with it (tests/benchmarks/RESULTS.md); not measured on a "
        "GPU",
    )
    checkpoint_every_steps: int = runtime(
        500, ge=1, description="write a checkpoint this often, and after the last step"
    )
    checkpoints_to_keep: int = runtime(
        2, ge=2, description="keep this many, the latest; a damaged one gives way to one before"
    )
    max_failures: int = runtime(
        3,
        ge=0,
        description="how often ranks are started again after a worker, a node or the storage was "
        "lost; an error that would come again ends the run at once",
    )
    max_skipped_steps: int = runtime(
        10,
        ge=1,
        description="steps in a row after which the run gives up, where each has a gradient that "
        "is not finite; such a step changes no weight, is recorded as skipped and counts as a step "
        "of the plan",
    )
    cache_dir: str = runtime(
        "~/.cache/strata/tokens", description="folder for tokens on each node's own disk"
    )
    trackers: list[TrackerName] = runtime(
        [], description="where rank 0 sends what each step and test measures"
    )
    tensorboard_dir: str = runtime(
        "~/.cache/strata/tensorboard",
        description="folder on rank 0's node for event files, in one of each run",
    )

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _gathers_nothing(cls, stage: Any) -> Any:
        if stage in (3, "3"):
            raise ValueError(
                "3 would gather all weights for each micro-batch's two passes, to spare memory "
                "that an encoder's weights do not need; set 2 or less"
            )
        return stage

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set exactly one of steps and epochs")
        if self.keep == "best" and self.test_every_steps is None:
            raise ValueError(
                "keep=best needs tests in the loop to tell the best by; set test_every_steps"
            )
        return self

    def num_steps(self, plan: Plan) -> int:
        return self.steps or plan.num_steps(self.epochs or 0)


def teacher_settings(config: TrainConfig, batching: BatchingConfig) -> list[str]:
    """Settings that need the teacher's vectors."""
    settings = ["train.loss.teacher_margin"] if config.loss.teacher_margin is not None else []
    if any(phase.strategy == "neighbors" for phase in batching.schedule()):
        settings.append("batching.strategy=neighbors")
    return settings
