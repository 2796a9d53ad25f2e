"""Items 12 and 15: two drivers make one artifact, step by step in any order, killed anywhere.

Drivers run in threads of which one runs at a time, up to its next operation on files. After every
operation the artifact is absent or whole and the manifest is the first that stood; whatever has
happened, a driver that runs to its end ends with the artifact, and nothing else is left.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from clusterlib.artifacts import lease, storage
from clusterlib.artifacts.artifact import Root, Spec
from clusterlib.artifacts.draft import Draft, Receipt

SCHEMA = pa.schema([("x", pa.int64())])
SPEC = Spec("things", 1, {})
TASKS = ("0", "1")
WHILE = 400  # operations; where drivers take turns, one may wait as long as another does nothing


class KilledError(BaseException):
    """As SIGKILL: no file is touched after it."""


class Store(storage.Patient):
    """A local folder whose operations are steps; what a store does in several is several.

    Attributes:
        posix: it renames files and links them, as POSIX file systems do and object stores do not.
    """

    def __init__(self, world):
        self.fs = pafs.LocalFileSystem()
        self._world = world

    def _call(self, name, *arguments, **options):
        self._world.step()
        if name == "move" and not self._world.posix:
            self.fs.copy_file(*arguments)
            self._world.step()
            self.fs.delete_file(arguments[0])
            return None
        if name == "delete_dir":
            for path in sorted(Path(arguments[0]).rglob("*")):
                if path.is_file():
                    path.unlink(missing_ok=True)
                    self._world.step()
        return getattr(self.fs, name)(*arguments, **options)


class Driver:
    """A driver in a thread of its own, which stops before each step until it is told to go on."""

    def __init__(self, world, number):
        self.number, self.world = number, world
        self.killed, self.ended, self.made, self.error = False, False, None, None
        self.held = {}  # id -> a lease that it holds, its beats, and when the last was
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.driver = self
        self._thread.start()
        self._stopped.acquire()

    def _run(self):
        try:
            self.step()
            self.made = self.world.drive(self.number)
        except KilledError:
            pass
        except BaseException as error:  # noqa: BLE001 - it is told by World.check
            self.error = error
        self.ended = True
        self._stopped.release()

    def step(self):
        self._stopped.release()
        self._go.acquire()
        if self.killed:
            raise KilledError

    def advance(self):
        """Let it do one operation."""
        self._go.release()
        self._stopped.acquire()

    def kill(self):
        self.killed = True
        while not self.ended:
            self.advance()


class World:
    """The store, and its drivers, of whom each writes its own bytes.

    Attributes:
        seconds: what the drivers' clocks say, which go on while they sleep.
    """

    def __init__(self, posix, draft=Draft):
        self.posix, self.draft = posix, draft
        self.folder = tempfile.mkdtemp()
        self.seconds = 0.0
        self.drivers = []
        self.stood = None
        self._patches = contextlib.ExitStack()
        patch = pytest.MonkeyPatch()
        self._patches.callback(patch.undo)
        patch.setattr(storage, "_is_posix", lambda fs: posix)
        patch.setattr(os, "link", self._link)
        patch.setattr(lease, "time", self)
        patch.setattr(lease, "_beating", self._beating)

    def close(self):
        for driver in self.drivers:
            driver.kill()
        self._patches.close()
        shutil.rmtree(self.folder)

    def start(self):
        self.drivers.append(Driver(self, len(self.drivers)))
        return self.drivers[-1]

    def step(self):
        driver = getattr(threading.current_thread(), "driver", None)
        if driver:
            driver.step()

    def _link(self, source, target, link=os.link):
        self.step()
        link(source, target)

    # The clock of clusterlib.artifacts.lease.

    def monotonic(self):
        return self.seconds

    def sleep(self, seconds):
        self.seconds += seconds
        for driver in self.drivers:
            for held, count, since in () if driver.ended else list(driver.held.values()):
                if self.seconds - since >= lease.BEAT_SECONDS:
                    driver.held[held.id] = held, count + 1, self.seconds
                    lease.Lease(pafs.LocalFileSystem(), held.folder, held.id).beat(count + 1)
        self.step()

    @contextlib.contextmanager
    def _beating(self, held):
        leases = threading.current_thread().driver.held
        leases[held.id] = held, 0, self.seconds
        try:
            yield
        finally:
            del leases[held.id]
            held.withdraw()

    def root(self):
        root = Root(self.folder)
        root.__dict__["_resolved"] = pafs.PyFileSystem(Store(self)), self.folder
        return root

    def drive(self, number):
        """What a stage does, without Ray."""
        draft = self.draft(self.root(), SPEC)
        made = draft.find()
        if made is not None:
            return made
        done = draft.receipts()

        def work(task):
            sizes = (1 + number % 3, 3 - number % 3)  # the same rows in other row groups
            rows = [pa.table({"x": [int(task)] * n}, schema=SCHEMA) for n in sizes]
            part = draft.write("things", task, SCHEMA, self._paused(rows))
            draft.commit(task, Receipt([part], part.num_rows))

        def conclude():
            receipts = [draft.receipt(task) for task in TASKS]
            if None in receipts:
                raise FileNotFoundError("a receipt is gone")
            extra = draft.write_bytes("extra", "extra/note.txt", f"by {number}".encode())
            return draft.publish([*receipts, Receipt([extra])])

        with draft.signed_in():
            for task in TASKS:
                if task not in done:
                    draft.unless_made(lambda task=task: work(task))
        return draft.unless_made(conclude)

    def _paused(self, rows):
        for table in rows:
            self.step()
            yield table

    def check(self):
        """The artifact is absent or whole, the first manifest stands, and no driver has failed."""
        for driver in self.drivers:
            assert driver.error is None, repr(driver.error)
        path = Path(self.folder, SPEC.name, "manifest.json")
        if not path.exists():
            assert self.stood is None, "the manifest is gone"
            return
        text = path.read_text()
        self.stood = self.stood or text
        assert text == self.stood, "another manifest stands"
        for part in json.loads(text)["parts"]:
            data = (path.parent / part["path"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == part["sha256"], part["path"]

    def advance(self, driver, count=WHILE):
        for _ in range(count):
            if driver.ended:
                return
            driver.advance()
            self.check()

    def end(self):
        """Let all drivers run to their ends, and then a new one."""
        for _ in range(20):
            for driver in self.drivers:
                self.advance(driver)
        self.advance(self.start())
        made = self.drivers[-1].made
        assert made is not None, "it never ends"
        for driver in self.drivers:
            assert driver.killed or driver.made.manifest == made.manifest
        files = {str(p.relative_to(made.path)) for p in Path(made.path).rglob("*") if p.is_file()}
        assert files == {"manifest.json", *(part["path"] for part in made.manifest["parts"])}


@contextlib.contextmanager
def world(posix):
    opened = World(posix)
    try:
        yield opened
    finally:
        opened.close()


def num_operations(posix):
    with world(posix) as alone:
        driver = alone.start()
        count = 0
        while not driver.ended:
            alone.advance(driver, 1)
            count += 1
        return count


@pytest.mark.parametrize("posix", [True, False])
@pytest.mark.parametrize("kill", [False, True])
@pytest.mark.parametrize("early", [0, 4])
def test_a_driver_is_overtaken_or_killed_at_each_operation(posix, kill, early):
    """The other one begins after it, or, `early`, has seen by then that no task is done."""
    for count in range(1, num_operations(posix)):
        with world(posix) as shared:
            slow, fast = shared.start(), shared.start()
            shared.advance(fast, early)
            shared.advance(slow, count)
            shared.advance(fast)
            if kill:
                slow.kill()
            shared.end()


class Drivers(RuleBasedStateMachine):
    posix = True

    @initialize()
    def begin(self):
        self.world = World(self.posix)
        self.pair = [self.world.start(), self.world.start()]

    @rule(which=st.integers(0, 1), count=st.integers(1, 6) | st.integers(1, 60))
    def advance(self, which, count):
        self.world.advance(self.pair[which], count)

    @rule(which=st.integers(0, 1))
    def kill_and_start_anew(self, which):
        self.pair[which].kill()
        self.pair[which] = self.world.start()

    @invariant()
    def absent_or_whole(self):
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            try:
                self.world.end()
            finally:
                self.world.close()


@pytest.mark.parametrize("posix", [True, False])
def test_two_drivers_in_any_order_with_any_kills(posix):
    run_state_machine_as_test(
        type("Case", (Drivers,), {"posix": posix}),
        settings=settings(
            max_examples=100,
            stateful_step_count=12,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
