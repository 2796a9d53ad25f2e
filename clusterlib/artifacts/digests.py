"""What files hold, as SHA-256: an edit is seen whatever the times say, and a copy or a `touch`
changes nothing.

A digest is kept with what the file system says of the file. An edit can put the time of the last
change back (`touch -d`, `cp -p`, `rsync -t`), but neither the inode's own time of change nor, where
a file is replaced, the inode. Reading goes at 1.5 GB/s for each file and core here (AMD EPYC with
SHA instructions), so digests of large files are kept from command to command; those of files that
were still written lately never are.

Elsewhere a store's entity tag or checksum says as much, for a request of its headers and nothing
read: of an object store it follows from the bytes (in S3 their MD5, or that of its parts), so not
even two uploads within a second are taken for one. Only where there is neither that nor a time,
the file itself is read, each time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.fs as pafs

from clusterlib.artifacts.storage import bare

_FOLDER = Path("~/.cache/strata/digests")
_LARGE_BYTES = 2**20  # a smaller file is as soon read as looked up
# A file may change again within one tick of its file system's clock (2 s on FAT) and look the same.
_SETTLED_NS = 2 * 10**9
# Digests before tags: some stores give an object another tag when only its labels change.
_TAGS = ("sha256", "md5hash", "md5", "content_md5", "checksum", "etag")
_REQUESTS = 32  # requests to a store that wait for their answers at once
_RECORD = re.compile(r"(\d+) (\d+) (\d+) (\d+) ([0-9a-f]{64})\n")


class _Identity(NamedTuple):
    """What tells a file's states apart without reading it."""

    num_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int


_known: dict[str, tuple[_Identity, str]] = {}


def of_file(path: Path) -> str:
    """SHA-256 of a local file, in hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    name = str(path.absolute())
    with path.open("rb") as stream:
        identity = _identity(os.fstat(stream.fileno()))
        for found in (_known.get(name), _recall(name, identity)):
            if found is not None and found[0] == identity:
                return found[1]
        settled = time.time_ns() - max(identity.mtime_ns, identity.ctime_ns) > _SETTLED_NS
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if settled and identity == _identity(os.fstat(stream.fileno())):
            _known[name] = identity, digest
            _record(name, identity, digest)
    return digest


def of_files(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of local files, several read at a time."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(of_file, paths))


def contents(fs: pafs.FileSystem, files: Sequence[pafs.FileInfo]) -> list[Any]:
    """What tells the contents of files apart, as plain data: a digest, a tag, or size and time of
    change.

    Raises:
        OSError: a file cannot be read.
    """
    if isinstance(fs, pafs.LocalFileSystem):
        return of_files([Path(info.path) for info in files])
    with ThreadPoolExecutor(_REQUESTS) as pool:
        return list(pool.map(functools.partial(_remote, fs), files))


def _remote(fs: pafs.FileSystem, info: pafs.FileInfo) -> Any:
    tag = _tag(fs, info.path)
    if tag is not None:
        return tag
    if info.mtime_ns is not None:
        return [info.size, info.mtime_ns]
    with fs.open_input_stream(info.path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _tag(fs: pafs.FileSystem, path: str) -> str | None:
    """What a store says that differs whenever the bytes do."""
    store = bare(fs)
    if isinstance(store, pafs.PyFileSystem):
        found = store.handler.fs.info(path)  # fsspec's file system inside pyarrow's
    else:
        with fs.open_input_stream(path) as stream:
            found = stream.metadata()
    known = {name.lower(): value for name, value in found.items()}
    tag = next((known[name] for name in _TAGS if known.get(name)), None)
    return tag.decode() if isinstance(tag, bytes) else tag and str(tag)


def _identity(found: os.stat_result) -> _Identity:
    return _Identity(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def _place(name: str) -> Path:
    """One of each path, so that records do not grow in number with edits."""
    return _FOLDER.expanduser() / hashlib.sha256(name.encode()).hexdigest()[:32]


def _recall(name: str, identity: _Identity) -> tuple[_Identity, str] | None:
    if identity.num_bytes < _LARGE_BYTES:
        return None
    try:
        record = _RECORD.fullmatch(_place(name).read_text(encoding="ascii"))
    except (OSError, UnicodeDecodeError):
        return None
    return (_Identity(*map(int, record.groups()[:4])), record[5]) if record else None


def _record(name: str, identity: _Identity, digest: str) -> None:
    if identity.num_bytes < _LARGE_BYTES:
        return
    place = _place(name)
    with contextlib.suppress(OSError):  # a home that cannot be written costs time only
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=place.parent, prefix=".", delete=False) as stream:
            stream.write(" ".join(map(str, identity)) + f" {digest}\n")
        Path(stream.name).replace(place)
