"""Retrieval tests: local ones, of a BEIR folder or a package's docstrings, and mteb's tasks; what
of them is held out of training, and their texts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import AfterValidator, Field, model_validator

from clusterlib.artifacts.config import Config
from clusterlib.artifacts.tables import is_text, text_ids
from clusterlib.errors import StrataError
from pipelines.docstrings import read_docstrings
from pipelines.files import (
    Location,
    Passage,
    absolute,
    beir_files,
    beir_judgements,
    beir_passages,
    beir_texts,
)
from pipelines.mteb_tasks import check_task

HoldOut = Literal["corpus", "judged", "none"]
Role = Literal["query", "judged passage", "other passage"]

TEXTS = pa.schema([("title", pa.string()), ("text", pa.string())])
_NAMED = pa.schema([("id", pa.string()), *TEXTS])
_BATCH_TEXTS = 8192
_POLICY = (
    "pairs that are not trained on: corpus, those with a text of the test, whether query or "
    "passage; judged, those with one of its queries or of the passages judged relevant for them; "
    "none"
)


class UnavailableError(StrataError):
    """The data of a task of mteb cannot be had."""


class RetrievalTestConfig(Config):
    """A local retrieval test."""

    name: str = Field(..., pattern=r"^[\w.-]+$", description="what tables of scores call it")
    format: Literal["beir", "docstrings"] = Field(
        ..., description="beir: a BEIR folder; docstrings: modules of a package that are held out"
    )
    path: str = Field(
        ..., description="a BEIR folder, local or a URI; a Python package or `stdlib`"
    )
    split: str = Field("test", description="for beir: which judgements")
    hold_out: HoldOut = Field("corpus", description=_POLICY)

    def located(self, folder: str) -> Self:
        if self.format == "docstrings":
            return self
        return self.model_copy(update={"path": absolute(self.path, folder)})

    def content(self) -> dict[str, Any]:
        """What is measured: all settings but for where files lie, since their digests say what
        they are, and what is held out, which is the shards'.
        """
        content = super().content()
        del content["hold_out"]
        if self.format != "docstrings":
            del content["path"]
        return content

    @model_validator(mode="after")
    def _split(self) -> Self:
        if self.format == "docstrings" and self.split != "test":
            raise ValueError("docstrings are held out under the split `test` only")
        return self


class TaskConfig(Config):
    """A retrieval task of mteb."""

    name: Annotated[str, AfterValidator(check_task)] = Field(
        ..., description="mteb's, such as MSMARCO or NanoMSMARCORetrieval"
    )
    hold_out: HoldOut = Field("judged", description=_POLICY)

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, data: Any) -> Any:
        """A name alone stands for a task with the defaults."""
        return {"name": data} if isinstance(data, str) else data


TestConfig = RetrievalTestConfig | TaskConfig


@dataclass(frozen=True)
class RetrievalTest:
    """A corpus, queries and judgements (query id -> passage id -> relevance > 0)."""

    name: str
    split: str
    corpus: Mapping[str, Passage]
    queries: Mapping[str, str]
    judgements: Mapping[str, Mapping[str, int]]


def read_test(config: RetrievalTestConfig) -> RetrievalTest:
    """A local retrieval test, held in memory.

    Raises:
        StrataError: files are missing or damaged, or no judgement names a known query and passage.
    """
    corpus: dict[str, Passage] = {}
    queries: dict[str, str] = {}
    judgements: dict[str, dict[str, int]] = {}
    if config.format == "docstrings":
        found = list(read_docstrings(config.path, "test"))
        if found:
            query_ids = text_ids(pa.array([item.query for item in found])).tolist()
            passage_ids = text_ids(pa.array([item.passage for item in found])).tolist()
            for item, query, passage in zip(found, query_ids, passage_ids, strict=True):
                queries[f"q{query:016x}"] = item.query
                corpus[f"p{passage:016x}"] = Passage("", item.passage)
                judgements.setdefault(f"q{query:016x}", {})[f"p{passage:016x}"] = 1
    else:
        files = beir_files(Location(config.path), config.split)
        corpus, queries = dict(beir_passages(files[0])), dict(beir_texts(files[1]))
        for _, query, passage, relevance in beir_judgements(files[2]):
            if relevance > 0 and query in queries and passage in corpus:
                judgements.setdefault(query, {})[passage] = relevance
        queries = {query: queries[query] for query in judgements}
    if not judgements:
        raise StrataError(
            f"{config.path}: test {config.name} has no judgement of a known query and passage"
        )
    return RetrievalTest(config.name, config.split, corpus, queries, judgements)


def mteb_task(name: str) -> Any:
    """A retrieval task as mteb registers it, its data not yet loaded."""
    import mteb

    return mteb.get_task(name)


def task_content(config: TaskConfig) -> dict[str, Any]:
    """What identifies a task's data: mteb fixes the revision of its data set."""
    task = mteb_task(config.name)
    dataset = {name: task.metadata.dataset.get(name) for name in ("path", "name", "revision")}
    return {"task": config.name, "dataset": dataset, "splits": list(task.eval_splits)}


