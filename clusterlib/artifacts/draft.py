"""Making an artifact: tasks write parts and sign for them, and the manifest is written last.

The artifact's folder holds, besides parts, one receipt per finished task and, last, the manifest. A
task writes its parts under temporary names, renames them, then writes its receipt; a task that is
killed or retried leaves at worst a file that no receipt names. The manifest is made from the
receipts alone, and the rest is swept. Tables carry their
digest in their name: a task that runs twice, on this driver or another, cannot change a part that a
    receipt names.
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from clusterlib.artifacts.artifact import MANIFEST, Artifact, Part, Root, Spec
from clusterlib.artifacts.config import dump, fingerprint
from clusterlib.errors import StrataError

_RECEIPTS = "receipts"
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
        # Token ids have bytes that are zero: apart from the others they cost nothing (a third less
        # time, an eighth less space on real text).
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
        """Write a file that is no table."""
        path, sink = self._replace(path, lambda stream: stream.write(data))
        return Part(table, path, 0, sink.num_bytes, sink.sha256)

    def write_folder(self, table: str, folder: Path) -> list[Part]:
        """Copy a local folder's files to `table/`."""
        return [
            self.write_bytes(
                table, f"{table}/{path.relative_to(folder).as_posix()}", path.read_bytes()
            )
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]

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

    def publish(
        self, receipts: Sequence[Receipt], stats: Mapping[str, Any] | None = None
    ) -> Artifact:
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
                f"{self.spec.name}: {num_rows_in} rows in, {num_rows_out} out and "
                f"{sum(rejects.values())} "
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
        """Delete what the finished artifact does not name: receipts, and what killed or late tasks
        left.
        """
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

    def _replace(
        self, path: str, fill: Callable[[_DigestingSink], object]
    ) -> tuple[str, _DigestingSink]:
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
                    f"--root {self.root.uri}: no space is left there; free some and run the same "
                    "command again, "
                    "what is finished is kept"
                ) from error
            raise
        named = path.replace("{digest}", sink.sha256[:12])
        fs.move(temporary, f"{self.path}/{named}")
        return named, sink


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
    checkout = Path(__file__).parents[1]
    if not (checkout / ".git").exists():  # installed: a repository further up is not ours
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
