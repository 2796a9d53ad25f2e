"""Files where users have them, and the texts and judgements in MS MARCO's and BEIR's layouts."""

from __future__ import annotations

import fnmatch
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from clusterlib.artifact import resolve
from clusterlib.errors import StrataError


def absolute(path: str, folder: str = "") -> str:
    """A path or URI that means the same in another working folder; relative ones start at `folder`."""
    if "://" in path:
        return path
    if not folder or Path(path).expanduser().is_absolute():
        return str(Path(path).expanduser().absolute())
    return f"{folder}{path}" if folder.endswith("/") else f"{folder}/{path}"


class Location:
    """A path or URI with the file system it is on."""

    def __init__(self, path: str) -> None:
        self.fs, self.path = resolve(path)

    def at(self, path: str) -> Location:
        """Another path on the same file system."""
        other = object.__new__(Location)
        other.fs, other.path = self.fs, path
        return other

    def __truediv__(self, name: str) -> Location:
        return self.at(f"{self.path}/{name}")

    def exists(self) -> bool:
        return bool(self.fs.get_file_info(self.path).type == pafs.FileType.File)

    def files(self, *endings: str) -> list[pafs.FileInfo]:
        """The file itself, or the files below a folder or matching a glob, sorted, with one of the endings.

        Raises:
            StrataError: there are none.
        """
        base, wildcard = self.path, ""
        if any(sign in self.path for sign in "*?["):
            parts = self.path.split("/")
            first = next(i for i, part in enumerate(parts) if any(sign in part for sign in "*?["))
            base, wildcard = "/".join(parts[:first]), self.path
        info = self.fs.get_file_info(base)
        if info.type == pafs.FileType.File:
            return [info]
        found = []
        if info.type == pafs.FileType.Directory:
            for entry in self.fs.get_file_info(pafs.FileSelector(base, recursive=True)):
                matches = fnmatch.fnmatch(entry.path, wildcard) if wildcard else entry.path.endswith(endings)
                if entry.type == pafs.FileType.File and matches:
                    found.append(entry)
        if not found:
            what = "no such file" if info.type == pafs.FileType.NotFound else f"no {' or '.join(endings)} file there"
            raise StrataError(f"{self.path}: {what}; check the input's path")
        return sorted(found, key=lambda entry: entry.path)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(line number from 1, line without its end); compressed files are read through.

        Raises:
            StrataError: the file is missing or its compression ends too early.
        """
        try:
            with self.fs.open_input_stream(self.path, compression="detect") as stream:
                for number, line in enumerate(io.BufferedReader(stream, 1 << 20), start=1):
                    yield number, line.rstrip(b"\r\n")
        except FileNotFoundError as error:
            raise StrataError(f"{self.path}: no such file; check the input's path") from error
        except (OSError, EOFError) as error:
            raise StrataError(f"{self.path}: cannot be read to its end ({error}); fetch it again") from error


def _one_of(folder: Location, *names: str) -> Location:
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise StrataError(f"{folder.path}: holds no {' or '.join(names)}; check the input's path, format and split")


def marco_files(folder: Location, split: str) -> tuple[Location, Location, Location]:
    """collection, queries and judgements (https://microsoft.github.io/msmarco/Datasets, passage ranking)."""
    return (
        _one_of(folder, "collection.tsv", "collection.tsv.gz"),
        _one_of(folder, f"queries.{split}.tsv", f"queries.{split}.tsv.gz"),
        _one_of(folder, f"qrels.{split}.tsv", f"qrels.{split}.tsv.gz"),
    )


def beir_files(folder: Location, split: str) -> tuple[Location, Location, Location]:
    """corpus, queries and judgements of a BEIR folder, as JSON lines and TSV, or all as Parquet."""
    return (
        _one_of(folder, "corpus.jsonl", "corpus.jsonl.gz", "corpus.parquet"),
        _one_of(folder, "queries.jsonl", "queries.jsonl.gz", "queries.parquet"),
        _one_of(folder, f"qrels/{split}.tsv", f"qrels/{split}.parquet", "qrels.parquet"),
    )


def _decoded(location: Location) -> Iterator[tuple[int, str]]:
    for number, line in location.lines():
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            raise StrataError(f"{location.path}: line {number} is not UTF-8; mend or remove it") from error


def tsv_texts(location: Location) -> Iterator[tuple[str, str]]:
    for number, line in _decoded(location):
        name, tab, text = line.partition("\t")
        if not tab:
            raise StrataError(f"{location.path}: line {number} has no tab; each line is id, tab, text")
        yield name, text


def tsv_judgements(location: Location, header: bool) -> Iterator[tuple[int, str, str, int]]:
    """(line, query, passage, relevance); MS MARCO has an unused second column, BEIR a header instead."""
    lines = _decoded(location)
    if header:
        next(lines, None)
    for number, line in lines:
        fields = line.split("\t") if "\t" in line else line.split()
        try:
            query, passage, relevance = fields[0], fields[-2], int(fields[-1])
        except (IndexError, ValueError) as error:
            raise StrataError(f"{location.path}: line {number} is no judgement: {line[:80]!r}") from error
        yield number, query, passage, relevance


def beir_texts(location: Location) -> Iterator[tuple[str, str]]:
    if location.path.endswith(".parquet"):
        table = _parquet_table(location, {"_id", "text"})
        titles = table["title"].to_pylist() if "title" in table.column_names else [None] * table.num_rows
        records: Iterator[Any] = zip(table["_id"].to_pylist(), titles, table["text"].to_pylist(), strict=True)
    else:
        records = _beir_records(location)
    for name, title, text in records:
        yield str(name), f"{title} {text}" if title else text


def _beir_records(location: Location) -> Iterator[tuple[Any, Any, Any]]:
    for number, line in _decoded(location):
        if line.strip():
            try:
                record = json.loads(line)
                yield record["_id"], record.get("title"), record["text"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise StrataError(f"{location.path}: line {number} is no object with _id and text") from error


def beir_judgements(location: Location) -> Iterator[tuple[int, str, str, int]]:
    if not location.path.endswith(".parquet"):
        yield from tsv_judgements(location, header=True)
        return
    table = _parquet_table(location, {"query-id", "corpus-id", "score"})
    columns = (table[name].to_pylist() for name in ("query-id", "corpus-id", "score"))
    for row, (query, passage, relevance) in enumerate(zip(*columns, strict=True)):
        yield row, str(query), str(passage), int(relevance)


def _parquet_table(location: Location, needed: set[str]) -> pa.Table:
    try:
        table = pq.read_table(location.path, filesystem=location.fs)
    except (pa.ArrowInvalid, OSError) as error:
        raise StrataError(f"{location.path}: not a whole Parquet file ({error}); fetch it again") from error
    if missing := needed - set(table.column_names):
        raise StrataError(
            f"{location.path}: no column {', '.join(sorted(missing))}; the columns are {', '.join(table.column_names)}"
        )
    return table
