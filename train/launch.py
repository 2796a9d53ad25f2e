"""Training on Ray Train: ranks, failures, checkpoints in storage, and the finished model's
artifact.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray.exceptions
import ray.train
import ray.train.collective
import ray.train.torch
import torch
import torch.distributed as dist

from clusterlib.artifacts.artifact import Artifact, Root, Spec
from clusterlib.artifacts.draft import Draft
from clusterlib.artifacts.lease import HeldError, Lease
from clusterlib.artifacts.storage import bare
from clusterlib.batches.plan import BatchingConfig
from clusterlib.clusters.shards import Shards
from clusterlib.errors import StrataError
from train import checkpoint, ranks
from train.config import TrainConfig
from train.export import EXPORT
from train.learner import Learner, Run, Tests, check

_CHECKPOINTS = "checkpoints"


def model_spec(
    config: TrainConfig,
    batching: BatchingConfig,
    shards: Mapping[str, Spec],
    prompts: Mapping[str, str],
    name: str,
    tests: Tests | None = None,
) -> Spec:
    """What a trained model is made from.

    Args:
        shards: of each source.
        prompts: of the exported model, by sentence-transformers' names.
        name: what people call the run.
        tests: what `config.test_every_steps` asks for.
    """
    settings: dict[str, Any] = {"train": config, "batching": batching, "prompts": prompts}
    inputs = {f"shards.{source}": shards[source] for source in sorted(shards)}
    if config.test_every_steps and tests:
        settings |= tests.content()
        return Spec("model", 4, settings, inputs, tests.origin(), label=name)
    return Spec("model", 4, settings, inputs, label=name)


def open_shards(spec: Spec, root: Root) -> Shards:
    """What the model of `spec` learns from."""
    return Shards([root.open(shards) for shards in spec.inputs.values()])


def train(spec: Spec, root: Root, tests: Tests | None = None) -> Artifact:
    """Train a student on the shards' planned batches, continuing a run that was cut short.

    Args:
        tests: what `test_every_steps` asks for.

    Returns:
        The `model` artifact: `export/`, a sentence-transformers folder, and the tables `steps` and,
        where there are tests in the loop, `tests`.

    Raises:
        StrataError: the settings do not fit the shards or each other; a rank failed in a way that
            would come again; another driver trains the same model; more workers or nodes were
            lost than `max_failures`.
    """
    config: TrainConfig = spec.config["train"]
    batching: BatchingConfig = spec.config["batching"]
    shards = open_shards(spec, root)
    check(config, batching, shards)
    draft = Draft(root, spec)
    try:
        with draft.alone() as lease:
            receipt = draft.receipt(EXPORT)
            made = root.peek(spec.name)  # after the receipt, which is swept when it is there
            if receipt is None and made is None:
                _fit(Run(config, batching, shards, draft, spec.label, tests), lease)
                receipt = draft.receipt(EXPORT)
    except HeldError as held:
        raise StrataError(f"train {spec.label}: another driver trains this model: {held}") from None
    if receipt is None:
        made = draft.find()
        if made is None:
            raise RuntimeError(f"{draft.path}: training ended without an exported model")
        return made
    return draft.publish([receipt], receipt.stats)


def _fit(run: Run, lease: Lease) -> None:
    """Run the ranks to the end, restarting them from the latest checkpoint when one is lost."""
    config, draft, name = run.config, run.draft, run.name
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={"run": run, "lease": lease},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers, use_gpu=config.use_gpu
        ),
        run_config=ray.train.RunConfig(
            # The same name and path make Ray Train go on from the latest checkpoint it finds there.
            name=_CHECKPOINTS,
            storage_path=draft.path,
            storage_filesystem=bare(draft.root.fs),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.checkpoints_to_keep),
            callbacks=[_Failures(name, config.max_failures)],
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        trainer.fit()
    except ray.train.ControllerError as error:
        if isinstance(error.controller_failure, StrataError):
            raise error.controller_failure from None
        raise StrataError(
            f"train {name}: Ray Train could not run: {_first_line(error.controller_failure)}"
        ) from error
    except ray.train.WorkerGroupError as error:
        raise StrataError(
            f"train {name}: gave up after {config.max_failures} new starts (train.max_failures); "
            f"{_describe(error.worker_failures)}. The same command goes on from the latest "
            "checkpoint"
        ) from error


class _Failures(ray.train.UserCallback):
    """Ends the run when a rank failed in a way that would come again; by itself, Ray Train tries
    all failures again.

    It lives in Ray Train's controller, which takes down the ranks that wait for the failed one.
    """

    def __init__(self, name: str, max_failures: int) -> None:
        self._name = name
        self._max_failures = max_failures
        self._num_failures = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for _, error in sorted(worker_exceptions.items()):
            if isinstance(error, StrataError):
                # The one type of error that Ray Train neither retries nor logs.
                raise ray.train.ControllerError(error)
        self._num_failures += 1
        if self._num_failures <= self._max_failures:
            print(
                f"train {self._name}: {_describe(worker_exceptions)}; starting again from the "
                f"latest checkpoint, {self._num_failures} of {self._max_failures} times "
                "(train.max_failures)",
                flush=True,
            )


def _describe(failures: Mapping[int, Exception]) -> str:
    """What happened to the first rank that was lost; where none was, to the first that failed."""
    rank = min(failures, key=lambda rank: (not _is_lost(failures[rank]), rank))
    return f"rank {rank} " + (
        "was lost" if _is_lost(failures[rank]) else f"failed: {_first_line(failures[rank])}"
    )


def _is_lost(error: Exception) -> bool:
    return type(error).__name__.startswith("WorkerHealthCheck")  # Ray Train's, which are not public


def _first_line(error: BaseException) -> str:
    return (
        f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'it says no more')}"
    )


def will_come_again(error: BaseException) -> bool:
    """Whether a new start would end in the same error: bad input, a bug, too little memory.

    Others come of machines: another rank that is lost, storage that cannot be reached, a GPU that
    fails.
    """
    if isinstance(error, (PermissionError, FileExistsError, NotADirectoryError)):
        return True
    if isinstance(
        error, (OSError, ray.exceptions.RayError, torch.AcceleratorError, dist.DistError)
    ):
        return False
    # Where gloo cannot reach a rank it raises a RuntimeError like any other; only the place tells.
    places = (
        frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)
    )
    return not (
        isinstance(error, RuntimeError)
        and any(place.startswith("torch.distributed.") for place in places)
    )


def _worker(settings: Mapping[str, Any]) -> None:
    """What each rank runs.

    Raises:
        StrataError: this rank failed in a way that would come again.
    """
    # Ray Train and DeepSpeed log their inner life; rank 0 and the driver say what matters.
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.WARNING)
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)
    run: Run = settings["run"]
    try:
        learner = Learner(run, _RayTrain(run, settings["lease"]))
        learner.fit()
        settings["lease"].check()
        learner.finish()
    except StrataError:
        raise
    except Exception as error:
        if not will_come_again(error):
            raise
        rank, details = ranks.place()[0], traceback.format_exc().encode()
        part = run.draft.write_bytes("errors", f"errors/rank-{rank}.txt", details)
        remedy = (
            "; lower train.micro_batch_size, which changes no result"
            if _is_out_of_memory(error)
            else ""
        )
        raise StrataError(
            f"train {run.name}: rank {rank} failed: {_first_line(error)}{remedy}; "
            f"its traceback is in {run.draft.path}/{part.path}"
        ) from None


def _is_out_of_memory(error: Exception) -> bool:
    # On the CPU torch raises a RuntimeError like any other.
    return isinstance(
        error, (MemoryError, torch.OutOfMemoryError)
    ) or "can't allocate memory" in str(error)


class _RayTrain:
    """What a learner asks of its surroundings, on a worker of Ray Train."""

    def __init__(self, run: Run, lease: Lease) -> None:
        self._lease = lease
        self.device = ray.train.torch.get_device() if run.config.use_gpu else torch.device("cpu")
        self.local_rank = ray.train.get_context().get_local_rank()
        self.checkpoints = f"{run.draft.path}/{_CHECKPOINTS}"
        self._fs = bare(run.draft.root.fs)

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        # The one that Ray Train remembers may be damaged, and then the one before it still serves.
        found = ranks.from_first(
            checkpoint.latest(self._fs, self.checkpoints) if ranks.place()[0] == 0 else None
        )
        if found is None:
            yield None
            return
        with ray.train.Checkpoint(found, self._fs).as_directory() as folder:
            yield Path(folder)

    def keep_checkpoint(self, folder: Path, step: int) -> None:
        if ranks.place()[0] == 0:
            self._lease.check()
        kept = ray.train.Checkpoint.from_directory(folder) if ranks.place()[0] == 0 else None
        # Ray Train remembers a damaged checkpoint of this step too and deletes it later by its
        # name, so a name is used once.
        name = f"step-{step:09d}-{time.time_ns()}"
        ray.train.report({"step": step}, checkpoint=kept, checkpoint_dir_name=name)

    def wait_for_all(self) -> None:
        ray.train.collective.barrier()
