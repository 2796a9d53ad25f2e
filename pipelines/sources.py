"""Readers of inputs: what users have, as raw rows of (row, query, passage, topic)."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from clusterlib.config import Config, fingerprint
from clusterlib.digests import contents, of_files
from clusterlib.errors import StrataError
from pipelines.docstrings import module_files, package_version, read_docstrings
from pipelines.files import (
    Location,
    absolute,
    beir_files,
    beir_judgements,
    beir_texts,
    marco_files,
    tsv_judgements,
    tsv_texts,
)
from pipelines.retrieval_tests import RetrievalTestConfig

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

    def located(self, folder: str) -> Self:
        named = self.format == "docstrings" or (
            self.format == "huggingface" and not Path(absolute(self.path, folder)).is_dir()
        )
        return self if named else self.model_copy(update={"path": absolute(self.path, folder)})

    def content(self) -> dict[str, Any]:
        """All settings, but for where files lie: `origin` says what they are."""
        content = super().content()
        if self.format != "docstrings" and (self.format != "huggingface" or Path(self.path).is_absolute()):
            del content["path"]
        return content


@dataclass(frozen=True)
class Split:
    """A piece of an input that one task reads: a file, or what stands for one."""

    id: str
    input: InputConfig
    file: str


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


def splits(config: InputConfig) -> list[Split]:
    """What tasks read of an input, in order.

    Raises:
        StrataError: files are missing.
    """
    if config.format in ("parquet", "jsonl"):
        endings = (".parquet",) if config.format == "parquet" else (".jsonl", ".jsonl.gz", ".json", ".json.gz")
        files = Location(config.path).files(*endings)
        return [Split(f"{number:05d}", config, info.path) for number, info in enumerate(files)]
    if config.format == "tsv":
        marco_files(Location(config.path), config.split)
    elif config.format == "beir":
        beir_files(Location(config.path), config.split)
    return [Split("00000", config, config.path)]


def origin(config: InputConfig | RetrievalTestConfig) -> Any:
    """What identifies an input's content, wherever it lies: names and digests (or tags) of its files.

    A local file is read whole when it is first met, then only after a change: see clusterlib.digests.
    """
    if config.format == "docstrings":
        return package_content(config.path)
    if config.format == "huggingface" and not Path(config.path).is_absolute():
        return []
    location = Location(config.path)
    if config.format == "huggingface":
        files = location.files("")
    elif config.format == "tsv":
        files = [location.fs.get_file_info(file.path) for file in marco_files(location, config.split)]
    elif config.format == "beir":
        files = [location.fs.get_file_info(file.path) for file in beir_files(location, config.split)]
    else:
        assert isinstance(config, InputConfig)
        files = location.fs.get_file_info([split.file for split in splits(config)])
    try:
        return [[info.base_name, content] for info, content in zip(files, contents(location.fs, files), strict=True)]
    except OSError as error:
        raise StrataError(f"{config.path}: cannot be read ({error})") from error


@functools.cache
def package_content(package: str) -> list[str]:
    """Version and digest of an installed package's modules; taken once, since every arm and test asks for it."""
    return [package_version(package), fingerprint(of_files([path for _, path in module_files(package)]))]


def read(split: Split) -> Batches:
    """Raw rows of a split, with (row, reason) for those that could not be read.

    Raises:
        StrataError: a file is missing, damaged or lacks a column.
    """
    config = split.input
    match config.format:
        case "parquet":
            return _read_parquet(split, Location(config.path).at(split.file))
        case "jsonl":
            return _read_jsonl(split, Location(config.path).at(split.file))
        case "tsv":
            collection, queries, judgements = marco_files(Location(config.path), config.split)
            return _join(tsv_texts(collection), tsv_texts(queries), tsv_judgements(judgements, header=False))
        case "beir":
            corpus, queries, judgements = beir_files(Location(config.path), config.split)
            return _join(beir_texts(corpus), beir_texts(queries), beir_judgements(judgements))
        case "huggingface":
            return _read_huggingface(split)
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


def _read_huggingface(split: Split) -> Batches:
    dataset = _load_dataset(split.input)
    _check_columns(split.input.columns, dataset.column_names, split.file)
    for start in range(0, len(dataset), BATCH_ROWS):
        table = dataset.with_format("arrow")[start : start + BATCH_ROWS]
        yield _select(table, split.input.columns, start), []


def _load_dataset(config: InputConfig) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(config.path, config.subset, split=config.split)
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
