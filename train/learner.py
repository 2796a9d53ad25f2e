"""A rank's learner: plan, store, engine, miner, checkpoints, tests and trackers, without Ray.

What differs between places to learn in stands in `Surroundings`; ranks talk over torch.distributed.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import torch

from clusterlib.artifacts.artifact import Part
from clusterlib.artifacts.config import plain
from clusterlib.artifacts.draft import Draft, Receipt
from clusterlib.artifacts.tables import TESTS
from clusterlib.batches.plan import BatchingConfig, Plan
from clusterlib.batches.visits import summarize
from clusterlib.clusters.shards import ShardIndex, Shards
from clusterlib.errors import StrataError
from train import checkpoint, ranks
from train.config import TrainConfig, teacher_settings
from train.data import TokenStore, cache_shards, check_teacher, load_tokenizer
from train.engine import Engine
from train.export import EXPORT, export, model_card
from train.loop import fit
from train.measures import STEPS, scalars
from train.mine import Miner
from train.model import build_student, student_architecture
from train.progress import Progress, ProgressLines
from train.trackers import TrackedRun, Tracker, check_trackers, start_trackers


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


@dataclass(frozen=True)
class Run:
    """What is to be learned; it travels to every rank.

    Attributes:
        draft: of the model.
        name: for people.
        tests: what `config.test_every_steps` asks for.
    """

    config: TrainConfig
    batching: BatchingConfig
    shards: Shards
    draft: Draft
    name: str
    tests: Tests | None = None


class Surroundings(Protocol):
    """What a learner asks of the place where it runs.

    Attributes:
        device: where this rank computes.
        local_rank: this rank's number among those of its node; 0 writes the node's caches.
        checkpoints: where they are, for people.
    """

    device: torch.device
    local_rank: int
    checkpoints: str

    def latest_checkpoint(self) -> AbstractContextManager[Path | None]:
        """A local folder that holds the latest whole checkpoint of the run, or None; every rank
        calls it.
        """
        ...

    def keep_checkpoint(self, folder: Path, step: int) -> None:
        """Take what rank 0 has in its local folder as the checkpoint after `step`; every rank
        calls it.
        """
        ...

    def wait_for_all(self) -> None:
        """Until all ranks are here, however long that takes."""
        ...


def check(config: TrainConfig, batching: BatchingConfig, shards: Shards) -> None:
    """Refuse settings that do not fit the shards or each other.

    Raises:
        StrataError: there are such.
    """
    check_trackers(config.trackers)
    Plan(shards.index, batching)  # refuses what does not fit the shards
    if batching.global_batch_size % config.num_workers:
        raise StrataError(
            f"batching.global_batch_size={batching.global_batch_size} does not divide by "
            f"train.num_workers={config.num_workers}; every rank takes an equal share"
        )
    tokenizer = load_tokenizer(shards)
    architecture = student_architecture(config.student, tokenizer, shards.max_tokens)
    config.loss.check_width(architecture.hidden_size)
    for setting in teacher_settings(config, batching):
        check_teacher(shards, setting)


class Learner:
    """One rank of a run, where its latest checkpoint left it; every rank makes one.

    Attributes:
        progress: how far the run is.
    """

    def __init__(self, run: Run, surroundings: Surroundings) -> None:
        self.run, self.surroundings = run, surroundings
        self.rank, self.num_ranks = ranks.place()
        self.tokenizer = load_tokenizer(run.shards)
        index = run.shards.index
        self.plan = Plan(index, run.batching)
        self.store = self._open_store(index)
        self.engine = self._start_engine()
        self.miner = Miner(
            run.draft,
            Path(run.config.cache_dir),
            self.plan,
            self.store,
            self.engine,
            run.config.micro_batch_size,
            writes_cache=surroundings.local_rank == 0,
        )
        self.progress = Progress()
        with surroundings.latest_checkpoint() as folder:
            if folder is not None:
                self.progress = checkpoint.load(folder, self.engine, self.rank)
        self._trackers: list[Tracker] = []
        self._lines: ProgressLines | None = None
        if self.rank == 0:
            self._trackers = self._start_trackers()
            num_steps = run.config.num_steps(self.plan)
            self._lines = ProgressLines(run.name, self.plan, num_steps, self.progress)

    def _open_store(self, index: ShardIndex) -> TokenStore:
        run = self.run
        cache_dir = Path(run.config.cache_dir)
        with_teacher = bool(teacher_settings(run.config, run.batching))
        if self.surroundings.local_rank == 0:
            cache_shards(run.shards, cache_dir, with_teacher)
        ranks.wait()
        return TokenStore(
            cache_shards(run.shards, cache_dir, with_teacher),
            index,
            self.tokenizer.pad_token_id,
            teacher=run.config.loss.teacher_margin is not None,
            max_tokens=run.shards.max_tokens,
        )

    def _start_engine(self) -> Engine:
        config = self.run.config
        student = build_student(
            config.student,
            self.tokenizer,
            self.run.shards.max_tokens,
            config.seed,
            config.gradient_checkpointing,
            config.compile,
        )
        return Engine(
            student.to(self.surroundings.device),
            config.optimizer,
            config.precision,
            config.zero_stage,
            self.run.batching.global_batch_size // self.num_ranks,
        )

    def _start_trackers(self) -> list[Tracker]:
        config, spec = self.run.config, self.run.draft.spec
        folder = Path(config.tensorboard_dir).expanduser()
        settings, step = plain(spec.config), self.progress.step
        tracked = TrackedRun(self.run.name, spec.fingerprint, settings, step, folder)
        return start_trackers(config.trackers, tracked)

    def fit(self) -> None:
        """Train to the last step."""
        fit(
            self.engine,
            self.plan,
            self.store,
            self.run.config,
            self.progress,
            self.miner,
            self._on_step,
            self._on_checkpoint,
            self._on_test,
            self.surroundings.checkpoints,
        )
        self.miner.forget()

    def finish(self) -> None:
        """On rank 0 write the exported model and the records of all steps and tests, then the
        receipt that says so.
        """
        if self.rank != 0:
            return
        progress, draft = self.progress, self.run.draft
        kept_step = progress.step
        if progress.best:
            kept_step = progress.best_step
            self.engine.model.load_state_dict(progress.best)
        with tempfile.TemporaryDirectory() as folder:
            self._export(Path(folder), kept_step)
            parts: list[Part] = draft.write_folder(EXPORT, Path(folder))
        tables = [("steps", STEPS, progress.records), ("tests", TESTS, progress.tests)]
        parts += [
            draft.write(name, name, schema, [pa.Table.from_pylist(rows, schema=schema)])
            for name, schema, rows in tables
            if rows
        ]
        draft.commit(EXPORT, Receipt(parts, stats=self._stats(kept_step)))
        for tracker in self._trackers:
            tracker.close()

    def _stats(self, kept_step: int) -> dict[str, Any]:
        records = self.progress.records
        return {
            "num_steps": self.progress.step,
            "num_skipped_steps": self.progress.num_skipped,
            "kept_step": kept_step,
            "num_parameters": sum(weight.numel() for weight in self.engine.model.parameters()),
            "phases": [
                dataclasses.asdict(phase) for phase in summarize(self.plan, self.progress.step)
            ],
            "train_seconds": sum(record["step_seconds"] for record in records),
            "data_seconds": sum(record["data_seconds"] for record in records),
        }

    def _export(self, folder: Path, step: int) -> None:
        """Write the student as it is after `step`."""
        spec, max_tokens = self.run.draft.spec, self.run.shards.max_tokens
        card = model_card(spec, self.plan, step)
        prompts = dict(spec.config["prompts"])
        export(self.engine.model, self.tokenizer, folder, prompts, max_tokens, card)

    def _on_step(self, progress: Progress) -> None:
        if self._lines:
            self._track(scalars(progress.records[-1], self.run.batching.global_batch_size))
            self._lines.on_step(progress)

    def _on_checkpoint(self, progress: Progress) -> None:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(Path(folder), self.engine, progress, self.run.config, self.rank)
            self.surroundings.keep_checkpoint(Path(folder), progress.step)

    def _on_test(self, progress: Progress) -> None:
        if self._lines:
            rows = self._test()
            progress.tests += [{"step": progress.step, **row} for row in rows]
            if self.run.config.keep == "best" and progress.step == progress.best_step:
                weights = self.engine.model.state_dict().items()
                progress.best = {
                    name: weight.detach().to("cpu", copy=True) for name, weight in weights
                }
            self._track({f"test/{row['task']}/{row['metric']}": row["value"] for row in rows})
            self._lines.on_test(progress)
        # The process group's barrier would take a long test for a rank that hangs.
        self.surroundings.wait_for_all()

    def _test(self) -> list[dict[str, Any]]:
        assert self.run.tests is not None
        with tempfile.TemporaryDirectory() as folder:
            self._export(Path(folder), self.progress.step)
            return self.run.tests(Path(folder), str(self.surroundings.device))

    def _track(self, values: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(self.progress.step, values)
