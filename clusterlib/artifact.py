"""Artifacts: folders that are complete once their manifest is written, and are never changed afterwards.

`{root}/{kind}/{fingerprint}/` holds parts, one receipt per finished task and, last, `manifest.json`. A task
writes its parts under temporary names, renames them, then writes its receipt; a task that is killed or
retried leaves at worst a file that no receipt names. The manifest is made from the receipts alone, so only
what it names is ever read, and the rest is swept. Tables carry their digest in their name: a task that runs
twice, on this driver or another, cannot change a part that a receipt names.
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
import subprocess
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from clusterlib.config import dump, fingerprint
from clusterlib.errors import StrataError

MANIFEST = "manifest.json"
_RECEIPTS = "receipts"
_VERSIONED = ("strata", "ray", "torch", "deepspeed", "transformers", "faiss-cpu", "faiss-gpu", "pyarrow", "mteb")


@dataclass(frozen=True)
class Spec:
    """What an artifact is made from; it says where the artifact lies before it is made.

    Attributes:
        kind: name of the table (or other product) it holds.
        version: raised whenever the code makes something else from the same settings.
        config: settings by name, plain data or models. The fingerprint covers `Config.content` of these; the
            manifest shows them whole.
        inputs: kind -> fingerprint of the artifacts it reads.
        origin: what identifies data from outside the root (file names, sizes, times, versions).
    """

    kind: str
    version: int
    config: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        return fingerprint({name: getattr(self, name) for name in self.__dataclass_fields__})

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.fingerprint}"


@dataclass(frozen=True)
class Part:
    """One file of an artifact: a piece of `table`, at `path` inside the artifact's folder."""

    table: str
    path: str
    num_rows: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Receipt:
    """What one finished task made.

    Attributes:
        num_rows_in: rows the task read; each is in a part of the artifact's own table or in `rejects`.
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


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a local path or URI, and the path on it.

    Raises:
        StrataError: neither pyarrow nor fsspec knows the scheme.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        import fsspec

        try:
            inner, path = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError) as error:
            raise StrataError(f"{uri}: no file system for it: {error}") from error
        filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(inner))
    return filesystem, path


@dataclass(frozen=True)
class Root:
    """The workspace: a local folder or any URI that pyarrow.fs or fsspec opens."""

    uri: str

    @functools.cached_property
    def _resolved(self) -> tuple[pafs.FileSystem, str]:
        return resolve(self.uri)

    @property
    def fs(self) -> pafs.FileSystem:
        return self._resolved[0]

    @property
    def path(self) -> str:
        return self._resolved[1]

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, pafs.LocalFileSystem)

    def check_writable(self) -> None:
        """Raise StrataError where nothing can be written."""
        probe = f"{self.path}/.probe-{uuid.uuid4().hex}"
        try:
            self.fs.create_dir(self.path, recursive=True)
            with self.fs.open_output_stream(probe) as stream:
                stream.write(b"")
            self.fs.delete_file(probe)
        except OSError as error:
            raise StrataError(f"--root {self.uri}: cannot be written ({error}); name another folder") from error

    def find(self, spec: Spec) -> Artifact | None:
        """The finished artifact of `spec`, or None."""
        return self._open(spec.name)

    def open(self, name: str, remedy: str) -> Artifact:
        """The finished artifact `kind/fingerprint`.

        Raises:
            StrataError: it is not there; the message ends with `remedy`.
        """
        found = self._open(name)
        if found is None:
            raise StrataError(f"{self.path}/{name}: no finished artifact there; {remedy}")
        return found

    def _open(self, name: str) -> Artifact | None:
        try:
            with self.fs.open_input_stream(f"{self.path}/{name}/{MANIFEST}") as stream:
                return Artifact(self, json.loads(stream.read()))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def artifacts(self) -> list[Artifact]:
        """Every finished artifact, oldest first."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        found = []
        for kind in self.fs.get_file_info(selector):
            if kind.type == pafs.FileType.Directory:
                for entry in self.fs.get_file_info(pafs.FileSelector(kind.path)):
                    artifact = self._open(f"{kind.base_name}/{entry.base_name}")
                    if artifact is not None:
                        found.append(artifact)
        return sorted(found, key=lambda artifact: artifact.manifest["created_utc"])


