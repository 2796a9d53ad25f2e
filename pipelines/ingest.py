"""ingest: source files -> `pairs`, one part for every file read; unusable rows -> rejects, with
reasons.
"""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import IO

import numpy as np
import pyarrow as pa
from pydantic import Field

from clusterlib.artifacts.artifact import Artifact, Root, Spec
from clusterlib.artifacts.config import Config
from clusterlib.artifacts.draft import Draft, Receipt
from clusterlib.artifacts.tables import PAIRS, REJECTS, rejects, validate_pairs
from clusterlib.errors import StrataError
from pipelines.retrieval_tests import RetrievalTestConfig, is_held_out, passage_ids, read_test
from pipelines.sources import InputConfig, Split, origin, read, splits
from pipelines.stage import Task, Workers, make

_HELD_OUT = "passage belongs to a retrieval test"
_NOT_CHOSEN = "not in the fraction to keep"
_REJECTS_ROWS = 65_536  # in a row group


class IngestConfig(Config):
    """The pairs to train on."""

    inputs: list[InputConfig] = Field(..., min_length=1)
    max_chars: int = Field(100_000, ge=1, description="a longer query or passage is refused")


def pairs_spec(config: IngestConfig, tests: Sequence[RetrievalTestConfig]) -> Spec:
    """What the pairs are made from."""
    return Spec(
        "pairs",
        2,
        {"ingest": config, "held_out": list(tests)},
        origin={
            "inputs": [origin(source) for source in config.inputs],
            "held_out": [origin(test) for test in tests],
        },
    )


def ingest(config: IngestConfig, tests: Sequence[RetrievalTestConfig], root: Root) -> Artifact:
    """Read every input into the `pairs` artifact; no passage of `tests` gets in.

    Raises:
        StrataError: an input is missing, damaged or lacks a column, or no usable pair is left.
    """
    spec = pairs_spec(config, tests)
    draft = Draft(root, spec)
    made = draft.find()
    if made is not None:
        return made
    tasks = [
        Task(f"{number:04d}-{split.id}", (f"{number:04d}-{split.id}", split), split.file)
        for number, source in enumerate(config.inputs)
        for split in splits(source)
    ]
    ids = [passage_ids(read_test(test)) for test in tests]
    held_out = np.unique(np.concatenate(ids)) if ids else np.empty(0, np.uint64)
    worker = functools.partial(_Worker, draft, config.max_chars, held_out)

    def publish(receipts: list[Receipt]) -> Artifact:
        counts: Counter[str] = Counter()
        for receipt in receipts:
            counts.update(receipt.stats["num_rows_by_source"])
        if not sum(counts.values()):
            reasons = dict.fromkeys(reason for receipt in receipts for reason in receipt.rejects)
            raise StrataError(
                f"no usable pair in any input ({', '.join(reasons) or 'all are empty'}); see "
                "ingest.inputs"
            )
        return draft.publish(receipts, {"num_rows_by_source": dict(sorted(counts.items()))})

    return make(draft, "ingest", tasks, worker, Workers(), publish)


class _Worker:
    def __init__(self, draft: Draft, max_chars: int, held_out: np.ndarray) -> None:
        self._draft = draft
        self._max_chars = max_chars
        self._held_out = held_out

    def __call__(self, work: tuple[str, Split]) -> Receipt:
        part_id, split = work
        with tempfile.TemporaryFile() as spill:
            refused = _Rejects(split.input.source, spill)
            pairs = self._draft.write("pairs", part_id, PAIRS, self._usable(split, refused))
            parts = [pairs]
            if refused.num_kept:
                parts.append(self._draft.write("rejects", part_id, REJECTS, refused.groups()))
        return Receipt(
            parts,
            refused.num_rows_in,
            dict(sorted((+refused.counts).items())),
            {"num_rows_by_source": {split.input.source: pairs.num_rows}},
        )

    def _usable(self, split: Split, refused: _Rejects) -> Iterator[pa.Table]:
        """Usable pairs of a split, a row group at a time; other rows go to `refused`."""
        for raw in read(split, refused.unreadable):
            refused.num_rows_in += raw.num_rows
            pairs, bad = validate_pairs(raw, split.input.source, self._max_chars)
            for row in zip(
                *(bad[name].to_pylist() for name in ("file", "row", "reason")), strict=True
            ):
                refused.keep(*row)
            for reason, drop in (
                (_HELD_OUT, lambda table: is_held_out(table["passage_id"], self._held_out)),
                (_NOT_CHOSEN, _not_chosen(split.input.fraction)),
            ):
                dropped = drop(pairs)
                refused.counts[reason] += int(dropped.sum())
                pairs = pairs.filter(pa.array(~dropped))
            yield pairs


class _Rejects:
    """What a task refuses. Rows wait in a local file to be written after the pairs, so any number
    fits.

    Attributes:
        num_rows_in: rows read, usable or not.
        num_kept: rows refused with file, row and reason.
        counts: rows refused by reason, those included that are only counted.
    """

    def __init__(self, source: str, spill: IO[bytes]) -> None:
        self.num_rows_in = self.num_kept = 0
        self.counts: Counter[str] = Counter()
        self._source = source
        self._held: list[tuple[str, int, str]] = []
        self._spilled = spill
        self._writer = pa.ipc.new_stream(
            spill, REJECTS, options=pa.ipc.IpcWriteOptions(compression="zstd")
        )

    def unreadable(self, file: str, row: int, reason: str) -> None:
        """Keep a row that never became one of a batch."""
        self.num_rows_in += 1
        self.keep(file, row, reason)

    def keep(self, file: str, row: int, reason: str) -> None:
        self.num_kept += 1
        self.counts[reason] += 1
        self._held.append((file, row, reason))
        if len(self._held) == _REJECTS_ROWS:
            self._spill()

    def groups(self) -> Iterator[pa.Table]:
        """All rows that were kept, in order."""
        self._spill()
        self._writer.close()
        self._spilled.seek(0)
        for batch in pa.ipc.open_stream(self._spilled):
            yield pa.Table.from_batches([batch])

    def _spill(self) -> None:
        if self._held:
            self._writer.write_table(rejects(self._source, *zip(*self._held, strict=True)))
            self._held.clear()


def _not_chosen(fraction: float) -> Callable[[pa.Table], np.ndarray]:
    """Which pairs a fraction leaves out: those whose id, a hash, lies beyond that share of all
    ids.
    """
    limit = max(int(fraction * 2**64) - 1, 0)
    return lambda pairs: pairs["pair_id"].to_numpy() > np.uint64(limit)
