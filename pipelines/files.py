"""Files where users have them, and the texts and judgements in MS MARCO's and BEIR's layouts."""

from __future__ import annotations

import codecs
import fnmatch
import glob
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from clusterlib.artifacts.artifact import resolve
from clusterlib.artifacts.tables import decode, is_text
from clusterlib.errors import StrataError

BATCH_ROWS = 4096
MAX_LINE_BYTES = 2**26  # a longer line is no row of text, and would be held in memory

_ESCAPED = re.compile(r"\[([*?[])\]")

Refuse = Callable[
    [str, int, str], None
]  # takes a row that cannot be used: its file, number and what is wrong with it


class Passage(NamedTuple):
    """A text of a BEIR folder; queries, and passages of many corpora, have no title."""

    title: str
    text: str

    @property
    def whole(self) -> str:
        """Title and text as one, which is what models are given."""
        return f"{self.title} {self.text}" if self.title else self.text


def stop(file: str, row: int, reason: str) -> NoReturn:
    """A `Refuse` for files that must be whole.

    Raises:
        StrataError: always.
    """
    raise StrataError(f"{file}: row {row}: {reason}; mend or remove it")


def absolute(path: str, folder: str = "") -> str:
    """A path or URI that means the same in another working folder; relative ones start at
    `folder`.
    """
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

    def files(self, *endings: str, pattern: str = "") -> list[pafs.FileInfo]:
        """The file itself, or the files below a folder with one of the endings, or those that
        match, sorted.

        Hidden files are left out, unless a pattern names their dot.

        Args:
            pattern: as in a shell, of paths below the folder: `*` and `?` stay within a name, `**`
                stands for any number of folders, `[ab]` is one of these characters, and `[[]` a
                bracket itself.

        Raises:
            StrataError: there are none.
        """
        info = self.fs.get_file_info(self.path)
        if info.type == pafs.FileType.File and not pattern:
            return [info]
        found = []
        if info.type == pafs.FileType.Directory and pattern:
            found = self._matching(self.path, pattern.split("/"))
        elif info.type == pafs.FileType.Directory:
            for entry in self.fs.get_file_info(pafs.FileSelector(self.path, recursive=True)):
                below = entry.path.removeprefix(self.path).lstrip("/")
                hidden = any(part.startswith(".") for part in below.split("/"))
                if entry.type == pafs.FileType.File and below.endswith(endings) and not hidden:
                    found.append(entry)
        if not found:
            if pattern and (self / pattern).exists():
                named = glob.escape(pattern)
                what = f"a pattern that no file matches; write {named} for the file of that name"
            elif pattern or info.type == pafs.FileType.NotFound:
                what = "no such file; check the input's path"
            else:
                what = f"no {' or '.join(endings)} file there; check the input's path"
            raise StrataError(f"{(self / pattern).path if pattern else self.path}: {what}")
        return [entry for _, entry in sorted({entry.path: entry for entry in found}.items())]

    def _matching(self, folder: str, parts: Sequence[str]) -> list[pafs.FileInfo]:
        """Files below a folder whose path matches a pattern for each of its parts; only folders
        that match are read.
        """
        part, *rest = parts
        found = self._matching(folder, rest) if part == "**" and rest else []
        for entry in self.fs.get_file_info(pafs.FileSelector(folder)):
            if entry.base_name.startswith(".") and not part.startswith("."):
                continue
            if entry.type == pafs.FileType.Directory and part == "**":
                found += self._matching(entry.path, parts)
            elif fnmatch.fnmatchcase(entry.base_name, part):
                if entry.type == pafs.FileType.Directory and rest:
                    found += self._matching(entry.path, rest)
                elif entry.type == pafs.FileType.File and not rest:
                    found.append(entry)
        return found

    def lines(self, refuse: Refuse) -> Iterator[tuple[int, str]]:
        """(line number from 1, its text) of lines that are not blank; compressed files are read
        through.

        A byte order mark is no part of the first line, nor are line ends. Lines that are not UTF-8
        or over MAX_LINE_BYTES are refused.

        Raises:
            StrataError: the file is missing or its compression ends too early.
        """
        try:
            with self.fs.open_input_stream(self.path, compression="detect") as stream:
                reader = io.BufferedReader(stream, 1 << 20)
                for number in itertools.count(1):
                    line = reader.readline(MAX_LINE_BYTES)
                    if not line:
                        return
                    if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                        while (rest := reader.readline(MAX_LINE_BYTES)) and not rest.endswith(
                            b"\n"
                        ):
                            pass
                        refuse(self.path, number, f"line has {MAX_LINE_BYTES} bytes or more")
                        continue
                    if number == 1:
                        line = line.removeprefix(codecs.BOM_UTF8)
                    if not line.strip():
                        continue
                    try:
                        text = line.rstrip(b"\r\n").decode()
                    except UnicodeDecodeError:
                        refuse(self.path, number, "not UTF-8")
                    else:
                        yield number, text
        except FileNotFoundError as error:
            raise StrataError(f"{self.path}: no such file; check the input's path") from error
        except (OSError, EOFError, pa.ArrowException) as error:
            raise StrataError(
                f"{self.path}: cannot be read to its end ({error}); fetch it again"
            ) from error

    def objects(self, refuse: Refuse) -> Iterator[tuple[int, dict[str, Any]]]:
        """(line number, object) of JSON lines; what is none is refused."""
        for number, line in self.lines(refuse):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                reason = "not JSON"
            except ValueError:  # Python reads no integers of over 4,300 digits
                reason = "holds a number of too many digits"
            except RecursionError:
                reason = "nested too deep"
            else:
                if isinstance(record, dict):
                    yield number, record
                    continue
                reason = "not a JSON object"
            refuse(self.path, number, reason)

    def batches(
        self, wanted: Callable[[Sequence[str]], Sequence[str]]
    ) -> Iterator[tuple[int, pa.Table]]:
        """(number of its first row from 0, at most BATCH_ROWS rows) of a Parquet file.

        Args:
            wanted: given the names of the file's columns, names those to read.

        Raises:
            StrataError: the file is missing or damaged, or two columns have a wanted name.
        """
        try:
            file = pq.ParquetFile(self.path, filesystem=self.fs, page_checksum_verification=True)
            names = file.schema_arrow.names
            columns = list(wanted(names))
            check_distinct(self.path, columns, names)
            row = 0
            for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                yield row, pa.Table.from_batches([batch])
                row += batch.num_rows
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise StrataError(
                f"{self.path}: not a whole Parquet file ({error}); fetch it again"
            ) from error


