"""Leases: small files by which drivers know of each other, on any store and whatever their clocks.

A driver at work in a folder signs in there with a file of its own name, writes it anew every
BEAT_SECONDS, and takes it away at the end. Nobody compares clocks: a driver lives while its file
changes under the eyes of who watches it. It is dead when the file has stayed the same for
DEAD_SECONDS or, at once, when it ran on this machine and its process is gone: so a driver that was
killed keeps its successor waiting for a minute elsewhere, and not at all here. That it is dead is
written down beside its file and never taken back; should it wake up, `Lease.check` finds it.

Alone is who has signed in and then finds nobody else signed in. Who finds someone signs out first
and then watches: two that come at once see each other, both step back and try again after random
times, so never are two alone. This asks of a store only that a listing shows what was written
before it, as POSIX file systems, S3, GCS and Azure do.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import itertools
import json
import os
import platform
import random
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from clusterlib.artifacts.storage import listing, write
from clusterlib.errors import StrataError

BEAT_SECONDS = 10.0
DEAD_SECONDS = 60.0
_POLL_SECONDS = 1.0


class HeldError(StrataError):
    """A driver that lives is at work where one must be alone."""


@dataclass(frozen=True)
class Lease:
    """A driver's file in `folder`. It travels to processes that work for the driver.

    Attributes:
        since: when the driver signed in, for people.
    """

    fs: pafs.FileSystem
    folder: str
    id: str
    since: str = ""

    def beat(self, count: int) -> None:
        """Write the file, with a count that differs from the one before."""
        owner = {"host": platform.node(), "pid": os.getpid(), "machine": _machine()}
        self._write("json", {**owner, "since": self.since, "beat": count})

    def withdraw(self) -> None:
        """Take the file away."""
        with contextlib.suppress(FileNotFoundError):  # swept
            self.fs.delete_file(self._path("json"))

    def check(self) -> None:
        """See whether the driver still counts as alive.

        Raises:
            StrataError: another took it for dead.
        """
        names = listing(self.fs, self.folder)
        if f"{self.id}.json" not in names or f"{self.id}.dead" in names:
            raise StrataError(
                f"{self.folder}: this driver gave no sign for {DEAD_SECONDS:.0f} s, so another "
                "took its place; run the same command again when that one has ended"
            )

    def others(self) -> list[Lease] | None:
        """Who else is signed in and not known to be dead; None when this driver is not."""
        names = listing(self.fs, self.folder)
        if f"{self.id}.json" not in names:  # swept
            return None
        signed, dead = (
            {name.removesuffix(ending) for name in names if name.endswith(ending)}
            for ending in (".json", ".dead")
        )
        return [Lease(self.fs, self.folder, other) for other in sorted(signed - dead - {self.id})]

    def outlast(self) -> None:
        """Wait until the driver has signed out or is dead.

        Raises:
            HeldError: it lives.
        """
        began, seen = time.monotonic(), None
        while True:
            asked = time.monotonic()
            now = self._read()
            if now is None:
                return
            if time.monotonic() - asked > BEAT_SECONDS:
                began = time.monotonic()  # the store was away, for the driver as well
            if _is_gone(now) or time.monotonic() - began >= DEAD_SECONDS:
                self._write("dead", {})
                return
            if seen is None and now:
                _say(f"{self.folder}: is {_who(now)} alive? waiting {DEAD_SECONDS:.0f} s at most")
            elif seen and now and now["beat"] != seen["beat"]:
                raise HeldError(
                    f"{self.folder}: {_who(now)} has been at work there since {now['since']}; let "
                    "it end, or end it, and run the same command again"
                )
            seen = now or seen
            time.sleep(_POLL_SECONDS)

    def _path(self, ending: str) -> str:
        return f"{self.folder}/{self.id}.{ending}"

    def _read(self) -> dict[str, Any] | None:
        """What the driver wrote last; empty while it writes, None when it has signed out."""
        try:
            with self.fs.open_input_stream(self._path("json")) as stream:
                found: dict[str, Any] = json.loads(stream.read())
                return found
        except FileNotFoundError:
            return None
        except ValueError:
            return {}

    def _write(self, ending: str, content: dict[str, Any]) -> None:
        write(self.fs, self._path(ending), json.dumps(content).encode())


@contextlib.contextmanager
def signed_in(fs: pafs.FileSystem, folder: str) -> Iterator[Lease]:
    """Let others know that this driver is at work in `folder`."""
    now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    lease = Lease(fs, folder, uuid.uuid4().hex, now)
    lease.beat(0)
    with _beating(lease):
        yield lease


@contextlib.contextmanager
def alone(fs: pafs.FileSystem, folder: str) -> Iterator[Lease]:
    """Be the only driver signed in in `folder`.

    Raises:
        HeldError: another one is.
    """
    while True:
        with signed_in(fs, folder) as lease:
            others = lease.others()
            if others == []:
                yield lease
                return
        for other in others or []:
            other.outlast()
        time.sleep(random.uniform(0, _POLL_SECONDS))


@contextlib.contextmanager
def _beating(lease: Lease) -> Iterator[None]:
    ended = threading.Event()

    def beat() -> None:
        for count in itertools.count(1):
            if ended.wait(BEAT_SECONDS):
                return
            # Those who watch draw the conclusion, and what the driver itself writes tells of it.
            with contextlib.suppress(OSError):
                lease.beat(count)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        lease.withdraw()


@functools.cache
def _machine() -> str | None:
    """What process ids belong to: this boot, and this container; None where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the process that wrote it ran here and runs no more."""
    if not owner or owner["machine"] is None or owner["machine"] != _machine():
        return False
    try:
        state = Path(f"/proc/{owner['pid']}/stat").read_text(encoding="utf-8").rpartition(")")[2]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state.split()[0] in "ZX"  # killed, and not yet collected by who started it


def _who(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
