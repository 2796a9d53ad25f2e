"""Readers of inputs: what users have, as raw rows of (file, row, query, passage, topic)."""

from __future__ import annotations

import functools
import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from clusterlib.artifacts import hub
from clusterlib.artifacts.config import Config, fingerprint
from clusterlib.artifacts.digests import contents, of_files
from clusterlib.artifacts.tables import is_bytes, is_text
from clusterlib.errors import StrataError
from pipelines.docstrings import module_files, package_version, read_docstrings
from pipelines.files import (
    BATCH_ROWS,
    Location,
    Refuse,
    absolute,
    beir_files,
    beir_judgements,
    beir_texts,
    check_distinct,
    marco_files,
    split_pattern,
    text_fault,
    tsv_judgements,
    tsv_texts,
)
from pipelines.retrieval_tests import RetrievalTestConfig, TaskConfig, TestConfig, task_content

_BATCH_CHARS = 2**26
_RAW = pa.schema(
    [
        ("file", pa.string()),
        ("row", pa.int64()),
        ("query", pa.string()),
        ("passage", pa.string()),
        ("topic", pa.string()),
    ]
)


class Columns(Config):
    """Names of the columns (or JSON fields) to read."""

    query: str = Field("query", description="the one that holds the query")
    passage: str = Field("passage", description="the one that holds the passage")
    topic: str | None = Field(None, description="a label that is carried along, if there is one")


class InputConfig(Config):
    """One input: where its pairs are and what source they belong to."""

    source: str = Field(
        ..., pattern=r"^[\w.-]+$", description="name of the source; several inputs may share it"
    )
    format: Literal["parquet", "jsonl", "tsv", "beir", "huggingface", "docstrings"] = Field(
        ...,
        description="parquet or jsonl (also .gz) files of pairs; tsv: a folder in MS MARCO's "
        "layout; beir: a BEIR "
        "folder; huggingface: a data set by hub name or local folder; docstrings: of an installed "
        "package",
    )
    path: str = Field(
        ...,
        description="for parquet and jsonl: a file, a folder with all below it, or a pattern, "
        "local or a URI; patterns "
        "are a shell's: `*` stays in its folder, `**` descends, `[[]` is a bracket itself, and "
        "hidden files are left out. A folder for tsv and beir; a data set's hub name or local "
        "folder; a Python package, module or `stdlib`",
    )
    columns: Columns = Field(Columns(), description="for parquet, jsonl and huggingface")
    split: str = Field(
        "train", description="for tsv, beir and huggingface: which queries and judgements"
    )
    subset: str | None = Field(
        None, description="for huggingface: the data set's configuration name"
    )
    revision: str | None = Field(
        None,
        description="branch, tag or commit of a data set on the hub; by default its latest commit",
    )
    fraction: float = Field(
        1.0, gt=0, le=1, description="share of the pairs to keep, chosen by the hash of their ids"
    )

    @model_validator(mode="after")
    def _is_a_name(self) -> Self:
        if self.format == "huggingface" and "://" in self.path:
            raise ValueError(
                f"path {self.path!r} is a URI, and format huggingface takes a data set's hub name "
                "or a local folder; "
                "read files at a URI with format parquet or jsonl"
            )
        if self.revision is not None and self.format != "huggingface":
            raise ValueError(
                f"revision {self.revision!r} is for format huggingface, not {self.format}"
            )
        return self

    def located(self, folder: str) -> Self:
        if self.format in ("parquet", "jsonl"):
            folder = glob.escape(folder)
        named = self.format == "docstrings" or (
            self.format == "huggingface" and not Path(absolute(self.path, folder)).is_dir()
        )
        return self if named else self.model_copy(update={"path": absolute(self.path, folder)})

    def content(self) -> dict[str, Any]:
        """All settings, but for where files lie and a revision's name: `origin` says what they
        are.
        """
        content = super().content()
        del content["revision"]
        if self.format != "docstrings" and (
            self.format != "huggingface" or Path(self.path).is_absolute()
        ):
            del content["path"]
        return content


@dataclass(frozen=True)
class Split:
    """A piece of an input that one task reads: a file, or what stands for one."""

    id: str
    input: InputConfig
    file: str