def split_pattern(path: str) -> tuple[str, str]:
    """The folder or file of a path or URI that is above every wildcard, and the pattern below it,
    if there is one.
    """
    scheme, separator, rest = path.rpartition("://")
    parts = rest.split("/")
    first = next(
        (place for place, part in enumerate(parts) if glob.has_magic(_ESCAPED.sub("", part))),
        len(parts),
    )
    folder = _ESCAPED.sub(r"\1", "/".join(parts[:first])) or ("/" if rest.startswith("/") else "")
    return f"{scheme}{separator}{folder}", "/".join(parts[first:])


def check_distinct(file: str, wanted: Sequence[str], names: Sequence[str]) -> None:
    """Raise StrataError where several columns have a wanted name."""
    for name in wanted:
        if names.count(name) > 1:
            raise StrataError(
                f"{file}: {names.count(name)} columns are called {name!r}; rename all but one"
            )


def text_fault(name: str, value: Any) -> str | None:
    """Why a JSON value is no text, or None where it is."""
    if value is None:
        return f"{name} is missing"
    if not isinstance(value, str):
        return f"{name} is not text"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"{name} holds half of a surrogate pair"
    return None


def _one_of(folder: Location, *names: str) -> Location:
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise StrataError(
        f"{folder.path}: holds no {' or '.join(names)}; check the input's path, format and split"
    )


def marco_files(folder: Location, split: str) -> tuple[Location, Location, Location]:
    """collection, queries and judgements (https://microsoft.github.io/msmarco/Datasets, passage
    ranking).
    """
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


