"""Making an artifact: tasks write parts and sign for them, and the manifest is written last.

The artifact's folder holds, besides parts, one receipt per finished task and, last, the manifest. A
task writes its parts under temporary names, renames them, then writes its receipt; a task that is
killed or retried leaves at worst a file that no receipt names. Files, or the folders they are in,
carry their digest in their name: a task that runs twice, on this driver or another, cannot change a
part that a receipt names.

Any number of drivers may make the same artifact, and each may be killed at any time. The manifest
is made from receipts whose parts are seen to be there, the first one stands (see `Draft.publish`),
and nothing is ever swept before one stands. So an artifact is absent or whole, and a driver that
was overtaken finds, at the latest when it publishes, what the first one made.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import functools
import hashlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from clusterlib.artifacts.artifact import MANIFEST, Artifact, Part, Root, Spec
from clusterlib.artifacts.config import dump, fingerprint
from clusterlib.artifacts.digests import of_files
from clusterlib.artifacts.lease import HeldError, Lease, alone, signed_in
from clusterlib.artifacts.storage import create, delete, listing
from clusterlib.errors import StrataError

Made = TypeVar("Made")

DRIVERS = "drivers"  # folder of a draft where drivers at work on it sign in
_RECEIPTS = "receipts"
_TURNS = "turns"  # folder where drivers wait for their turn at the manifest
_VERSIONED = (
    "strata",
    "ray",
    "torch",
    "deepspeed",
    "transformers",
    "faiss-cpu",
    "faiss-gpu",
    "pyarrow",
    "mteb",
)


@dataclass(frozen=True)
class Receipt:
    """What one finished task made.

    Attributes:
        num_rows_in: rows the task read; each is in a part of the artifact's own table or in
            `rejects`.
        rejects: reason -> rows refused for it.
        stats: what the stage wants to add up or keep, as plain data.
    """

    parts: Sequence[Part]
    num_rows_in: int = 0
    rejects: Mapping[str, int] = field(default_factory=dict)
    stats: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def from_json(text: str) -> Receipt:
        data = json.loads(text)
        return Receipt(**{**data, "parts": [Part(**part) for part in data["parts"]]})


@dataclass(frozen=True)
class Draft:
    """An artifact being made. Small and picklable: it travels to the tasks that write parts."""

    root: Root
    spec: Spec

    @property
    def path(self) -> str:
        return f"{self.root.path}/{self.spec.name}"

    def write(
        self,
        table: str,
        part_id: str,
        schema: pa.Schema,
        groups: Iterable[pa.Table],
    ) -> Part:
        """Write one Parquet part of `table`; each table of `groups` becomes one row group.

        The same groups always give the same bytes and, with them, the same name.
        """
        dictionary = [
            name for name in ("source", "topic", "file", "reason", "leaf") if name in schema.names
        ]
        # High bytes of token ids are mostly zero; stored apart from the low ones they cost nothing:
        # the whole took a third less time and an eighth less space on real text.
        split = {
            f"{field.name}.list.element": "BYTE_STREAM_SPLIT"
            for field in schema
            if pa.types.is_list(field.type) and pa.types.is_integer(field.type.value_type)
        }
        num_rows = 0

        def fill(sink: _DigestingSink) -> None:
            nonlocal num_rows
            with pq.ParquetWriter(
                sink,
                schema,
                compression="zstd",
                use_dictionary=dictionary,
                column_encoding=split or None,
                write_page_checksum=True,
            ) as writer:
                for group in groups:
                    if group.num_rows:
                        writer.write_table(group, row_group_size=group.num_rows)
                        num_rows += group.num_rows
                sink.begin_footer()

        path, sink = self._replace(f"{table}/{part_id}-{{digest}}.parquet", fill)
        return Part(table, path, num_rows, sink.num_bytes, sink.sha256, *sink.footer())

    def write_bytes(self, table: str, path: str, data: bytes) -> Part:
        """Write a file that is no table; digits of its digest come before the ending."""
        name = PurePosixPath(path)
        named = str(name.with_name(f"{name.stem}-{{digest}}{name.suffix}"))
        path, sink = self._replace(named, lambda stream: stream.write(data))
        return Part(table, path, 0, sink.num_bytes, sink.sha256)

    def write_folder(self, table: str, folder: Path) -> list[Part]:
        """Copy a local folder's files to a folder of the table's name and digits of their digest:
        see `Artifact.folder`.
        """
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        target = f"{table}-{fingerprint([names, of_files(files)])[:12]}"
        parts = []
        for path, name in zip(files, names, strict=True):
            with path.open("rb") as source:
                copy = functools.partial(shutil.copyfileobj, source)
                written, sink = self._replace(f"{target}/{name}", copy)
            parts.append(Part(table, written, 0, sink.num_bytes, sink.sha256))
        return parts

    def commit(self, task_id: str, receipt: Receipt) -> None:
        """Write the receipt that makes a task count as done."""
        data = json.dumps(asdict(receipt)).encode()
        self._replace(f"{_RECEIPTS}/{task_id}.json", lambda stream: stream.write(data))

    def receipt(self, task_id: str) -> Receipt | None:
        """The receipt of a finished task, or None.

        Raises:
            StrataError: it is damaged.
        """
        path = f"{self.path}/{_RECEIPTS}/{task_id}.json"
        try:
            with self.root.fs.open_input_stream(path) as stream:
                return Receipt.from_json(stream.read().decode())
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, LookupError) as error:
            raise StrataError(
                f"{path}: damaged, no receipt any more ({error}); delete it, and the same command "
                "does its task again"
            ) from error

    def receipts(self) -> set[str]:
        """Ids of the tasks that are done."""
        selector = pafs.FileSelector(f"{self.path}/{_RECEIPTS}", allow_not_found=True)
        names = [info.base_name for info in self.root.fs.get_file_info(selector)]
        return {name.removesuffix(".json") for name in names if name.endswith(".json")}

    def find(self) -> Artifact | None:
        """The finished artifact, if there is one. What it does not name is swept: receipts, and
        what killed or late tasks left. One listing, where there is nothing to sweep.

        Raises:
            StrataError: a file that it names is gone or cut short.
        """
        made = self.root.peek(self.spec.name)
        if made is not None:
            remove(self.root.fs, unnamed(made, made.check()))
        return made

    def unless_made(self, call: Callable[[], Made]) -> Made | Artifact:
        """What `call` returns; the artifact, where `call` failed because another driver has
        published it and swept the files that `call` worked with.
        """
        try:
            return call()
        except OSError:
            made = self.find()
            if made is None:
                raise
            return made

    def signed_in(self) -> AbstractContextManager[Lease]:
        """Let others know that a driver works on this: see clusterlib.artifacts.lease."""
        return signed_in(self.root.fs, f"{self.path}/{DRIVERS}")

    def alone(self) -> AbstractContextManager[Lease]:
        """As `signed_in`, for work that one driver must do alone.

        Raises:
            HeldError: another driver does it.
        """
        return alone(self.root.fs, f"{self.path}/{DRIVERS}")

    def publish(
        self, receipts: Sequence[Receipt], stats: Mapping[str, Any] | None = None
    ) -> Artifact:
        """Write the manifest, sweep what it does not name, and open the artifact.

        Where another driver has published the artifact in the meantime, its manifest stands.

        Args:
            receipts: of every task, in the order in which their parts are to be read.

        Raises:
            RuntimeError: rows in are not rows out plus rejects.
            StrataError: files were deleted, and not by another driver that published the artifact.
        """
        manifest = self._manifest(receipts, stats or {})
        if self.root.peek(self.spec.name) is None:
            there = listing(self.root.fs, self.path)
            if all(part["path"] in there for part in manifest["parts"]):
                self._put(json.dumps(manifest, indent=1).encode())
        made = self.find()
        if made is None:
            raise StrataError(
                f"{self.path}: files were deleted there while they were in use, and not because "
                "the artifact is finished; delete this folder and run the same command again"
            )
        return made

    def _put(self, manifest: bytes) -> None:
        """Write the manifest where none stands.

        A POSIX file system sees to it that the first stands. Elsewhere drivers take turns at
        looking and writing. One that stops for DEAD_SECONDS right before it writes may still
        replace a manifest that came meanwhile, and name files that were swept: `find` tells.
        """
        path = f"{self.path}/{MANIFEST}"
        # One stands; or this one was swept before it had its name, because one stands.
        with self._room(), contextlib.suppress(FileExistsError, FileNotFoundError):
            if create(self.root.fs, path, manifest):
                return
            while self.root.peek(self.spec.name) is None:
                with (
                    contextlib.suppress(HeldError),
                    alone(self.root.fs, f"{self.path}/{_TURNS}") as turn,
                ):
                    if self.root.peek(self.spec.name) is None:
                        turn.check()
                        self._replace(MANIFEST, lambda stream: stream.write(manifest))

    def _manifest(self, receipts: Sequence[Receipt], stats: Mapping[str, Any]) -> dict[str, Any]:
        parts = [part for receipt in receipts for part in receipt.parts]
        num_rows_in = sum(receipt.num_rows_in for receipt in receipts)
        num_rows_out = sum(part.num_rows for part in parts if part.table == self.spec.kind)
        rejects: dict[str, int] = {}
        for receipt in receipts:
            for reason, count in receipt.rejects.items():
                rejects[reason] = rejects.get(reason, 0) + count
        if num_rows_in != num_rows_out + sum(rejects.values()):
            raise RuntimeError(
                f"{self.spec.name}: {num_rows_in} rows in, {num_rows_out} out and "
                f"{sum(rejects.values())} refused; rows were lost or made up"
            )
        return {
            "kind": self.spec.kind,
            "fingerprint": self.spec.fingerprint,
            "label": self.spec.label,
            "schema_version": self.spec.version,
            "config": dump(self.spec.config),
            "inputs": {name: spec.name for name, spec in self.spec.inputs.items()},
            "origin": dict(self.spec.origin),
            "num_rows_in": num_rows_in,
            "num_rows_out": num_rows_out,
            "rejects": rejects,
            "stats": dict(stats),
            "digest": fingerprint([part.sha256 for part in parts]),
            "parts": [asdict(part) for part in parts],
            "versions": versions(),
            "commit": commit(),
            "created_utc": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        }

    def _replace(
        self, path: str, fill: Callable[[_DigestingSink], object]
    ) -> tuple[str, _DigestingSink]:
        """Write a file under a temporary name and rename it, so that `path` is whole or absent.

        Args:
            path: may hold {digest}, for the first digits of what was written.

        Raises:
            StrataError: the file system is full.
        """
        folder = f"{self.path}/{path}".rpartition("/")[0]
        temporary = f"{folder}/.{uuid.uuid4().hex}"
        fs = self.root.fs
        with self._room():
            try:
                fs.create_dir(folder, recursive=True)
                with fs.open_output_stream(temporary) as stream:
                    sink = _DigestingSink(stream)
                    fill(sink)
            except BaseException:
                if fs.get_file_info(temporary).type == pafs.FileType.File:
                    fs.delete_file(temporary)
                raise
        named = path.replace("{digest}", sink.sha256[:12])
        fs.move(temporary, f"{self.path}/{named}")
        return named, sink

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        """Say so where the file system is full."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StrataError(
                f"--root {self.root.uri}: no space is left there; free some and run the same "
                "command again, what is finished is kept"
            ) from error


