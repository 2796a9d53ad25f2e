"""Artifacts: folders that are complete once their manifest is written, and are never changed
afterwards.

`{root}/{kind}/{fingerprint}/` holds parts and `manifest.json`, which names every part and its
digest: only what it names is ever read. clusterlib.artifacts.draft says how they come to be.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from clusterlib.artifacts.config import fingerprint
from clusterlib.artifacts.storage import is_transient, listing, patient
from clusterlib.errors import StrataError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Spec:
    """What an artifact is made from; it says where the artifact lies before it is made.

    Attributes:
        kind: name of the table (or other product) it holds.
        version: raised whenever the code makes something else from the same settings.
        config: settings by name, plain data or models. The fingerprint covers `Config.content` of
            these; the manifest shows them whole.
        inputs: the artifacts it reads, by their kind, or by `kind.label` where it reads several of
            a kind.
        origin: what identifies data from outside the root (names and digests of files, versions).
        label: whose it is, for people: a source, an arm, a model. No part of the fingerprint.
    """

    kind: str
    version: int
    config: Mapping[str, Any]
    inputs: Mapping[str, Spec] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of what is there when it is first asked for; it travels with the spec to other
        machines.
        """
        return fingerprint(
            {
                "kind": self.kind,
                "version": self.version,
                "config": self.config,
                "inputs": {name: spec.fingerprint for name, spec in self.inputs.items()},
                "origin": self.origin,
            }
        )

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.fingerprint}"


@dataclass(frozen=True)
class Part:
    """One file of an artifact: a piece of `table`, at `path` inside the artifact's folder.

    Attributes:
        footer_bytes: at the end of a Parquet file, what says where all the rest is and has no
            checksum of its own; 0 in other files.
    """

    table: str
    path: str
    num_rows: int
    num_bytes: int
    sha256: str
    footer_bytes: int = 0
    footer_sha256: str = ""


@contextlib.contextmanager
def open_part(fs: pafs.FileSystem, folder: str, part: Part) -> Iterator[pq.ParquetFile]:
    """A Parquet part of the artifact, or draft, in `folder`, to be read from inside the context.

    The footer's digest is checked now, the checksum of each page when the page is read.

    Raises:
        StrataError: the file is gone or damaged.
        OSError: the store cannot be reached.
    """
    path = f"{folder}/{part.path}"
    try:
        with fs.open_input_file(path) as file:
            yield pq.ParquetFile(
                file,
                metadata=_footer(file, part),
                pre_buffer=True,
                page_checksum_verification=True,
            )
    except (OSError, pa.ArrowInvalid) as error:
        if is_transient(error):
            raise
        raise StrataError(
            f"{path}: named in the manifest but missing or damaged ({error}); "
            f"delete {folder} and run its stage again"
        ) from error


def _footer(file: pa.NativeFile, part: Part) -> pq.FileMetaData | None:
    """The metadata at the end of a part; None where no digest of it was kept."""
    if not part.footer_bytes:
        return None
    data = file.read_at(part.footer_bytes, max(0, part.num_bytes - part.footer_bytes))
    if hashlib.sha256(data).hexdigest() != part.footer_sha256:
        raise OSError("its footer is not as it was written")
    return pq.read_metadata(pa.BufferReader(data))


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a local path or URI, patient where it is not local, and the path on it.

    Raises:
        StrataError: neither pyarrow nor fsspec knows the scheme, it names no bucket, or its store
            cannot be reached.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as unknown:
        return _resolve_by_fsspec(uri, unknown)
    except OSError as error:
        raise StrataError(f"{uri}: cannot be reached ({error})") from error
    if not path:
        raise StrataError(f"{uri}: names no bucket")
    return patient(filesystem), path


