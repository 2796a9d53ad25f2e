"""Readers: what users have, as raw rows of (row, query, passage, topic), and local retrieval tests."""

from __future__ import annotations

import fnmatch
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from clusterlib.artifact import resolve
from clusterlib.config import Config
from clusterlib.errors import StrataError
from clusterlib.tables import text_ids
from pipelines.docstrings import package_version, read_docstrings

BATCH_ROWS = 4096
_RAW = pa.schema([("row", pa.int64()), ("query", pa.string()), ("passage", pa.string()), ("topic", pa.string())])


class Columns(Config):
    """Names of the columns (or JSON fields) to read."""

    query: str = "query"
    passage: str = "passage"
    topic: str | None = Field(None, description="a label that is carried along, if there is one")


class InputConfig(Config):
    """One input: where its pairs are and what source they belong to."""

    source: str = Field(..., pattern=r"^[\w.-]+$", description="name of the source; several inputs may share it")
    format: Literal["parquet", "jsonl", "tsv", "beir", "huggingface", "docstrings"] = Field(
        ...,
        description="parquet or jsonl (also .gz) files of pairs; tsv: a folder in MS MARCO's layout; beir: a BEIR "
        "folder; huggingface: a data set by hub name or local folder; docstrings: of an installed package",
    )
    path: str = Field(
        ..., description="file, folder or glob, local or a URI; a data set's name; a Python package or `stdlib`"
    )
    columns: Columns = Field(Columns(), description="for parquet, jsonl and huggingface")
    split: str = Field("train", description="for tsv, beir and huggingface: which queries and judgements")
    subset: str | None = Field(None, description="for huggingface: the data set's configuration name")
    fraction: float = Field(1.0, gt=0, le=1, description="share of the pairs to keep, chosen by the hash of their ids")


class RetrievalTestConfig(Config):
    """A local retrieval test; none of its passages may occur in training."""

    name: str = Field(..., pattern=r"^[\w.-]+$")
    format: Literal["beir", "docstrings"]
    path: str = Field(..., description="a BEIR folder, local or a URI; a Python package or `stdlib`")
    split: str = "test"

    @model_validator(mode="after")
    def _split(self) -> Self:
        if self.format == "docstrings" and self.split != "test":
            raise ValueError("docstrings are held out under the split `test` only")
        return self


@dataclass(frozen=True)
class Split:
    """A piece of an input that one task reads: a file, or what stands for one."""

    id: str
    input: InputConfig
    file: str


@dataclass(frozen=True)
class RetrievalTest:
    """A corpus, queries and judgements (query id -> passage id -> relevance > 0)."""

    name: str
    split: str
    corpus: Mapping[str, str]
    queries: Mapping[str, str]
    judgements: Mapping[str, Mapping[str, int]]


def absolute(path: str) -> str:
    """A path or URI that means the same in another working folder."""
    return path if "://" in path else str(Path(path).expanduser().absolute())


class Location:
    """A path or URI with the file system it is on; relative paths start at `folder`."""

    def __init__(self, path: str, folder: str = ".") -> None:
        if "://" not in path and not Path(path).expanduser().is_absolute():
            path = f"{folder}{path}" if folder.endswith("/") else f"{folder}/{path}"
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


class Rows:
    """Collects raw rows and rejects, and hands them on in batches."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, Any, Any, Any]] = []
        self._bad: list[tuple[int, str]] = []

    def add(self, row: int, query: str, passage: str, topic: str | None = None) -> None:
        self._rows.append((row, query, passage, topic))

    def reject(self, row: int, reason: str) -> None:
        self._bad.append((row, reason))

    @property
    def full(self) -> bool:
        return len(self._rows) + len(self._bad) >= BATCH_ROWS

    def take(self) -> tuple[pa.Table, list[tuple[int, str]]]:
        columns: Any = zip(*self._rows, strict=True) if self._rows else [[]] * len(_RAW)
        table = pa.Table.from_arrays(
            [pa.array(column, field.type) for column, field in zip(columns, _RAW, strict=True)], schema=_RAW
        )
        bad, self._rows, self._bad = self._bad, [], []
        return table, bad


Batches = Iterator[tuple[pa.Table, list[tuple[int, str]]]]


def splits(config: InputConfig, folder: str) -> list[Split]:
    """What tasks read of an input, in order.

    Raises:
        StrataError: files are missing.
    """
    if config.format in ("parquet", "jsonl"):
        endings = (".parquet",) if config.format == "parquet" else (".jsonl", ".jsonl.gz", ".json", ".json.gz")
        files = Location(config.path, folder).files(*endings)
        return [Split(f"{number:05d}", config, info.path) for number, info in enumerate(files)]
    if config.format == "tsv":
        _marco_files(Location(config.path, folder), config.split)
    elif config.format == "beir":
        _beir_files(Location(config.path, folder), config.split)
    return [Split("00000", config, config.path)]


def origin(config: InputConfig | RetrievalTestConfig, folder: str) -> Any:
    """What identifies an input's content: names, sizes and times of its files, or versions."""
    if config.format == "docstrings":
        return package_version(config.path)
    location = Location(config.path, folder)
    if config.format == "huggingface":
        local = location.fs.get_file_info(location.path).type == pafs.FileType.Directory
        files = location.files("") if local else []
    elif config.format == "tsv":
        files = [location.fs.get_file_info(file.path) for file in _marco_files(location, config.split)]
    elif config.format == "beir":
        files = [location.fs.get_file_info(file.path) for file in _beir_files(location, config.split)]
    else:
        assert isinstance(config, InputConfig)
        files = location.fs.get_file_info([split.file for split in splits(config, folder)])
    return [[info.base_name, info.size, info.mtime_ns] for info in files]


