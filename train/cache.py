"""What a node keeps on its own disk: things that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_BUILDING = ".building-"


@contextlib.contextmanager
def building(parent: Path) -> Iterator[Path]:
    """A folder in `parent` to build something in and move it away from; it is gone at the end.

    What processes that were killed left of theirs is deleted first.
    """
    parent.mkdir(parents=True, exist_ok=True)
    sweep(parent)
    folder, handle = _locked(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def sweep(parent: Path) -> None:
    """Delete what processes that were killed were building."""
    for path in abandoned(parent):
        shutil.rmtree(path, ignore_errors=True)


def abandoned(parent: Path) -> Iterator[Path]:
    """Folders in `parent` in which nobody builds any more: the lock of a process ends with it. Each
    is locked, and so may be deleted, until the next is asked for.
    """
    for path in parent.glob(f"{_BUILDING}*"):
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # someone builds there, or locks cannot tell
            pass
        else:
            yield path
        finally:
            os.close(handle)


def _locked(parent: Path) -> tuple[Path, int]:
    """A new folder, and the handle that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=_BUILDING))
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(folder, os.O_RDONLY)
            with contextlib.suppress(OSError):  # where nothing can be locked nothing is abandoned
                fcntl.flock(handle, fcntl.LOCK_EX)
            if folder.exists():  # else another process took it for abandoned before it was locked
                return folder, handle
            os.close(handle)