def _resolve_by_fsspec(uri: str, unknown: Exception) -> tuple[pafs.FileSystem, str]:
    import fsspec

    try:
        inner, path = fsspec.core.url_to_fs(uri)
    except Exception as error:  # noqa: BLE001 (file systems of others raise whatever they like)
        raise StrataError(f"{uri}: no file system for it: {unknown}; fsspec: {error}") from error
    return patient(pafs.PyFileSystem(pafs.FSSpecHandler(inner))), path


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

    def check_readable(self) -> None:
        """Raise StrataError for what is no folder, or cannot be reached; it need not be there."""
        try:
            self.fs.get_file_info(pafs.FileSelector(self.path, allow_not_found=True))
        except (OSError, pa.ArrowException) as error:
            raise StrataError(
                f"--root {self.uri}: cannot be read ({error}); name a folder"
            ) from error

    def check_writable(self) -> None:
        """Raise StrataError where nothing can be written."""
        probe = f"{self.path}/.probe-{uuid.uuid4().hex}"
        try:
            self.fs.create_dir(self.path, recursive=True)
            with self.fs.open_output_stream(probe) as stream:
                stream.write(b"")
            self.fs.delete_file(probe)
        except OSError as error:
            raise StrataError(
                f"--root {self.uri}: cannot be written ({error}); name another folder"
            ) from error

    def find(self, spec: Spec) -> Artifact | None:
        """The finished artifact of `spec`, all its files there, or None.

        Raises:
            StrataError: its manifest is damaged, or a file named there is gone or cut short.
        """
        found = self.peek(spec.name)
        if found is not None:
            found.check()
        return found

    def open(self, spec: Spec) -> Artifact:
        """The finished artifact of `spec`, all its files there.

        Raises:
            StrataError: it is not there, or as in `find`.
        """
        found = self.find(spec)
        if found is None:
            whose = f" of {spec.label}" if spec.label else ""
            raise StrataError(
                f"{self.path}/{spec.name}: no finished {spec.kind}{whose} there; run the stage "
                "that makes them first, with the same recipe and settings"
            )
        return found

    def peek(self, name: str) -> Artifact | None:
        """The artifact `kind/fingerprint` if it has a manifest; its files are not looked for.

        Raises:
            StrataError: the manifest is damaged.
        """
        path = f"{self.path}/{name}/{MANIFEST}"
        try:
            with self.fs.open_input_stream(path) as stream:
                data = stream.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            manifest = json.loads(data)
            if not isinstance(manifest, dict) or "parts" not in manifest:
                raise ValueError("it names no parts")
        except ValueError as error:
            raise StrataError(
                f"{path}: damaged, no manifest any more ({error}); delete {self.path}/{name} and "
                "run its stage again"
            ) from error
        return Artifact(self, manifest)

    def artifacts(self) -> list[Artifact]:
        """Every finished artifact, oldest first; see `peek`."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        found = []
        for kind in self.fs.get_file_info(selector):
            if kind.type == pafs.FileType.Directory:
                for entry in self.fs.get_file_info(pafs.FileSelector(kind.path)):
                    artifact = self.peek(f"{kind.base_name}/{entry.base_name}")
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

    def __str__(self) -> str:
        return f"{self.part.path}, rows {self.first_row} to {self.first_row + self.num_rows - 1}"


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
    def label(self) -> str:
        return str(self.manifest["label"])

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
        return [
            Part(**part) for part in self.manifest["parts"] if part["table"] == (table or self.kind)
        ]

    def open_part(self, part: Part) -> AbstractContextManager[pq.ParquetFile]:
        """A Parquet part, to be read from inside the context: see `open_part`."""
        return open_part(self.root.fs, self.path, part)

    def read(self, table: str | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of `table` (by default the artifact's own), in order."""
        return pa.concat_tables([self.read_part(part, columns) for part in self.parts(table)])

    def read_part(self, part: Part, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of a part."""
        with self.open_part(part) as file:
            return file.read(columns=columns)

    def row_groups(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The artifact's own table, a row group at a time."""
        for part in self.parts():
            with self.open_part(part) as file:
                for number in range(file.num_row_groups):
                    yield file.read_row_group(number, columns=columns)

    def slices(self, num_rows: int) -> list[Slice]:
        """The artifact's own table cut into slices of at most `num_rows` rows, none across two
        parts.
        """
        return [
            Slice(part, first, min(num_rows, part.num_rows - first))
            for part in self.parts()
            for first in range(0, part.num_rows, num_rows)
        ]

    def blocks(self, num_rows: int) -> list[list[Slice]]:
        """The artifact's own table cut every `num_rows` rows, across parts."""
        blocks: list[list[Slice]] = []
        room = 0
        for part in self.parts():
            first = 0
            while first < part.num_rows:
                if not room:
                    blocks.append([])
                    room = num_rows
                piece = Slice(part, first, min(room, part.num_rows - first))
                blocks[-1].append(piece)
                first += piece.num_rows
                room -= piece.num_rows
        return blocks

    def read_slice(self, piece: Slice, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of a slice; only the row groups that hold them are read."""
        with self.open_part(piece.part) as file:
            end = piece.first_row + piece.num_rows
            groups, skipped, start = [], 0, 0
            for group in range(file.num_row_groups):
                stop = start + file.metadata.row_group(group).num_rows
                if stop <= piece.first_row:
                    skipped = stop
                elif start < end:
                    groups.append(group)
                start = stop
            rows = file.read_row_groups(groups, columns=columns)
        return rows.slice(piece.first_row - skipped, piece.num_rows)

    def folder(self, table: str) -> str:
        """Path of the folder whose files are the parts of `table`."""
        return f"{self.path}/{self.parts(table)[0].path.partition('/')[0]}"

    def download(self, table: str, into: Path) -> Path:
        """The folder of `table` as a local path: itself when the root is local, else a copy in
        `into`.

        Raises:
            StrataError: a file differs from what was written.
        """
        source = self.folder(table)
        if self.root.is_local:
            into = Path(source)
        else:
            into.mkdir(parents=True, exist_ok=True)
            pafs.copy_files(
                source,
                str(into),
                source_filesystem=self.root.fs,
                destination_filesystem=pafs.LocalFileSystem(),
            )
        for part in self.parts(table):
            with (into / part.path.partition("/")[2]).open("rb") as stream:
                self._compare(part, hashlib.file_digest(stream, "sha256").hexdigest())
        return into

    def check(self) -> dict[str, pafs.FileInfo]:
        """See whether all files that the manifest names are there, with as many bytes: one listing.

        Returns:
            What is in the artifact's folder, by the path there.

        Raises:
            StrataError: one is gone or has another size.
        """
        found = listing(self.root.fs, self.path)
        for part in self.manifest["parts"]:
            info = found.get(part["path"])
            if info is None or info.size != part["num_bytes"]:
                state = "missing" if info is None else f"of {info.size} bytes"
                raise StrataError(
                    f"{self.path}/{part['path']}: named in the manifest with {part['num_bytes']} "
                    f"bytes, but {state}; delete {self.path} and run its stage again"
                )
        return found

    def verify(self) -> None:
        """Read every part and compare it with the manifest.

        Raises:
            StrataError: a part is missing, or differs from what was written.
        """
        self.check()
        for part in (Part(**part) for part in self.manifest["parts"]):
            with self.root.fs.open_input_stream(f"{self.path}/{part.path}") as stream:
                self._compare(part, hashlib.file_digest(_Readable(stream), "sha256").hexdigest())

    def _compare(self, part: Part, sha256: str) -> None:
        if sha256 != part.sha256:
            raise StrataError(
                f"{self.path}/{part.path}: its bytes differ from those the manifest names; delete "
                f"{self.path} and run its stage again"
            )


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
    """The artifact and everything it was made from, depth first: (depth, name, artifact or None if
    gone).
    """
    yield 0, artifact.name, artifact
    for name in artifact.manifest["inputs"].values():
        upstream = artifact.root.peek(name)
        if upstream is None:
            yield 1, name, None
        else:
            for depth, inner, found in lineage(upstream):
                yield depth + 1, inner, found
