"""Training on Ray Train: ranks, failures, checkpoints in storage, and the finished model's
artifact.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import ray.exceptions
import ray.train
import ray.train.collective
import ray.train.torch
import torch
import torch.distributed as dist
import yaml

from clusterlib.artifacts.artifact import Artifact, Part, Root, Spec
from clusterlib.artifacts.config import dump, plain
from clusterlib.artifacts.draft import Draft, Receipt
from clusterlib.artifacts.lease import HeldError, Lease
from clusterlib.artifacts.storage import bare
from clusterlib.artifacts.tables import STEPS, TESTS
from clusterlib.batches.plan import BatchingConfig, Plan
from clusterlib.batches.visits import summarize
from clusterlib.errors import StrataError
from train import checkpoint
from train.data import TokenStore, cache_shards, check_teacher, load_tokenizer, shard_index
from train.engine import Engine
from train.export import export
from train.loop import Progress, TrainConfig, fit
from train.mine import Miner
from train.model import build_student, student_architecture
from train.trackers import TrackedRun, Tracker, check_trackers, start_trackers

EXPORT = "export"  # folder of the sentence-transformers model inside the artifact
_CHECKPOINTS = "checkpoints"
_LOG_SECONDS = 10


class Tests(Protocol):
    """What scores the student while it learns; it travels to rank 0."""

    def content(self) -> Mapping[str, Any]:
        """The settings that say what it is tested on."""
        ...

    def origin(self) -> Mapping[str, Any]:
        """What identifies the files of the tests."""
        ...

    def __call__(self, model: Path, device: str) -> list[dict[str, Any]]:
        """Score an exported model: rows of schema TESTS without the step, those of MEAN among
        them.
        """
        ...


def model_spec(
    config: TrainConfig, batching: BatchingConfig, shards: str, tests: Tests | None = None
) -> Spec:
    """What a trained model is made from; `shards` is a fingerprint."""
    settings, inputs = {"train": config, "batching": batching}, {"shards": shards}
    if config.test_every_steps and tests:
        return Spec("model", 3, {**settings, **tests.content()}, inputs, tests.origin())
    return Spec("model", 3, settings, inputs)


def train(
    config: TrainConfig,
    batching: BatchingConfig,
    shards: Artifact,
    root: Root,
    name: str,
    tests: Tests | None = None,
) -> Artifact:
    """Train a student on the shards' planned batches, continuing a run that was cut short.

    Args:
        name: what progress lines call the run.
        tests: what `config.test_every_steps` asks for.

    Returns:
        The `model` artifact: `export/`, a sentence-transformers folder, and the tables `steps` and,
            where there
        are tests in the loop, `tests`.

    Raises:
        StrataError: the settings do not fit the shards or each other; another driver trains the
            same model; a rank failed in a way that would come again; more workers or nodes were
            lost than `config.max_failures`.
    """
    draft = Draft(root, model_spec(config, batching, shards.fingerprint, tests))
    made = draft.find()
    if made is not None:
        return made
    check_trackers(config.trackers)
    Plan(shard_index(shards), batching)  # refuses what does not fit the shards
    if batching.global_batch_size % config.num_workers:
        raise StrataError(
            f"batching.global_batch_size={batching.global_batch_size} does not divide by "
            f"train.num_workers={config.num_workers}; every rank takes an equal share"
        )
    architecture = student_architecture(config.student, load_tokenizer(shards), _max_tokens(shards))
    config.loss.check_width(architecture.hidden_size)
    for setting in teacher_settings(config, batching):
        check_teacher(shards, setting)
    try:
        with draft.alone() as lease:
            receipt = draft.receipt(EXPORT)
            made = root.peek(draft.spec.name)  # after the receipt, which is swept when it is there
            if receipt is None and made is None:
                _fit(config, batching, shards, draft, name, tests, lease)
                receipt = draft.receipt(EXPORT)
    except HeldError as held:
        raise StrataError(f"train {name}: another driver trains this model: {held}") from None
    if receipt is None:
        made = draft.find()
        if made is None:
            raise RuntimeError(f"{draft.path}: training ended without an exported model")
        return made
    return draft.publish([receipt], receipt.stats)


def _fit(
    config: TrainConfig,
    batching: BatchingConfig,
    shards: Artifact,
    draft: Draft,
    name: str,
    tests: Tests | None,
    lease: Lease,
) -> None:
    """Run the ranks to the end, restarting them from the latest checkpoint when one is lost."""
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={
            "config": config,
            "batching": batching,
            "shards": shards,
            "draft": draft,
            "name": name,
            "tests": tests,
            "lease": lease,
        },
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
                raise ray.train.ControllerError(
                    error
                )  # of all errors, the one that is neither retried nor logged
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
    try:
        _learn(settings)
    except StrataError:
        raise
    except Exception as error:
        if not will_come_again(error):
            raise
        draft: Draft = settings["draft"]
        rank = ray.train.get_context().get_world_rank()
        part = draft.write_bytes(
            "errors", f"errors/rank-{rank}.txt", traceback.format_exc().encode()
        )
        remedy = (
            "; lower train.micro_batch_size, which changes no result"
            if _is_out_of_memory(error)
            else ""
        )
        raise StrataError(
            f"train {settings['name']}: rank {rank} failed: {_first_line(error)}{remedy}; "
            f"its traceback is in {draft.path}/{part.path}"
        ) from None


def _is_out_of_memory(error: Exception) -> bool:
    # On the CPU torch has no type of its own for it.
    return isinstance(
        error, (MemoryError, torch.OutOfMemoryError)
    ) or "can't allocate memory" in str(error)


def _learn(settings: Mapping[str, Any]) -> None:
    """A rank's work, from reading the shards to the last step."""
    config: TrainConfig = settings["config"]
    batching: BatchingConfig = settings["batching"]
    shards: Artifact = settings["shards"]
    draft: Draft = settings["draft"]
    tests: Tests = settings["tests"]
    lease: Lease = settings["lease"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    device = ray.train.torch.get_device() if config.use_gpu else torch.device("cpu")

    cache_dir, teacher = Path(config.cache_dir), bool(teacher_settings(config, batching))
    writes_cache = context.get_local_rank() == 0
    if writes_cache:
        cache_shards(shards, cache_dir, teacher)
    dist.barrier()
    tokenizer = load_tokenizer(shards)
    index = shard_index(shards)
    plan = Plan(index, batching)
    store = TokenStore(
        cache_shards(shards, cache_dir, teacher),
        index,
        tokenizer.pad_token_id,
        teacher=config.loss.teacher_margin is not None,
        max_tokens=_max_tokens(shards),
    )
    engine = Engine(
        build_student(
            config.student,
            tokenizer,
            _max_tokens(shards),
            config.seed,
            config.gradient_checkpointing,
            config.compile,
        ).to(device),
        config.optimizer,
        config.precision,
        config.zero_stage,
        batching.global_batch_size // config.num_workers,
    )
    # Not the one Ray Train remembers: that may be damaged, and then the one before it still serves.
    found = [
        checkpoint.latest(draft.root.fs, f"{draft.path}/{_CHECKPOINTS}") if rank == 0 else None
    ]
    dist.broadcast_object_list(found)
    progress = Progress()
    if found[0] is not None:
        with ray.train.Checkpoint(found[0], bare(draft.root.fs)).as_directory() as folder:
            progress = checkpoint.load(Path(folder), engine, rank)
    miner = Miner(draft, cache_dir, plan, store, engine, config.micro_batch_size, writes_cache)
    trackers = []
    if rank == 0:
        content, folder = plain(draft.spec.config), Path(config.tensorboard_dir).expanduser()
        run = TrackedRun(settings["name"], draft.spec.fingerprint, content, progress.step, folder)
        trackers = start_trackers(config.trackers, run)
    log = _Log(settings["name"], plan, config.num_steps(plan), progress, rank, trackers)

    def on_test(progress: Progress) -> None:
        if rank == 0:
            with tempfile.TemporaryDirectory() as folder:
                _export(draft, shards, engine, tokenizer, plan, progress.step, Path(folder))
                progress.tests += [
                    {"step": progress.step, **row} for row in tests(Path(folder), str(device))
                ]
            if config.keep == "best" and progress.step == progress.best_step:
                weights = engine.model.state_dict().items()
                progress.best = {
                    name: weight.detach().to("cpu", copy=True) for name, weight in weights
                }
            log.on_test(progress)
        # Not the process group's: a long test would be taken for a rank that hangs.
        ray.train.collective.barrier()

    def on_checkpoint(progress: Progress) -> None:
        if rank == 0:
            lease.check()
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(Path(folder), engine, progress, config, rank)
            ray.train.report(
                {"step": progress.step},
                checkpoint=ray.train.Checkpoint.from_directory(folder) if rank == 0 else None,
                # A name is used once: Ray Train keeps count of a damaged one of the same step and
                # deletes it later.
                checkpoint_dir_name=f"step-{progress.step:09d}-{time.time_ns()}",
            )

    checkpoints = f"{draft.path}/{_CHECKPOINTS}"
    fit(
        engine,
        plan,
        store,
        config,
        progress,
        miner,
        log.on_step,
        on_checkpoint,
        on_test,
        checkpoints,
    )
    miner.forget()
    if rank == 0:
        lease.check()
        _finish(draft, shards, engine, tokenizer, plan, progress)
        for tracker in trackers:
            tracker.close()


def _finish(
    draft: Draft, shards: Artifact, engine: Engine, tokenizer: Any, plan: Plan, progress: Progress
) -> None:
    """Write the exported model and the records of all steps and tests, then the receipt that says
    so.
    """
    kept_step = progress.step
    if progress.best:
        kept_step = progress.best_step
        engine.model.load_state_dict(progress.best)
    with tempfile.TemporaryDirectory() as folder:
        _export(draft, shards, engine, tokenizer, plan, kept_step, Path(folder))
        parts: list[Part] = draft.write_folder(EXPORT, Path(folder))
    parts.append(
        draft.write("steps", "steps", STEPS, [pa.Table.from_pylist(progress.records, schema=STEPS)])
    )
    if progress.tests:
        parts.append(
            draft.write(
                "tests", "tests", TESTS, [pa.Table.from_pylist(progress.tests, schema=TESTS)]
            )
        )
    stats = {
        "num_steps": progress.step,
        "num_skipped_steps": progress.num_skipped,
        "kept_step": kept_step,
        "num_parameters": sum(weight.numel() for weight in engine.model.parameters()),
        "phases": [dataclasses.asdict(phase) for phase in summarize(plan, progress.step)],
        "train_seconds": sum(record["step_seconds"] for record in progress.records),
        "data_seconds": sum(record["data_seconds"] for record in progress.records),
    }
    draft.commit(EXPORT, Receipt(parts, stats=stats))


def teacher_settings(config: TrainConfig, batching: BatchingConfig) -> list[str]:
    """Settings that need the teacher's vectors."""
    settings = ["train.loss.teacher_margin"] if config.loss.teacher_margin is not None else []
    if any(phase.strategy == "neighbors" for phase in batching.schedule()):
        settings.append("batching.strategy=neighbors")
    return settings


def _export(
    draft: Draft,
    shards: Artifact,
    engine: Engine,
    tokenizer: Any,
    plan: Plan,
    step: int,
    folder: Path,
) -> None:
    """Write the student as it is after `step`."""
    tokens = shards.config["shard"]
    prompts = {"query": tokens["query_prompt"], "document": tokens["passage_prompt"]}
    export(
        engine.model,
        tokenizer,
        folder,
        prompts,
        _max_tokens(shards),
        _card(draft, shards, plan, step),
    )


def _max_tokens(shards: Artifact) -> int:
    tokens = shards.config["shard"]
    return int(max(tokens["query_max_tokens"], tokens["passage_max_tokens"]))


def _card(draft: Draft, shards: Artifact, plan: Plan, step: int) -> str:
    """The README.md of the model after `step`."""
    front = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction", "strata"],
    }
    recipe = yaml.safe_dump(dump(draft.spec.config), sort_keys=False)
    strategies = ", then ".join(f"`{phase.settings.title}`" for phase in plan.phases)
    return (
        f"---\n{yaml.safe_dump(front)}---\n\n# Strata student {draft.spec.fingerprint}\n\n"
        f"Trained by Strata on {plan.num_rows} pairs of "
        f"{', '.join(shards.stats['num_rows_by_source'])} ({shards.name}), with in-batch negatives "
        f"chosen by the strategy {strategies} (arXiv 2407.18887). These are its weights after step "
        f"{step:,}.\n\n```python\nfrom sentence_transformers import SentenceTransformer\n\n"
        f'model = SentenceTransformer("path/to/this/folder")\n'
        "similarity = model.similarity(model.encode_query([query]), "
        f"model.encode_document(passages))\n```\n\n## Recipe\n\n```yaml\n{recipe}```\n"
    )


