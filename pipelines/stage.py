"""What all stages share: a connection to Ray, and running a stage's tasks so that none is lost or
done twice.
"""

from __future__ import annotations

import datetime as dt
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.data

from clusterlib.artifacts.artifact import Artifact
from clusterlib.artifacts.credentials import redacted
from clusterlib.artifacts.draft import Draft, Receipt
from clusterlib.errors import StrataError
from pipelines import ENVIRONMENT, PACKAGES

ERRORS = "errors"  # folder of a root: tracebacks of what nobody expected

Made = TypeVar("Made")


@contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Connect to a Ray cluster, or start one on this machine and stop it at the end.

    A process that is connected already stays as it is.

    Args:
        address: of a running Ray cluster; by default RAY_ADDRESS, else this machine.
    """
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        # One logical CPU more than there are: coordinators take it, or actors that hold all others
        # would leave none for the tasks they wait for, and the run would hang without a word.
        num_cpus = (os.cpu_count() or 1) + 1
        # Without the dashboard Ray Train cannot clean up after a trial that was stopped: it keeps
        # its placement group and the next one hangs (seen with ray 2.60). It listens on loopback
        # only. "local", or Ray would look for a cluster that someone else started here.
        ray.init(
            address="local", num_cpus=num_cpus, include_dashboard=True, logging_level=logging.ERROR
        )
    else:
        ray.init(address=address, logging_level=logging.ERROR, runtime_env=_runtime_env())
    try:
        yield
    finally:
        ray.shutdown()


def _runtime_env() -> dict[str, Any]:
    """What travels to the nodes of a Ray cluster: our packages, unless a job has brought them, and
    settings.
    """
    variables = {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return {"env_vars": variables}
    root = Path(__file__).parents[1]
    return {"env_vars": variables, "py_modules": [str(root / package) for package in PACKAGES]}


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


def make(
    draft: Draft,
    label: str,
    tasks: Sequence[Task],
    worker: Callable[[], Callable[[Any], Receipt]],
    workers: Workers,
    publish: Callable[[list[Receipt]], Artifact],
) -> Artifact:
    """Run the tasks that have no receipt yet, on Ray Data actors, and publish the artifact from all
    receipts.

    Args:
        worker: called once in every process; what it returns turns a task's work into parts and a
            receipt.
        publish: makes the artifact from the receipts, given in task order.

    Raises:
        StrataError: a task found bad input, or failed in a way that nobody expected; of that the
            message says what it worked on and where the traceback is.
    """
    done = draft.receipts()
    todo = [task for task in tasks if task.id not in done]
    progress = ProgressLine(label, len(todo), len(tasks) - len(todo))
    if todo:
        dataset = ray.data.from_items(
            [{"task": index} for index in range(len(todo))], override_num_blocks=len(todo)
        )
        signed = dataset.map_batches(
            _Actor,
            fn_constructor_args=(draft, label, todo, worker),
            batch_size=1,
            compute=_pool(workers, len(todo)),
            num_cpus=workers.num_cpus,
            num_gpus=workers.num_gpus,
            memory=workers.memory_bytes or None,
        )

        def follow() -> None:
            for row in signed.iter_rows():
                if row["error"]:
                    raise StrataError(row["error"])
                progress.advance(row["num_rows"])

        told(draft, f"{label}: Ray could not run the tasks", "ray", follow)
    progress.close()
    receipts = [
        receipt for receipt in (draft.receipt(task.id) for task in tasks) if receipt is not None
    ]
    if len(receipts) == len(tasks):
        try:
            return publish(receipts)
        except FileNotFoundError:
            if draft.root.find(draft.spec) is None:
                raise
    # Another driver that works on the same artifact was first to publish it, and swept the receipts
    # or what `publish` was writing.
    made = draft.root.open(
        draft.spec.name, "tasks ended without a receipt, which is a fault of Strata's"
    )
    draft.sweep(made)
    return made


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
        folder = f"{draft.root.path}/{ERRORS}"
        path = f"{folder}/{draft.spec.name.replace('/', '-')}-{name}.txt"
        now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        text = redacted(f"{subject}\n{now}\n\n{traceback.format_exc()}")
        kept = f"its traceback is in {path}"
        try:
            draft.root.fs.create_dir(folder, recursive=True)
            with draft.root.fs.open_output_stream(path) as stream:
                stream.write(text.encode(errors="backslashreplace"))
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
    """A process that does a stage's tasks one by one and signs for each.

    Errors are told to the driver as data: Ray would bury them in tracebacks, or try again.
    """

    def __init__(
        self,
        draft: Draft,
        label: str,
        tasks: Sequence[Task],
        worker: Callable[[], Callable[[Any], Receipt]],
    ) -> None:
        self._draft = draft
        self._label = label
        self._tasks = tasks
        self._error = ""
        try:
            self._work = told(draft, f"{label}: a worker could not start", "start", worker)
        except StrataError as error:
            self._error = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        task = self._tasks[int(batch["task"][0])]
        num_rows, error = 0, self._error
        if not error:
            try:
                subject = f"{self._label}: task {task.id} ({task.subject})"
                num_rows = told(self._draft, subject, task.id, lambda: self._do(task))
            except StrataError as fault:
                error = str(fault)
        return {"num_rows": [num_rows], "error": [error]}

    def _do(self, task: Task) -> int:
        """The number of rows that the task read."""
        try:
            receipt = self._work(task.work)
            self._draft.commit(task.id, receipt)
        except OSError:
            # Another driver may have published the artifact and swept the files this task was
            # writing.
            if self._draft.root.find(self._draft.spec) is None:
                raise
            return 0
        return receipt.num_rows_in


class ProgressLine:
    """Tasks and rows done, rate and time left: one line rewritten on a terminal, a line now and
    then elsewhere.
    """

    def __init__(self, label: str, num_tasks: int, num_done_before: int) -> None:
        self._label = label
        self._num_tasks = num_tasks
        self._num_done = 0
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
        if self._num_done:
            self._show("\n")

    def _show(self, end: str) -> None:
        seconds = time.monotonic() - self._since
        left = seconds / self._num_done * (self._num_tasks - self._num_done)
        text = (
            f"{self._label}: {self._num_done}/{self._num_tasks} tasks, {self._num_rows:,} rows, "
            f"{self._num_rows / seconds:,.0f} rows/s, "
            + (f"{left:.0f} s left" if left else f"{seconds:.0f} s")
        )
        print(f"{text:<78}" if self._terminal else text, end=end, file=sys.stderr, flush=True)
