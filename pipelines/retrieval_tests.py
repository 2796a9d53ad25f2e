"""Local retrieval tests: a corpus, queries and judgements from a BEIR folder or a package's
docstrings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from clusterlib.artifacts.config import Config
from clusterlib.artifacts.tables import text_ids
from clusterlib.errors import StrataError
from pipelines.docstrings import read_docstrings
from pipelines.files import Location, absolute, beir_files, beir_judgements, beir_texts


class RetrievalTestConfig(Config):
    """A local retrieval test; none of its passages may occur in training."""

    name: str = Field(..., pattern=r"^[\w.-]+$")
    format: Literal["beir", "docstrings"]
    path: str = Field(
        ..., description="a BEIR folder, local or a URI; a Python package or `stdlib`"
    )
    split: str = "test"

    def located(self, folder: str) -> Self:
        if self.format == "docstrings":
            return self
        return self.model_copy(update={"path": absolute(self.path, folder)})

    def content(self) -> dict[str, Any]:
        """All settings, but for where files lie: their sizes and times say what they are."""
        content = super().content()
        if self.format != "docstrings":
            del content["path"]
        return content

    @model_validator(mode="after")
    def _split(self) -> Self:
        if self.format == "docstrings" and self.split != "test":
            raise ValueError("docstrings are held out under the split `test` only")
        return self


@dataclass(frozen=True)
class RetrievalTest:
    """A corpus, queries and judgements (query id -> passage id -> relevance > 0)."""

    name: str
    split: str
    corpus: Mapping[str, str]
    queries: Mapping[str, str]
    judgements: Mapping[str, Mapping[str, int]]


def read_test(config: RetrievalTestConfig) -> RetrievalTest:
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
        files = beir_files(Location(config.path), config.split)
        corpus, queries = dict(beir_texts(files[0])), dict(beir_texts(files[1]))
        for _, query, passage, relevance in beir_judgements(files[2]):
            if relevance > 0 and query in queries and passage in corpus:
                judgements.setdefault(query, {})[passage] = relevance
        queries = {query: queries[query] for query in judgements}
    if not judgements:
        raise StrataError(
            f"{config.path}: test {config.name} has no judgement of a known query and passage"
        )
    return RetrievalTest(config.name, config.split, corpus, queries, judgements)


def passage_ids(test: RetrievalTest) -> np.ndarray:
    """Distinct ids of the test's passages, uint64, sorted."""
    return np.unique(text_ids(pa.array(list(test.corpus.values()), pa.string())))


def is_held_out(ids: pa.ChunkedArray, held_out: np.ndarray) -> np.ndarray:
    """Which ids are among the sorted `held_out`, bool [rows]."""
    return pc.is_in(ids, pa.array(held_out)).to_numpy(zero_copy_only=False)
