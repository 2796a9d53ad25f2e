"""Artifacts: folders that are complete once their manifest is written, and are never changed
afterwards.

`{root}/{kind}/{fingerprint}/` holds parts and `manifest.json`, which names every part and its
digest: only what it names is ever read. clusterlib.artifacts.draft says how they come to be.
"""

from __future__ import annotations

import functools
import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from clusterlib.artifacts.config import fingerprint
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
        inputs: kind -> fingerprint of the artifacts it reads.
        origin: what identifies data from outside the root (names and digests of files, versions).
    """

    kind: str
    version: int
    config: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of what is there when it is first asked for; it travels with the spec to other
        machines.
        """
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


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a local path or URI, and the path on it.

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
    return filesystem, path


def _resolve_by_fsspec(uri: str, unknown: Exception) -> tuple[pafs.FileSystem, str]:
    import fsspec

    try:
        inner, path = fsspec.core.url_to_fs(uri)
    except Exception as error:  # noqa: BLE001 (file systems of others raise whatever they like)
        raise StrataError(f"{uri}: no file system for it: {unknown}; fsspec: {error}") from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(inner)), path


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
        return pa.concat_tables(
            [self.open_parquet(part).read(columns=columns) for part in self.parts(table)]
        )

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
        return file.read_row_groups(groups, columns=columns).slice(
            piece.first_row - skipped, piece.num_rows
        )

    def download(self, folder: str, into: Path) -> Path:
        """The artifact's `folder` as a local path: itself when the root is local, else a copy in
        `into`.
        """
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
    for kind, made_from in artifact.manifest["inputs"].items():
        name = f"{kind.split('.')[0]}/{made_from}"
        upstream = artifact.root._open(name)
        if upstream is None:
            yield 1, name, None
        else:
            for depth, inner, found in lineage(upstream):
                yield depth + 1, inner, found