def tsv_texts(location: Location, refuse: Refuse = stop) -> Iterator[tuple[str, str]]:
    """(id, text); each line is id, tab, text."""
    for number, line in location.lines(refuse):
        name, tab, text = line.partition("\t")
        if tab:
            yield name, text
        else:
            refuse(location.path, number, "not an id, a tab and a text")


def tsv_judgements(
    location: Location, header: bool, refuse: Refuse = stop
) -> Iterator[tuple[int, str, str, int]]:
    """(line, query, passage, relevance); MS MARCO has an unused second column, BEIR a header
    instead.
    """
    for number, line in location.lines(refuse):
        fields = line.split("\t") if "\t" in line else line.split()
        try:
            relevance = int(fields[-1])
        except (IndexError, ValueError):
            if header and number == 1:
                continue
            fields = []
        if len(fields) < 3:
            refuse(location.path, number, "not a judgement: a query, a passage and a whole number")
        else:
            yield number, fields[0], fields[-2], relevance


def beir_texts(location: Location, refuse: Refuse = stop) -> Iterator[tuple[str, str]]:
    """(id, title and text as one) of a corpus or of queries."""
    for name, passage in beir_passages(location, refuse):
        yield name, passage.whole


def beir_passages(location: Location, refuse: Refuse = stop) -> Iterator[tuple[str, Passage]]:
    """(id, passage) of a corpus or of queries."""
    for row, record in _records(location, ("_id", "text"), ("title",), refuse):
        name, title = record.get("_id"), record.get("title")
        text: Any = record.get("text")
        reason = (
            _id_fault("_id", name)
            or text_fault("text", text)
            or (title and text_fault("title", title))
        )
        if reason:
            refuse(location.path, row, reason)
        else:
            yield str(name), Passage(title or "", text)


def beir_judgements(
    location: Location, refuse: Refuse = stop
) -> Iterator[tuple[int, str, str, int]]:
    """(row, query, passage, relevance)."""
    if not location.path.endswith(".parquet"):
        yield from tsv_judgements(location, header=True, refuse=refuse)
        return
    for row, record in _records(location, ("query-id", "corpus-id", "score"), (), refuse):
        query, passage, relevance = record["query-id"], record["corpus-id"], record["score"]
        reason = _id_fault("query-id", query) or _id_fault("corpus-id", passage)
        try:
            relevance = int(relevance)
        except (TypeError, ValueError, OverflowError):
            reason = reason or "score is not a number"
        if reason:
            refuse(location.path, row, reason)
        else:
            yield row, str(query), str(passage), relevance


def _id_fault(name: str, value: Any) -> str | None:
    return (
        None if isinstance(value, int) and not isinstance(value, bool) else text_fault(name, value)
    )


def _records(
    location: Location, needed: Sequence[str], optional: Sequence[str], refuse: Refuse
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, field -> value) of JSON lines or Parquet; rows with text that is not UTF-8 are
    refused.
    """
    if not location.path.endswith(".parquet"):
        yield from location.objects(refuse)
        return

    def wanted(names: Sequence[str]) -> list[str]:
        if missing := sorted(set(needed) - set(names)):
            raise StrataError(
                f"{location.path}: no column {', '.join(missing)}; the columns are "
                f"{', '.join(names)}"
            )
        return [*needed, *(name for name in optional if name in names)]

    for first, table in location.batches(wanted):
        values, undecodable = {}, np.zeros(table.num_rows, bool)
        for name in table.column_names:
            column = table[name]
            if is_text(column.type):
                column, bad = decode(column)
                undecodable |= bad
            elif not any(
                test(column.type)
                for test in (pa.types.is_integer, pa.types.is_floating, pa.types.is_null)
            ):
                raise StrataError(
                    f"{location.path}: column {name!r} is {column.type}, neither text nor a number"
                )
            values[name] = column.to_pylist()
        for row, record in enumerate(zip(*values.values(), strict=True)):
            if undecodable[row]:
                refuse(location.path, first + row, "not UTF-8")
            else:
                yield first + row, dict(zip(values, record, strict=True))