@dataclass(frozen=True)
class Slice:
    """Rows [first_row, first_row + num_rows) of one part."""

    part: Part
    first_row: int
    num_rows: int

    @property
    def id(self) -> str:
        return f"{Path(self.part.path).stem}-{self.first_row:09d}-{self.num_rows}"


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: its manifest, and reads of the parts named there."""

    root: Root
    manifest: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return str(self.manifest["kind"])

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.fingerprint}"

    @property
    def path(self) -> str:
        return f"{self.root.path}/{self.name}"

    @property
    def config(self) -> Mapping[str, Any]:
        config: Mapping[str, Any] = self.manifest["config"]
        return config

    @property
    def stats(self) -> Mapping[str, Any]:
        stats: Mapping[str, Any] = self.manifest["stats"]
        return stats

    @property
    def num_rows(self) -> int:
        return int(self.manifest["num_rows_out"])

    def parts(self, table: str | None = None) -> list[Part]:
        """The parts of `table` (by default the artifact's own), in order."""
        return [Part(**part) for part in self.manifest["parts"] if part["table"] == (table or self.kind)]

    def open_parquet(self, part: Part) -> pq.ParquetFile:
        """Open a part.

        Raises:
            StrataError: the file is gone or damaged.
        """
        path = f"{self.path}/{part.path}"
        try:
            return pq.ParquetFile(path, filesystem=self.root.fs, pre_buffer=True)
        except (OSError, pa.ArrowInvalid) as error:
            raise StrataError(
                f"{path}: named in the manifest but missing or damaged ({error}); "
                f"delete {self.path} and run its stage again"
            ) from error

    def read(self, table: str | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of `table` (by default the artifact's own), in order."""
        return pa.concat_tables([self.open_parquet(part).read(columns=columns) for part in self.parts(table)])

    def slices(self, num_rows: int) -> list[Slice]:
        """The artifact's own table cut into slices of at most `num_rows` rows, none across two parts."""
        return [
            Slice(part, first, min(num_rows, part.num_rows - first))
            for part in self.parts()
            for first in range(0, part.num_rows, num_rows)
        ]

    def read_slice(self, piece: Slice, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of a slice; only the row groups that hold them are read."""
        file = self.open_parquet(piece.part)
        end = piece.first_row + piece.num_rows
        groups, skipped, start = [], 0, 0
        for group in range(file.num_row_groups):
            stop = start + file.metadata.row_group(group).num_rows
            if stop <= piece.first_row:
                skipped = stop
            elif start < end:
                groups.append(group)
            start = stop
        return file.read_row_groups(groups, columns=columns).slice(piece.first_row - skipped, piece.num_rows)

    def download(self, folder: str, into: Path) -> Path:
        """The artifact's `folder` as a local path: itself when the root is local, else a copy in `into`."""
        if self.root.is_local:
            return Path(self.path) / folder
        into.mkdir(parents=True, exist_ok=True)
        pafs.copy_files(
            f"{self.path}/{folder}",
            str(into),
            source_filesystem=self.root.fs,
            destination_filesystem=pafs.LocalFileSystem(),
        )
        return into

    def verify(self) -> None:
        """Read every part and compare it with the manifest.

        Raises:
            StrataError: a part is missing, or differs from what was written.
        """
        for part in (Part(**part) for part in self.manifest["parts"]):
            path = f"{self.path}/{part.path}"
            try:
                with self.root.fs.open_input_stream(path) as stream:
                    digest = hashlib.file_digest(_Readable(stream), "sha256").hexdigest()
            except FileNotFoundError as error:
                raise StrataError(f"{path}: named in the manifest but missing") from error
            if digest != part.sha256:
                raise StrataError(f"{path}: its bytes differ from those the manifest names")


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
        dictionary = [name for name in ("source", "topic", "file", "reason", "leaf") if name in schema.names]
        # Token ids have bytes that are zero: apart from the others they cost nothing (a third less time, an eighth less
        # space on real text).
        split = {
            f"{field.name}.list.element": "BYTE_STREAM_SPLIT"
            for field in schema
            if pa.types.is_list(field.type) and pa.types.is_integer(field.type.value_type)
        }
        num_rows = 0

        def fill(sink: _DigestingSink) -> None:
            nonlocal num_rows
            with pq.ParquetWriter(
                sink, schema, compression="zstd", use_dictionary=dictionary, column_encoding=split or None
            ) as writer:
                for group in groups:
                    if group.num_rows:
                        writer.write_table(group, row_group_size=group.num_rows)
                        num_rows += group.num_rows

        path, sink = self._replace(f"{table}/{part_id}-{{digest}}.parquet", fill)
        return Part(table, path, num_rows, sink.num_bytes, sink.sha256)

    def write_bytes(self, table: str, path: str, data: bytes) -> Part:
        """Write a file that is no table."""
        path, sink = self._replace(path, lambda stream: stream.write(data))
        return Part(table, path, 0, sink.num_bytes, sink.sha256)

    def write_folder(self, table: str, folder: Path) -> list[Part]:
        """Copy a local folder's files to `table/`."""
        return [
            self.write_bytes(table, f"{table}/{path.relative_to(folder).as_posix()}", path.read_bytes())
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]

    def commit(self, task_id: str, receipt: Receipt) -> None:
        """Write the receipt that makes a task count as done."""
        data = json.dumps(asdict(receipt)).encode()
        self._replace(f"{_RECEIPTS}/{task_id}.json", lambda stream: stream.write(data))

    def receipt(self, task_id: str) -> Receipt | None:
        """The receipt of a finished task, or None."""
        try:
            with self.root.fs.open_input_stream(f"{self.path}/{_RECEIPTS}/{task_id}.json") as stream:
                return Receipt.from_json(stream.read().decode())
        except FileNotFoundError:
            return None

    def receipts(self) -> set[str]:
        """Ids of the tasks that are done."""
        selector = pafs.FileSelector(f"{self.path}/{_RECEIPTS}", allow_not_found=True)
        names = [info.base_name for info in self.root.fs.get_file_info(selector)]
        return {name.removesuffix(".json") for name in names if name.endswith(".json")}

    def publish(self, receipts: Sequence[Receipt], stats: Mapping[str, Any] | None = None) -> Artifact:
        """Write the manifest, sweep what it does not name, and open the artifact.

        Where another driver has published the artifact in the meantime, its manifest stands.

        Args:
            receipts: of every task, in the order in which their parts are to be read.

        Raises:
            RuntimeError: rows in are not rows out plus rejects.
        """
        parts = [part for receipt in receipts for part in receipt.parts]
        num_rows_in = sum(receipt.num_rows_in for receipt in receipts)
        num_rows_out = sum(part.num_rows for part in parts if part.table == self.spec.kind)
        rejects: dict[str, int] = {}
        for receipt in receipts:
            for reason, count in receipt.rejects.items():
                rejects[reason] = rejects.get(reason, 0) + count
        if num_rows_in != num_rows_out + sum(rejects.values()):
            raise RuntimeError(
                f"{self.spec.name}: {num_rows_in} rows in, {num_rows_out} out and {sum(rejects.values())} "
                "refused; rows were lost or made up"
            )
        made = self.root.find(self.spec)
        if made is not None:
            self.sweep(made)
            return made
        manifest = {
            "kind": self.spec.kind,
            "fingerprint": self.spec.fingerprint,
            "schema_version": self.spec.version,
            "config": dump(self.spec.config),
            "inputs": dict(self.spec.inputs),
            "origin": dict(self.spec.origin),
            "num_rows_in": num_rows_in,
            "num_rows_out": num_rows_out,
            "rejects": rejects,
            "stats": dict(stats or {}),
            "digest": fingerprint([part.sha256 for part in parts]),
            "parts": [asdict(part) for part in parts],
            "versions": versions(),
            "commit": commit(),
            "created_utc": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        }
        data = json.dumps(manifest, indent=1).encode()
        self._replace(MANIFEST, lambda stream: stream.write(data))
        made = Artifact(self.root, json.loads(data))
        self.sweep(made)
        return made

    def sweep(self, made: Artifact) -> None:
        """Delete what the finished artifact does not name: receipts, and what killed or late tasks left."""
        fs = self.root.fs
        keep = {MANIFEST, *(part["path"] for part in made.manifest["parts"])}
        folders = {str(parent) for path in keep for parent in Path(path).parents}

        def visit(folder: str) -> None:
            for entry in fs.get_file_info(pafs.FileSelector(folder, allow_not_found=True)):
                relative = entry.path[len(self.path) + 1 :]
                with contextlib.suppress(FileNotFoundError):  # another driver may be sweeping too
                    if entry.type == pafs.FileType.Directory:
                        visit(entry.path)
                        if relative not in folders:
                            fs.delete_dir(entry.path)
                    elif relative not in keep:
                        fs.delete_file(entry.path)

        visit(self.path)

    def _replace(self, path: str, fill: Callable[[_DigestingSink], object]) -> tuple[str, _DigestingSink]:
        """Write a file under a temporary name and rename it, so that `path` is whole or absent.

        Args:
            path: may hold {digest}, for the first digits of what was written.

        Raises:
            StrataError: the file system is full.
        """
        folder, _, base = f"{self.path}/{path}".rpartition("/")
        temporary = f"{folder}/.{uuid.uuid4().hex}"
        fs = self.root.fs
        fs.create_dir(folder, recursive=True)
        try:
            with fs.open_output_stream(temporary) as stream:
                sink = _DigestingSink(stream)
                fill(sink)
        except BaseException as error:
            if fs.get_file_info(temporary).type == pafs.FileType.File:
                fs.delete_file(temporary)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StrataError(
                    f"--root {self.root.uri}: no space is left there; free some and run the same command again, "
                    "what is finished is kept"
                ) from error
            raise
        named = path.replace("{digest}", sink.sha256[:12])
        fs.move(temporary, f"{self.path}/{named}")
        return named, sink


class _DigestingSink:
    """A writable file that keeps the count and the SHA-256 of what passes through."""

    closed = False

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self._stream.write(data)
        size = memoryview(data).nbytes
        self.num_bytes += size
        return size

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        """The caller closes the stream."""

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


class _Readable:
    """What hashlib.file_digest asks of a file."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def lineage(artifact: Artifact) -> Iterator[tuple[int, str, Artifact | None]]:
    """The artifact and everything it was made from, depth first: (depth, name, artifact or None if gone)."""
    yield 0, artifact.name, artifact
    for kind, made_from in artifact.manifest["inputs"].items():
        name = f"{kind.split('.')[0]}/{made_from}"
        upstream = artifact.root._open(name)
        if upstream is None:
            yield 1, name, None
        else:
            for depth, inner, found in lineage(upstream):
                yield depth + 1, inner, found


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
    """Commit of the checkout this code runs from, with `+` after it when files differ; None outside one."""
    checkout = Path(__file__).parents[1]
    if not (checkout / ".git").exists():  # installed: a repository further up is not ours
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