class _Rows:
    """Collects raw rows and hands them on in batches."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, int, str, str, str | None]] = []
        self._num_chars = 0

    def add(self, file: str, row: int, query: str, passage: str, topic: str | None = None) -> None:
        self._rows.append((file, row, query, passage, topic))
        self._num_chars += len(query) + len(passage)

    @property
    def full(self) -> bool:
        return len(self._rows) >= BATCH_ROWS or self._num_chars >= _BATCH_CHARS

    def take(self) -> pa.Table:
        columns = zip(*self._rows, strict=True) if self._rows else [()] * len(_RAW)
        self._rows, self._num_chars = [], 0
        return pa.Table.from_arrays(
            [pa.array(column, field.type) for column, field in zip(columns, _RAW, strict=True)],
            schema=_RAW,
        )


def splits(config: InputConfig) -> list[Split]:
    """What tasks read of an input, in order.

    Raises:
        StrataError: files are missing.
    """
    if config.format in ("parquet", "jsonl"):
        endings = (
            (".parquet",)
            if config.format == "parquet"
            else (".jsonl", ".jsonl.gz", ".json", ".json.gz")
        )
        files = _folder(config).files(*endings, pattern=split_pattern(config.path)[1])
        return [Split(f"{number:05d}", config, info.path) for number, info in enumerate(files)]
    if config.format == "tsv":
        marco_files(Location(config.path), config.split)
    elif config.format == "beir":
        beir_files(Location(config.path), config.split)
    elif _is_hub_name(config):  # a worker must not ask again: there may be a new commit by then
        config = config.model_copy(
            update={
                "revision": hub.commit(config.path, config.revision, "dataset") or config.revision
            }
        )
    return [Split("00000", config, config.path)]


def origin(config: InputConfig | TestConfig) -> Any:
    """What identifies the content of an input or a test, wherever it lies: names and digests (or
    tags) of its files, or the revision of its data set.

    A local file is read whole when it is first met, then only after a change: see
        clusterlib.artifacts.digests.

    Raises:
        StrataError: files are missing or cannot be read.
    """
    if isinstance(config, TaskConfig):
        return task_content(config)
    try:
        return _origin(config)
    except (OSError, pa.ArrowException) as error:
        raise StrataError(f"{config.path}: cannot be read ({error})") from error


def _origin(config: InputConfig | RetrievalTestConfig) -> Any:
    if config.format == "docstrings":
        return package_content(config.path)
    if isinstance(config, InputConfig) and _is_hub_name(config):
        return hub.commit(config.path, config.revision, "dataset") or {"revision": config.revision}
    location = _folder(config)
    if config.format == "huggingface":
        files = location.files("")
    elif config.format == "tsv":
        files = [
            location.fs.get_file_info(file.path) for file in marco_files(location, config.split)
        ]
    elif config.format == "beir":
        files = [
            location.fs.get_file_info(file.path) for file in beir_files(location, config.split)
        ]
    else:
        assert isinstance(config, InputConfig)
        files = location.fs.get_file_info([split.file for split in splits(config)])
    return [
        [info.base_name, content]
        for info, content in zip(files, contents(location.fs, files), strict=True)
    ]


@functools.cache
def package_content(package: str) -> list[str]:
    """Version and digest of an installed package's modules; taken once, since every arm and test
    asks for it.
    """
    return [
        package_version(package),
        fingerprint(of_files([path for _, path in module_files(package)])),
    ]


def _folder(config: InputConfig | RetrievalTestConfig) -> Location:
    patterned = config.format in ("parquet", "jsonl")
    return Location(split_pattern(config.path)[0] if patterned else config.path)


def _is_hub_name(config: InputConfig) -> bool:
    return config.format == "huggingface" and not Path(config.path).is_absolute()


def read(split: Split, refuse: Refuse) -> Iterator[pa.Table]:
    """Raw rows of a split, at most BATCH_ROWS at once, as `validate_pairs` takes them.

    A row of tsv and beir is a judgement, by its file and line; lines of queries and of the corpus
    that cannot be read are refused beside them.

    Args:
        refuse: told of every row that could not be read.

    Raises:
        StrataError: a file is missing, damaged or lacks a column.
    """
    config = split.input
    match config.format:
        case "parquet":
            return _read_parquet(split, _folder(config).at(split.file))
        case "jsonl":
            return _read_jsonl(split, _folder(config).at(split.file), refuse)
        case "tsv":
            collection, queries, judgements = marco_files(Location(config.path), config.split)
            return _join(
                tsv_texts(collection, refuse),
                tsv_texts(queries, refuse),
                tsv_judgements(judgements, False, refuse),
                judgements.path,
                refuse,
            )
        case "beir":
            corpus, queries, judgements = beir_files(Location(config.path), config.split)
            return _join(
                beir_texts(corpus, refuse),
                beir_texts(queries, refuse),
                beir_judgements(judgements, refuse),
                judgements.path,
                refuse,
            )
        case "huggingface":
            return _read_huggingface(split)
        case "docstrings":
            return _read_docstrings(config.path)


def _columns(columns: Columns, file: str, names: Sequence[str]) -> list[str]:
    """The distinct names of the mapped columns; StrataError where one is not among `names`, or
    twice.
    """
    wanted = {role: name for role, name in columns if name is not None}
    for role, name in wanted.items():
        if name not in names:
            raise StrataError(
                f"{file}: no column {name!r} for columns.{role}; the columns are {', '.join(names)}"
            )
    check_distinct(file, list(wanted.values()), names)
    return sorted(set(wanted.values()))


def _select(table: pa.Table, columns: Columns, file: str, first_row: int) -> pa.Table:
    """The mapped columns under their own names, with row numbers from `first_row`."""
    topic = table[columns.topic] if columns.topic else pa.nulls(table.num_rows)
    if not is_text(topic.type):
        try:
            if is_bytes(topic.type):  # which would be cast, as long as they happen to be UTF-8
                raise pa.ArrowInvalid("bytes")
            topic = topic.cast(pa.string())
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
            raise StrataError(
                f"{file}: columns.topic: {columns.topic!r} is {topic.type}, not a label; name "
                "another"
            ) from error
    return pa.table(
        {
            "file": pa.array([file] * table.num_rows, pa.string()),
            "row": pa.array(np.arange(first_row, first_row + table.num_rows)),
            "query": table[columns.query],
            "passage": table[columns.passage],
            "topic": topic,
        }
    )


def _read_parquet(split: Split, location: Location) -> Iterator[pa.Table]:
    columns = split.input.columns
    for row, table in location.batches(functools.partial(_columns, columns, split.file)):
        yield _select(table, columns, split.file, row)


def _read_jsonl(split: Split, location: Location, refuse: Refuse) -> Iterator[pa.Table]:
    columns = split.input.columns
    rows = _Rows()
    fields: dict[str, None] = {}
    num_objects = 0
    for number, record in location.objects(refuse):
        num_objects += 1
        if (
            num_objects <= BATCH_ROWS
        ):  # any row may lack a field; that all of these do shows that the mapping is wrong
            fields |= dict.fromkeys(record)
        if num_objects == BATCH_ROWS:
            _columns(columns, split.file, list(fields))
        query: Any = record.get(columns.query)
        passage: Any = record.get(columns.passage)
        topic: Any = record.get(columns.topic) if columns.topic else None
        if isinstance(topic, (bool, int, float)):
            topic = str(topic)
        reason = text_fault("query", query) or text_fault("passage", passage)
        if topic is not None:
            reason = reason or text_fault("topic", topic)
        if reason:
            refuse(split.file, number, reason)
        else:
            rows.add(split.file, number, query, passage, topic)
        if rows.full:
            yield rows.take()
    if 0 < num_objects < BATCH_ROWS:
        _columns(columns, split.file, list(fields))
    yield rows.take()


def _read_huggingface(split: Split) -> Iterator[pa.Table]:
    dataset = _load_dataset(split.input)
    columns = split.input.columns
    _columns(columns, split.file, dataset.column_names)
    for start in range(0, len(dataset), BATCH_ROWS):
        yield _select(
            dataset.with_format("arrow")[start : start + BATCH_ROWS], columns, split.file, start
        )


def _load_dataset(config: InputConfig) -> Any:
    """The split of a data set.

    Raises:
        StrataError: there is none, the hub does not answer, or the local cache has another commit
            than `revision`.
    """
    from datasets import load_dataset, load_dataset_builder

    try:
        if not _is_hub_name(config):
            return load_dataset(config.path, config.subset, split=config.split)
        # By this spelling no folder of that name is taken for it.
        builder = load_dataset_builder(
            f"hf://datasets/{config.path}", config.subset, revision=config.revision
        )
        # Where the hub does not answer, `datasets` takes what its cache has.
        if hub.is_commit(config.revision) and builder.hash != config.revision:
            raise StrataError(
                f"{config.path}: the hub does not answer, and the local cache has commit "
                f"{builder.hash}, not {config.revision}; try again later, or set its revision"
            )
        builder.download_and_prepare()
        return builder.as_dataset(config.split)
    except StrataError:
        raise
    except Exception as error:  # noqa: BLE001 (its readers of files raise whatever they like)
        reason = next(iter(str(error).splitlines()), "")
        raise StrataError(
            f"{config.path}: the data set cannot be loaded ({type(error).__name__}: {reason})"
        ) from error


def _read_docstrings(package: str) -> Iterator[pa.Table]:
    rows = _Rows()
    for found in read_docstrings(package, "train"):
        rows.add(found.module, found.row, found.query, found.passage, found.module)
        if rows.full:
            yield rows.take()
    yield rows.take()


def _join(
    corpus: Iterator[tuple[str, str]],
    queries: Iterator[tuple[str, str]],
    judgements: Iterator[tuple[int, str, str, int]],
    file: str,
    refuse: Refuse,
) -> Iterator[pa.Table]:
    """Pairs of every judgement above 0, in the order of the corpus.

    The corpus streams by. Queries and judgements are held in the memory of one process: 0.6 GB for
    a million of each, measured, so 0.4 GB for MS MARCO's.

    Args:
        file: that the judgements are in.
    """
    text_of = dict(queries)
    by_passage: dict[str, list[tuple[int, str]]] = {}
    rows = _Rows()
    for row, query, passage, relevance in judgements:
        if relevance <= 0:
            refuse(file, row, "judged not relevant")
        elif query in text_of:
            by_passage.setdefault(passage, []).append((row, text_of[query]))
        else:
            refuse(file, row, "names a query that is not among the queries")
    for passage, text in corpus:
        for row, query in by_passage.pop(passage, ()):
            rows.add(file, row, query, text)
            if rows.full:
                yield rows.take()
    for missing in by_passage.values():
        for row, _ in missing:
            refuse(file, row, "names a passage that is not in the collection")
    yield rows.take()