def unnamed(made: Artifact, entries: Mapping[str, pafs.FileInfo]) -> dict[str, pafs.FileInfo]:
    """What an artifact's manifest does not name, of what is in its folder."""
    named = {MANIFEST, *(part["path"] for part in made.manifest["parts"])}
    named |= {str(parent) for path in named for parent in PurePosixPath(path).parents}
    return {path: info for path, info in entries.items() if path not in named}


def remove(fs: pafs.FileSystem, entries: Mapping[str, pafs.FileInfo]) -> None:
    """Delete files and folders of an artifact's or a draft's folder, given by their paths there.

    The manifest goes first and receipts next: what a process that is killed leaves never names what
    is gone.
    """
    tops = [path for path in entries if str(PurePosixPath(path).parent) not in entries]
    for path in sorted(tops, key=lambda path: (path != MANIFEST, path != _RECEIPTS)):
        delete(fs, entries[path])


class _DigestingSink:
    """A writable file that keeps the count and the SHA-256 of what passes through, and of what does
    after `begin_footer`.
    """

    closed = False

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self._footer_hash = hashlib.sha256()
        self._footer_start: int | None = None
        self.num_bytes = 0

    def write(self, data: Any) -> int:
        self._hash.update(data)
        if self._footer_start is not None:
            self._footer_hash.update(data)
        self._stream.write(data)
        size = memoryview(data).nbytes
        self.num_bytes += size
        return size

    def begin_footer(self) -> None:
        self._footer_start = self.num_bytes

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        """The caller closes the stream."""

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def footer(self) -> tuple[int, str]:
        """Bytes since `begin_footer`, and their SHA-256."""
        assert self._footer_start is not None
        return self.num_bytes - self._footer_start, self._footer_hash.hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape results."""
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def commit() -> str | None:
    """Commit of the checkout this code runs from, with `+` after it when files differ; None outside
    one.
    """
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():  # installed: a repository further up is not ours
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