def read(split: Split, folder: str) -> Batches:
    """Raw rows of a split, with (row, reason) for those that could not be read.

    Raises:
        StrataError: a file is missing, damaged or lacks a column.
    """
    config = split.input
    match config.format:
        case "parquet":
            return _read_parquet(split, Location(config.path, folder).at(split.file))
        case "jsonl":
            return _read_jsonl(split, Location(config.path, folder).at(split.file))
        case "tsv":
            collection, queries, judgements = _marco_files(Location(config.path, folder), config.split)
            return _join(_tsv_texts(collection), _tsv_texts(queries), _tsv_judgements(judgements, header=False))
        case "beir":
            corpus, queries, judgements = _beir_files(Location(config.path, folder), config.split)
            return _join(_beir_texts(corpus), _beir_texts(queries), _beir_judgements(judgements))
        case "huggingface":
            return _read_huggingface(split, folder)
        case "docstrings":
            return _read_docstrings(config.path)


def _select(table: pa.Table, columns: Columns, first_row: int) -> pa.Table:
    """The mapped columns under their own names, with row numbers from `first_row`."""
    topic = pa.nulls(table.num_rows, pa.string())
    if columns.topic:
        try:
            topic = table[columns.topic].cast(pa.string())
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
            kind = table.schema.field(columns.topic).type
            raise StrataError(f"columns.topic: {columns.topic!r} is {kind}, not a label; name another") from error
    rows = pa.array(np.arange(first_row, first_row + table.num_rows))
    return pa.table({"row": rows, "query": table[columns.query], "passage": table[columns.passage], "topic": topic})


def _check_columns(columns: Columns, present: list[str], file: str) -> None:
    for role in ("query", "passage", "topic"):
        name = getattr(columns, role)
        if name is not None and name not in present:
            raise StrataError(f"{file}: no column {name!r} for columns.{role}; the columns are {', '.join(present)}")


def _read_parquet(split: Split, location: Location) -> Batches:
    columns = split.input.columns
    try:
        file = pq.ParquetFile(location.path, filesystem=location.fs)
        _check_columns(columns, file.schema_arrow.names, split.file)
        wanted = sorted({columns.query, columns.passage, *([columns.topic] if columns.topic else [])})
        row = 0
        for batch in file.iter_batches(BATCH_ROWS, columns=wanted):
            yield _select(pa.Table.from_batches([batch]), columns, row), []
            row += batch.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise StrataError(f"{split.file}: not a whole Parquet file ({error}); fetch it again") from error


def _read_jsonl(split: Split, location: Location) -> Batches:
    columns = split.input.columns
    rows = Rows()
    checked = False
    for number, line in location.lines():
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError:
            rows.reject(number, "not UTF-8")
            continue
        except json.JSONDecodeError:
            rows.reject(number, "not JSON")
            continue
        if not isinstance(record, dict):
            rows.reject(number, "not a JSON object")
            continue
        if not checked:  # later rows may lack a field, the first one shows whether the mapping is right
            _check_columns(columns, list(record), split.file)
            checked = True
        query, passage = record.get(columns.query), record.get(columns.passage)
        topic = record.get(columns.topic) if columns.topic else None
        for role, value in (("query", query), ("passage", passage)):
            if not isinstance(value, str):
                rows.reject(number, f"{role} is missing" if value is None else f"{role} is not text")
                break
        else:
            rows.add(number, str(query), str(passage), None if topic is None else str(topic))
        if rows.full:
            yield rows.take()
    yield rows.take()


def _read_huggingface(split: Split, folder: str) -> Batches:
    dataset = _load_dataset(split.input, folder)
    _check_columns(split.input.columns, dataset.column_names, split.file)
    for start in range(0, len(dataset), BATCH_ROWS):
        table = dataset.with_format("arrow")[start : start + BATCH_ROWS]
        yield _select(table, split.input.columns, start), []