class _Log:
    """A progress line on rank 0 every few seconds, and every measure to its trackers."""

    def __init__(
        self,
        name: str,
        plan: Plan,
        num_steps: int,
        progress: Progress,
        rank: int,
        trackers: Sequence[Tracker],
    ) -> None:
        self._num_steps = num_steps
        self._batch_size = plan.config.global_batch_size
        self._trackers = trackers
        self._loud = rank == 0
        self._since = time.monotonic()
        self._first = progress.step
        self._next = self._since
        if self._loud:
            resumed = f", continued at step {progress.step}" if progress.step else ""
            phases = "; then ".join(
                f"{phase.settings.title}: {phase.num_batches} batches an epoch, "
                f"{len(phase.strata)} strata"
                for phase in plan.phases
            )
            print(
                f"train {name}: {phases}, {num_steps} steps of {self._batch_size} pairs{resumed}",
                flush=True,
            )

    def on_step(self, progress: Progress) -> None:
        self._track(progress.step, _scalars(progress.records[-1], self._batch_size))
        now = time.monotonic()
        last = progress.records[-1]
        if self._loud and last["skipped"]:
            print(
                f"train step {progress.step}/{self._num_steps} skipped: its gradient is not finite "
                f"(loss {last['loss']:.3f}, stratum {last['stratum']}); {progress.num_skipped} "
                "skipped so far",
                flush=True,
            )
        if not self._loud or (now < self._next and progress.step < self._num_steps):
            return
        self._next = now + _LOG_SECONDS
        rate = (progress.step - self._first) / (now - self._since)
        left = (self._num_steps - progress.step) / rate
        print(
            f"train step {progress.step}/{self._num_steps} loss {last['loss']:.3f} accuracy "
            f"{last['accuracy']:.3f} hardness {last['hardness']:.3f} {rate * self._batch_size:.0f} "
            f"pairs/s {left:.0f} s left",
            flush=True,
        )

    def on_test(self, progress: Progress) -> None:
        rows = [row for row in progress.tests if row["step"] == progress.step]
        self._track(
            progress.step, {f"test/{row['task']}/{row['metric']}": row["value"] for row in rows}
        )
        means = progress.means()
        print(
            f"train step {progress.step}/{self._num_steps} tests: mean NDCG@10 "
            f"{means[progress.step]:.4f}, best {means[progress.best_step]:.4f} at step "
            f"{progress.best_step}",
            flush=True,
        )

    def _track(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, values)


def _scalars(record: Mapping[str, Any], batch_size: int) -> dict[str, float]:
    """What trackers show of a record of schema STEPS."""
    measures = {
        f"train/{name}": value for name, value in record.items() if isinstance(value, float)
    }
    return {**measures, "train/pairs_per_second": batch_size / record["step_seconds"]}
