"""Running the tasks of a stage on Ray so that none is lost or done twice."""

from __future__ import annotations

import contextlib
import datetime as dt
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
import ray.data

from clusterlib.artifacts.artifact import Artifact
from clusterlib.artifacts.credentials import redacted
from clusterlib.artifacts.draft import Draft, Receipt
from clusterlib.artifacts.storage import write
from clusterlib.errors import StrataError

ERRORS = "errors"  # folder of a root: tracebacks of what nobody expected

Made = TypeVar("Made")


@dataclass(frozen=True)
class Task:
    """A piece of a stage's work.

    Attributes:
        id: the same in every run.
        work: what its worker is given.
        subject: the file, part or source it works on, for messages.
    """

    id: str
    work: Any
    subject: str


@dataclass(frozen=True)
class Workers:
    """How many processes work on a stage, and what each takes.

    Attributes:
        min_workers: started at once; more follow while tasks wait.
        max_workers: None for as many as the Ray cluster has room for now; a number lets it grow to
            that many.
    """

    min_workers: int = 1
    max_workers: int | None = None
    num_cpus: float = 1
    num_gpus: float = 0
    memory_bytes: int = 0


@dataclass(frozen=True)
class Job:
    """An artifact to be made of tasks.

    Attributes:
        worker: called once in every process that works on the job; what it returns turns a task's
            work into parts and a receipt.
        publish: makes the artifact from the receipts, given in task order.
    """

    draft: Draft
    tasks: Sequence[Task]
    worker: Callable[[], Callable[[Any], Receipt]]
    publish: Callable[[list[Receipt]], Artifact]


def make(stage: str, jobs: Sequence[Job], workers: Workers) -> list[Artifact]:
    """Run the tasks of all jobs that have no receipt yet, on one pool of Ray Data actors, and
    publish each artifact when its last task has signed.

    Raises:
        StrataError: a task found bad input, or failed in a way that nobody expected; of that the
            message says what it worked on and where the traceback is.
    """
    done = [job.draft.receipts() for job in jobs]
    todo = [
        (number, task)
        for number, job in enumerate(jobs)
        for task in job.tasks
        if task.id not in done[number]
    ]
    num_left = Counter(number for number, _ in todo)
    made = {number: _publish(stage, job) for number, job in enumerate(jobs) if not num_left[number]}
    progress = ProgressLine(stage, len(todo), sum(len(job.tasks) for job in jobs) - len(todo))
    subject = f"{stage}: Ray could not run the tasks"
    with contextlib.ExitStack() as stack:
        for number, job in enumerate(jobs):
            if num_left[number]:
                stack.enter_context(job.draft.signed_in())
        rows = _signed(stage, jobs, todo, workers) if todo else iter(())
        while (row := told(jobs[0].draft, subject, "ray", lambda: next(rows, None))) is not None:
            if row["error"]:
                raise StrataError(row["error"])
            progress.advance(row["num_rows"])
            num_left[row["job"]] -= 1
            if not num_left[row["job"]]:
                made[row["job"]] = _publish(stage, jobs[row["job"]])
    progress.close()
    return [made[number] for number in range(len(jobs))]


def _signed(
    stage: str, jobs: Sequence[Job], todo: Sequence[tuple[int, Task]], workers: Workers
) -> Iterator[dict[str, Any]]:
    """Of every task, once it is done: its job, the rows it read, and its error if it had one."""
    dataset = ray.data.from_items(
        [{"task": index} for index in range(len(todo))], override_num_blocks=len(todo)
    )
    signed = dataset.map_batches(
        _Actor,
        fn_constructor_args=(stage, jobs, todo),
        batch_size=1,
        compute=_pool(workers, len(todo)),
        num_cpus=workers.num_cpus,
        num_gpus=workers.num_gpus,
        memory=workers.memory_bytes or None,
    )
    return iter(signed.iter_rows())


def _publish(stage: str, job: Job) -> Artifact:
    draft = job.draft

    def conclude() -> Artifact:
        receipts = [
            receipt
            for receipt in (draft.receipt(task.id) for task in job.tasks)
            if receipt is not None
        ]
        if len(receipts) < len(job.tasks):
            raise FileNotFoundError(f"{len(job.tasks) - len(receipts)} tasks left no receipt")
        return job.publish(receipts)

    subject = f"{stage} {draft.spec.label}: publishing"
    return told(draft, subject, "publish", lambda: draft.unless_made(conclude))


