"""What is asked of file systems, local and remote, beyond what pyarrow's do by themselves.

Stores that fail for a moment are asked again, in two layers. Single requests are repeated by the
store's own client: S3's with exponential backoff and jitter for about 40 s, which covers reads and
writes in the midst of a file and says nothing (by itself, pyarrow asks 31 times within 6 s and
fails); Google's for 15 minutes. What that does not mend is done again here, whole: looking at,
listing, opening, moving and deleting files; that is bounded, counted and said in the log.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import sys
import time
import uuid
from collections.abc import Sequence
from typing import Any

import pyarrow.fs as pafs

_CLIENT_TRIES = 8  # of one request by S3's client: 40 s in the mean (measured on loopback)
_TRIES = 5  # of one operation here, after 1, 2, 4 and 8 seconds less a random share of up to half
_ERRNOS = {
    errno.EAGAIN,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.ETIMEDOUT,
}
# What pyarrow's messages say of errors that its clients hold to be worth another try.
_SIGNS = re.compile(
    r"HTTP status (408|429|5\d\d)|curlCode|NETWORK_CONNECTION|SLOW_DOWN|THROTTLING|"
    r"SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIMEOUT|Service Unavailable|Slow Down|"
    r"Too Many Requests|[Tt]imed? ?out|[Cc]onnection (reset|refused|closed|aborted)"
)


def is_transient(error: BaseException) -> bool:
    """Whether a store that raised this may answer when it is asked again."""
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    if not isinstance(error, OSError):
        return False
    if error.errno is not None:
        return error.errno in _ERRNOS
    return bool(_SIGNS.search(str(error)))


def patient(fs: pafs.FileSystem) -> pafs.FileSystem:
    """The file system, asked again where it fails for a moment; a local one as it is."""
    if _is_posix(fs):
        return fs
    return pafs.PyFileSystem(Patient(fs))


def bare(fs: pafs.FileSystem) -> pafs.FileSystem:
    """What `patient` was given, for libraries that look at the type."""
    if isinstance(fs, pafs.PyFileSystem) and isinstance(fs.handler, Patient):
        return fs.handler.fs
    return fs


def listing(fs: pafs.FileSystem, folder: str) -> dict[str, pafs.FileInfo]:
    """All that is below a folder, by its path from there; nothing where there is no folder."""
    selector = pafs.FileSelector(folder, allow_not_found=True, recursive=True)
    return {info.path[len(folder) + 1 :]: info for info in fs.get_file_info(selector)}


def write(fs: pafs.FileSystem, path: str, data: bytes) -> None:
    """Write a small file with its folder, though others may be sweeping there."""
    for tries_left in reversed(range(10)):
        try:
            fs.create_dir(path.rpartition("/")[0], recursive=True)
            with fs.open_output_stream(path) as stream:
                stream.write(data)
            return
        except FileNotFoundError:  # the folder was swept between the two
            if not tries_left:
                raise


def now_seconds(fs: pafs.FileSystem, folder: str) -> float:
    """The time by the clock that the store gives files their times by; 0 where it gives none."""
    path = f"{folder}/.probe-{uuid.uuid4().hex}"
    write(fs, path, b"")
    info = fs.get_file_info(path)
    fs.delete_file(path)
    return (info.mtime_ns or 0) / 1e9


def create(fs: pafs.FileSystem, path: str, data: bytes) -> bool:
    """Write a file, whole, unless there is one, however many try at once.

    Returns:
        False where the store has no such operation, and nothing was written: all but POSIX file
        systems with hard links. (S3 has, as If-None-Match, but pyarrow does not offer it.)

    Raises:
        FileExistsError: there is one.
        FileNotFoundError: what was written was swept before it had its name.
    """
    if not _is_posix(fs):
        return False
    temporary = f"{path}.{uuid.uuid4().hex}"
    write(fs, temporary, data)
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        return False
    finally:
        with contextlib.suppress(FileNotFoundError):
            fs.delete_file(temporary)
    return True


def _is_posix(fs: pafs.FileSystem) -> bool:
    return isinstance(fs, pafs.LocalFileSystem)


def delete(fs: pafs.FileSystem, info: pafs.FileInfo) -> None:
    """Delete a file, or a folder with all in it; what others delete or write there meanwhile does
    not matter.
    """
    try:
        if info.type == pafs.FileType.Directory:
            fs.delete_dir(info.path)
        else:
            fs.delete_file(info.path)
    except OSError as error:
        if not isinstance(error, FileNotFoundError) and error.errno != errno.ENOTEMPTY:
            raise


class Patient(pafs.FileSystemHandler):
    """A file system whose operations are tried again while their errors are transient.

    Files that are open are the store's own: the bytes do not pass through Python.
    """

    def __init__(self, fs: pafs.FileSystem) -> None:
        if isinstance(fs, pafs.S3FileSystem):  # pickled, it would forget the strategy
            _, (options,) = fs.__reduce__()
            strategy = pafs.AwsStandardS3RetryStrategy(max_attempts=_CLIENT_TRIES)
            fs = pafs.S3FileSystem(**options, retry_strategy=strategy)
        self.fs = fs

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Patient) and bool(self.fs == other.fs)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __reduce__(self) -> tuple[type[Patient], tuple[pafs.FileSystem]]:
        return Patient, (self.fs,)

    def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        began = time.monotonic()
        for tried in range(1, _TRIES + 1):
            try:
                return getattr(self.fs, name)(*arguments, **options)
            except FileNotFoundError:
                if tried > 1 and self._is_done(name, arguments):
                    return None
                raise
            except OSError as error:
                if not is_transient(error):
                    raise
                said = f"{name} {_subject(arguments)}: {str(error) or type(error).__name__}"
                if tried == _TRIES:
                    seconds = time.monotonic() - began
                    raise TimeoutError(f"{said}; tried {tried} times in {seconds:.0f} s") from error
                seconds = 2 ** (tried - 1) * random.uniform(0.5, 1)
                print(
                    f"storage: {said}; trying again in {seconds:.1f} s, {tried} of {_TRIES - 1} "
                    "times",
                    file=sys.stderr,
                    flush=True,
                )
                time.sleep(seconds)
        raise AssertionError

    def _is_done(self, name: str, arguments: Sequence[Any]) -> bool:
        """Whether what is not found was done by a try whose answer was lost."""
        if name == "move":
            (info,) = self._call("get_file_info", [arguments[1]])
            return bool(info.type != pafs.FileType.NotFound)
        return name in ("delete_file", "delete_dir")

    def get_type_name(self) -> str:
        return str(self.fs.type_name)

    def normalize_path(self, path: str) -> str:
        return str(self.fs.normalize_path(path))

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        found: list[pafs.FileInfo] = self._call("get_file_info", paths)
        return found

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        found: list[pafs.FileInfo] = self._call("get_file_info", selector)
        return found

    def create_dir(self, path: str, recursive: bool) -> None:
        self._call("create_dir", path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self._call("delete_dir", path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._call("delete_dir_contents", path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError("a whole store is never emptied")

    def delete_file(self, path: str) -> None:
        self._call("delete_file", path)

    def move(self, src: str, dest: str) -> None:
        self._call("move", src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        self._call("copy_file", src, dest)

    # Compression is for the outer file system to see to.
    def open_input_stream(self, path: str) -> Any:
        return self._call("open_input_stream", path, compression=None)

    def open_input_file(self, path: str) -> Any:
        return self._call("open_input_file", path)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return self._call("open_output_stream", path, compression=None, metadata=metadata)

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        return self._call("open_append_stream", path, compression=None, metadata=metadata)


def _subject(arguments: Sequence[Any]) -> str:
    first = arguments[0]
    if isinstance(first, pafs.FileSelector):
        return str(first.base_dir)
    return ", ".join(first) if isinstance(first, list) else str(first)