def texts(config: TestConfig) -> Iterator[tuple[Role, pa.Table]]:
    """The texts of a test, as tables of schema TEXTS with what they are in it.

    Queries are those that have judgements; a passage judged irrelevant is one of the others.

    Raises:
        StrataError: files are missing or damaged, or a task's data cannot be had.
    """
    if isinstance(config, TaskConfig):
        for splits in _load(config).values():
            for data in splits.values():
                yield from _texts(
                    _batches(config, data["corpus"]),
                    _batches(config, data["queries"]),
                    data["relevant_docs"],
                )
    else:
        test = read_test(config)
        queries = ((name, Passage("", text)) for name, text in test.queries.items())
        yield from _texts(_tables(test.corpus.items()), _tables(queries), test.judgements)


def _texts(
    corpus: Iterable[pa.Table],
    queries: Iterable[pa.Table],
    judgements: Mapping[str, Mapping[str, int]],
) -> Iterator[tuple[Role, pa.Table]]:
    """Tables of schema _NAMED by role, their ids left out."""
    asked = pa.array([query for query, found in judgements.items() if found], pa.string())
    relevant = {
        passage
        for found in judgements.values()
        for passage, relevance in found.items()
        if relevance > 0
    }
    judged = pa.array(sorted(relevant), pa.string())
    for table in queries:
        yield "query", table.filter(pc.is_in(table["id"], asked)).drop_columns("id")
    for table in corpus:
        is_judged = pc.is_in(table["id"], judged)
        yield "judged passage", table.filter(is_judged).drop_columns("id")
        yield "other passage", table.filter(pc.invert(is_judged)).drop_columns("id")


def _tables(named: Iterable[tuple[str, Passage]]) -> Iterator[pa.Table]:
    """Ids and texts as tables of schema _NAMED."""
    rows = iter(named)
    while batch := list(itertools.islice(rows, _BATCH_TEXTS)):
        yield pa.Table.from_pylist(
            [{"id": name, **passage._asdict()} for name, passage in batch], schema=_NAMED
        )


def _load(config: TaskConfig) -> Mapping[str, Mapping[str, Any]]:
    """The data of a task: subset -> split -> corpus, queries and judgements.

    Raises:
        StrataError: they cannot be had.
    """
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    task = mteb_task(config.name)
    try:
        task.load_data()
        task.convert_v1_dataset_format_to_v2(num_proc=None)
    except (DatasetsError, HTTPError, ValueError, OSError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise UnavailableError(
            f"evaluate.tasks: the data of {config.name} cannot be had here "
            f"({type(error).__name__}: {reason}), so its texts cannot be held out; let this "
            "machine reach the hub or its cache, or set hold_out: none for the task"
        ) from error
    data: Mapping[str, Mapping[str, Any]] = task.dataset
    return data


def _batches(config: TaskConfig, dataset: Any) -> Iterator[pa.Table]:
    """Rows of a data set of mteb as tables of schema _NAMED.

    Raises:
        StrataError: they are no text.
    """
    names = [name for name in _NAMED.names if name in dataset.column_names]
    for batch in dataset.select_columns(names).with_format("arrow").iter(_BATCH_TEXTS):
        if "text" not in names or not is_text(batch["text"].type):
            raise StrataError(
                f"evaluate.tasks: {config.name} ranks or asks by something else than plain text, "
                "which cannot be held out; leave it out"
            )
        columns = [
            pc.fill_null(batch[name].cast(pa.string()), "")
            if name in names
            else pa.array([""] * batch.num_rows, pa.string())
            for name in _NAMED.names
        ]
        yield pa.Table.from_arrays(columns, schema=_NAMED)


def whole(texts: pa.Table) -> pa.Array:
    """Title and text as one, which is what models are given."""
    return pc.utf8_trim_whitespace(
        pc.binary_join_element_wise(texts["title"], texts["text"], " ")
    ).combine_chunks()


def forms(texts: pa.Table) -> tuple[pa.Array, pa.Array]:
    """What a training text may be equal to: title and text as one, and the text alone where there
    is a title.

    Returns:
        The forms, and for each the number of its row, int64.
    """
    titled = pc.not_equal(pc.utf8_trim_whitespace(texts["title"]), "").combine_chunks()
    rows = pa.array(np.arange(texts.num_rows))
    alone = texts["text"].combine_chunks().filter(titled)
    return pa.concat_arrays([whole(texts), alone]), pa.concat_arrays([rows, rows.filter(titled)])