def _load_dataset(config: InputConfig, folder: str) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    local = Location(config.path, folder)
    path = local.path if local.fs.get_file_info(local.path).type == pafs.FileType.Directory else config.path
    try:
        return load_dataset(path, config.subset, split=config.split)
    except (DatasetNotFoundError, ValueError, OSError) as error:
        raise StrataError(f"{config.path}: the data set cannot be loaded: {error}") from error


def _read_docstrings(package: str) -> Batches:
    rows = Rows()
    for found in read_docstrings(package, "train"):
        rows.add(found.row, found.query, found.passage, found.module)
        if rows.full:
            yield rows.take()
    yield rows.take()


def _join(
    corpus: Iterator[tuple[str, str]],
    queries: Iterator[tuple[str, str]],
    judgements: Iterator[tuple[int, str, str, int]],
) -> Batches:
    """Pairs of every judgement above 0, in the order of the corpus. Queries and judgements are held in memory."""
    text_of = dict(queries)
    by_passage: dict[str, list[tuple[int, str]]] = {}
    rows = Rows()
    for row, query, passage, relevance in judgements:
        if relevance <= 0:
            rows.reject(row, "judged not relevant")
        elif query in text_of:
            by_passage.setdefault(passage, []).append((row, query))
        else:
            rows.reject(row, "names a query that is not among the queries")
    for passage, text in corpus:
        for row, query in by_passage.pop(passage, ()):
            rows.add(row, text_of[query], text)
        if rows.full:
            yield rows.take()
    for missing in by_passage.values():
        for row, _ in missing:
            rows.reject(row, "names a passage that is not in the collection")
    yield rows.take()


def _one_of(folder: Location, *names: str) -> Location:
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise StrataError(f"{folder.path}: holds no {' or '.join(names)}; check the input's path, format and split")


def _marco_files(folder: Location, split: str) -> tuple[Location, Location, Location]:
    """collection, queries and judgements (https://microsoft.github.io/msmarco/Datasets, passage ranking)."""
    return (
        _one_of(folder, "collection.tsv", "collection.tsv.gz"),
        _one_of(folder, f"queries.{split}.tsv", f"queries.{split}.tsv.gz"),
        _one_of(folder, f"qrels.{split}.tsv", f"qrels.{split}.tsv.gz"),
    )


def _beir_files(folder: Location, split: str) -> tuple[Location, Location, Location]:
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


def _tsv_texts(location: Location) -> Iterator[tuple[str, str]]:
    for number, line in _decoded(location):
        name, tab, text = line.partition("\t")
        if not tab:
            raise StrataError(f"{location.path}: line {number} has no tab; each line is id, tab, text")
        yield name, text


def _tsv_judgements(location: Location, header: bool) -> Iterator[tuple[int, str, str, int]]:
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


def _beir_texts(location: Location) -> Iterator[tuple[str, str]]:
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


def _beir_judgements(location: Location) -> Iterator[tuple[int, str, str, int]]:
    if not location.path.endswith(".parquet"):
        yield from _tsv_judgements(location, header=True)
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


def read_test(config: RetrievalTestConfig, folder: str) -> RetrievalTest:
    """A local retrieval test, held in memory.

    Raises:
        StrataError: files are missing or damaged, or no judgement names a known query and passage.
    """
    judgements: dict[str, dict[str, int]] = {}
    if config.format == "docstrings":
        corpus, queries = {}, {}
        found = list(read_docstrings(config.path, "test"))
        if found:
            query_ids = text_ids(pa.array([item.query for item in found])).tolist()
            passage_ids = text_ids(pa.array([item.passage for item in found])).tolist()
            for item, query, passage in zip(found, query_ids, passage_ids, strict=True):
                queries[f"q{query:016x}"], corpus[f"p{passage:016x}"] = item.query, item.passage
                judgements.setdefault(f"q{query:016x}", {})[f"p{passage:016x}"] = 1
    else:
        files = _beir_files(Location(config.path, folder), config.split)
        corpus, queries = dict(_beir_texts(files[0])), dict(_beir_texts(files[1]))
        for _, query, passage, relevance in _beir_judgements(files[2]):
            if relevance > 0 and query in queries and passage in corpus:
                judgements.setdefault(query, {})[passage] = relevance
        queries = {query: queries[query] for query in judgements}
    if not judgements:
        raise StrataError(f"{config.path}: test {config.name} has no judgement of a known query and passage")
    return RetrievalTest(config.name, config.split, corpus, queries, judgements)


def passage_ids(test: RetrievalTest) -> np.ndarray:
    """Distinct ids of the test's passages, uint64, sorted."""
    return np.unique(text_ids(pa.array(list(test.corpus.values()), pa.string())))


def is_held_out(ids: pa.ChunkedArray, held_out: np.ndarray) -> np.ndarray:
    """Which ids are among the sorted `held_out`, bool [rows]."""
    return pc.is_in(ids, pa.array(held_out)).to_numpy(zero_copy_only=False)
