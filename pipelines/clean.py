"""clean: what lies in a root, and in this node's caches, and no recipe at hand needs.

What a driver is writing is left alone. A driver at work signs in its draft every few seconds
(clusterlib.artifacts.lease), so a folder whose newest file is an hour old by the store's own clock
is nobody's; and the folder in which a node builds a cache is locked while it is built.
"""

from __future__ import annotations

import functools
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs

from clusterlib.artifacts.artifact import Root
from clusterlib.artifacts.draft import remove, unnamed
from clusterlib.artifacts.storage import delete, listing, now_seconds
from pipelines.run import Run
from train.cache import abandoned, sweep
from train.config import TrainConfig

_IDLE_SECONDS = 3600
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")
_CACHED = re.compile(r"([0-9a-f]{16})-.+")  # begins with the fingerprint of shards or of a model


@dataclass(frozen=True)
class Waste:
    """Something that may be deleted, why, and what deletes it."""

    path: str
    num_bytes: int
    reason: str
    delete: Callable[[], object]


def survey(root: Root, runs: Sequence[Run]) -> list[Waste]:
    """What nobody is writing and none of the runs needs. Without runs, finished artifacts and
    caches are all held to be needed.

    Raises:
        StrataError: a manifest is damaged, or what a run needs cannot be told.
    """
    folders = {arm.config.train.cache_dir for run in runs for arm in run.arms.values()}
    default = str(TrainConfig.model_fields["cache_dir"].default)
    caches = [Path(folder).expanduser() for folder in sorted(folders or {default})]
    return [*_in_root(root, runs), *(waste for cache in caches for waste in _in_cache(cache, runs))]


def as_text(found: Sequence[Waste]) -> str:
    """One line for each, the sum last."""
    lines = [f"{waste.num_bytes / 1e6:>11,.1f} MB  {waste.path}  {waste.reason}" for waste in found]
    return "\n".join([*lines, f"{sum(waste.num_bytes for waste in found) / 1e6:>11,.1f} MB in all"])


def _in_root(root: Root, runs: Sequence[Run]) -> Iterator[Waste]:
    needed = {name for run in runs for name in run.needs()}
    names = list(_names(root))
    now = now_seconds(root.fs, root.path) if names else 0
    for name in names:
        path = f"{root.path}/{name}"
        entries = listing(root.fs, path)
        made = root.peek(name)
        whole = made is None or (bool(runs) and name not in needed)
        if made is None:
            reason = "a draft nobody works on"
        elif whole:
            reason = "needed by no recipe given"
        else:
            reason, entries = "files that its manifest does not name", unnamed(made, entries)
        if (made is not None or name not in needed) and _are_idle(entries, now):
            size = sum(info.size or 0 for info in entries.values())
            yield Waste(path, size, reason, functools.partial(_remove, root, path, entries, whole))


def _names(root: Root) -> Iterator[str]:
    """kind/fingerprint of every artifact and draft."""
    for kind in root.fs.get_file_info(pafs.FileSelector(root.path, allow_not_found=True)):
        if kind.type == pafs.FileType.Directory:
            for entry in root.fs.get_file_info(pafs.FileSelector(kind.path, allow_not_found=True)):
                if _FINGERPRINT.fullmatch(entry.base_name):
                    yield f"{kind.base_name}/{entry.base_name}"


def _are_idle(entries: Mapping[str, pafs.FileInfo], now: float) -> bool:
    """Whether the newest was written long ago; where a store gives no times, none was."""
    times = [info.mtime_ns for info in entries.values() if info.type == pafs.FileType.File]
    return bool(times) and all(
        time is not None and now - time / 1e9 > _IDLE_SECONDS for time in times
    )


def _remove(root: Root, path: str, entries: Mapping[str, pafs.FileInfo], whole: bool) -> None:
    remove(root.fs, entries)
    if whole:
        delete(root.fs, pafs.FileInfo(path, pafs.FileType.Directory))


def _in_cache(cache: Path, runs: Sequence[Run]) -> Iterator[Waste]:
    for path in abandoned(cache):
        reason = "left by caching that was killed"
        yield Waste(str(path), _disk_bytes(path), reason, functools.partial(sweep, cache))
    needed = {name.partition("/")[2] for run in runs for name in run.needs()}
    for path in sorted(cache.iterdir()) if runs and cache.is_dir() else ():
        named = _CACHED.fullmatch(path.name)
        idle = time.time() - path.stat().st_mtime > _IDLE_SECONDS
        if named and named[1] not in needed and idle:
            discard = functools.partial(shutil.rmtree, path) if path.is_dir() else path.unlink
            yield Waste(str(path), _disk_bytes(path), "cached for no recipe given", discard)


def _disk_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