def _pool(workers: Workers, num_tasks: int) -> ray.data.ActorPoolStrategy:
    room = ray.cluster_resources()
    if workers.num_gpus and room.get("GPU", 0) < workers.num_gpus:
        raise StrataError(
            f"a worker asks for {workers.num_gpus} GPU and the Ray cluster has "
            f"{room.get('GPU', 0):g}"
        )
    asked = {"CPU": workers.num_cpus, "GPU": workers.num_gpus, "memory": workers.memory_bytes}
    spare = {"CPU": 1}  # for the coordinators
    fits = [
        (room.get(name, 0) - spare.get(name, 0)) / amount
        for name, amount in asked.items()
        if amount
    ]
    most = max(1, min(workers.max_workers or int(min(fits)), num_tasks))
    return ray.data.ActorPoolStrategy(min_size=min(workers.min_workers, most), max_size=most)


def largest_node_bytes() -> float:
    """Memory that workers may take on the node of the Ray cluster that has most."""
    return max(float(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"])


def told(draft: Draft, subject: str, name: str, call: Callable[[], Made]) -> Made:
    """What `call` returns; an exception that nobody expected is told in one message.

    Its traceback, from `call` on, is kept in `{root}/errors/{kind}-{fingerprint}-{name}.txt`.

    Args:
        subject: the stage, the task and what it works on; the message begins with it.

    Raises:
        StrataError: as `call` raised it, or for any other exception.
    """
    try:
        return call()
    except StrataError:
        raise
    # Whatever it was, the user gets one message and we get the traceback.
    except Exception as error:  # noqa: BLE001
        path = f"{draft.root.path}/{ERRORS}/{draft.spec.name.replace('/', '-')}-{name}.txt"
        now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        text = redacted(f"{subject}\n{now}\n\n{traceback.format_exc()}")
        kept = f"its traceback is in {path}"
        try:
            write(draft.root.fs, path, text.encode(errors="backslashreplace"))
        except OSError as fault:
            kept = f"its traceback could not be written to {path} ({fault})"
        reason = next(iter(str(error).splitlines()), "no message")
        raise StrataError(f"{subject}: {type(error).__name__}: {reason}; {kept}") from error


def fetch(draft: Draft, subject: str, reference: ray.ObjectRef) -> Any:
    """The result of a Ray task that tells its errors with `told`; what Ray itself fails at is told
    likewise.
    """

    def get() -> Any:
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, StrataError):
                raise error.cause from None
            raise

    return told(draft, subject, "ray", get)


class _Actor:
    """A process that does tasks one by one and signs for each.

    Errors are told to the driver as data: Ray would bury them in tracebacks, or try again.
    """

    def __init__(self, stage: str, jobs: Sequence[Job], todo: Sequence[tuple[int, Task]]) -> None:
        self._stage = stage
        self._jobs = jobs
        self._todo = todo
        self._workers: dict[int, Callable[[Any], Receipt]] = {}

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        number, task = self._todo[int(batch["task"][0])]
        draft = self._jobs[number].draft
        subject = f"{self._stage} {draft.spec.label}: task {task.id} ({task.subject})"
        num_rows, error = 0, ""
        try:
            num_rows = told(draft, subject, task.id, lambda: self._do(number, task))
        except StrataError as fault:
            error = str(fault)
        return {"job": [number], "num_rows": [num_rows], "error": [error]}

    def _do(self, number: int, task: Task) -> int:
        """The number of rows that the task read."""
        job = self._jobs[number]

        def do() -> Receipt:
            if number not in self._workers:
                self._workers[number] = job.worker()
            receipt = self._workers[number](task.work)
            job.draft.commit(task.id, receipt)
            return receipt

        done = job.draft.unless_made(do)
        return done.num_rows_in if isinstance(done, Receipt) else 0


class ProgressLine:
    """Tasks and rows done, rate and time left: one line rewritten on a terminal, a line now and
    then elsewhere.
    """

    def __init__(self, label: str, num_tasks: int, num_done_before: int) -> None:
        self._label = label
        self._num_tasks = num_tasks
        self._num_done = self._num_shown = 0
        self._num_rows = 0
        self._since = self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()
        if num_done_before:
            print(
                f"{label}: {num_done_before} tasks were done before, {num_tasks} to go",
                file=sys.stderr,
            )

    def advance(self, num_rows: int) -> None:
        self._num_done += 1
        self._num_rows += num_rows
        now = time.monotonic()
        if now - self._shown >= (0.2 if self._terminal else 10):
            self._shown = now
            self._show("\r" if self._terminal else "\n")

    def close(self) -> None:
        if self._num_done > self._num_shown or (self._num_done and self._terminal):
            self._show("\n")

    def _show(self, end: str) -> None:
        self._num_shown = self._num_done
        seconds = time.monotonic() - self._since
        left = seconds / self._num_done * (self._num_tasks - self._num_done)
        text = (
            f"{self._label}: {self._num_done}/{self._num_tasks} tasks, {self._num_rows:,} rows, "
            f"{self._num_rows / seconds:,.0f} rows/s, "
            + (f"{left:.0f} s left" if left else f"{seconds:.0f} s")
        )
        print(f"{text:<78}" if self._terminal else text, end=end, file=sys.stderr, flush=True)
