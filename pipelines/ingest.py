"""ingest: source files -> `pairs`, one part for every file read; unusable rows -> rejects, with
reasons.
"""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pydantic import Field

from clusterlib.artifacts.artifact import Artifact, Root, Spec
from clusterlib.artifacts.config import Config
from clusterlib.artifacts.draft import Draft, Receipt
from clusterlib.artifacts.tables import PAIRS, REJECTS, rejects, validate_pairs
from clusterlib.errors import StrataError
from pipelines.sources import InputConfig, Split, origin, read, splits
from pipelines.stage import Stage
from pipelines.tasks import Job, Task, Workers, make

if TYPE_CHECKING:
    from pipelines.run import Arm

_NOT_CHOSEN = "not in the fraction to keep"
_REJECTS_ROWS = 65_536  # in a row group


class IngestConfig(Config):
    """The pairs to train on."""

    inputs: list[InputConfig] = Field(
        ..., min_length=1, description="files and data sets, each of one source"
    )
    max_chars: int = Field(100_000, ge=1, description="a longer query or passage is refused")


class Ingest(Stage):
    """A source's usable pairs."""

    kind = "pairs"

    def specs(self, arm: Arm) -> dict[str, Spec]:
        ingest = arm.config.ingest
        return {
            source: pairs_spec(ingest, [item for item in ingest.inputs if item.source == source])
            for source in arm.sources
        }

    def make(self, specs: Sequence[Spec], root: Root) -> None:
        """Read every input of the sources.

        Raises:
            StrataError: an input is missing, damaged or lacks a column, or a source has no usable
                pair.
        """
        make("ingest", [_job(spec, Draft(root, spec)) for spec in specs], Workers())


STAGE = Ingest()


def pairs_spec(config: IngestConfig, inputs: Sequence[InputConfig]) -> Spec:
    """What a source's pairs are made from: its inputs."""
    return Spec(
        "pairs",
        3,
        {"max_chars": config.max_chars, "inputs": list(inputs)},
        origin={"inputs": [origin(item) for item in inputs]},
        label=inputs[0].source,
    )


def _job(spec: Spec, draft: Draft) -> Job:
    tasks = [
        Task(f"{number:04d}-{split.id}", (f"{number:04d}-{split.id}", split), split.file)
        for number, item in enumerate(spec.config["inputs"])
        for split in splits(item)
    ]

    def publish(receipts: list[Receipt]) -> Artifact:
        if not any(receipt.parts[0].num_rows for receipt in receipts):
            reasons = dict.fromkeys(reason for receipt in receipts for reason in receipt.rejects)
            raise StrataError(
                f"source {spec.label}: no usable pair in its inputs "
                f"({', '.join(reasons) or 'all are empty'}); see ingest.inputs"
            )
        return draft.publish(receipts)

    return Job(draft, tasks, functools.partial(_Worker, draft, spec.config["max_chars"]), publish)


class _Worker:
    def __init__(self, draft: Draft, max_chars: int) -> None:
        self._draft = draft
        self._max_chars = max_chars

    def __call__(self, work: tuple[str, Split]) -> Receipt:
        part_id, split = work
        with tempfile.TemporaryFile() as spill:
            refused = _Rejects(split.input.source, spill)
            parts = [self._draft.write("pairs", part_id, PAIRS, self._usable(split, refused))]
            if refused.num_kept:
                parts.append(self._draft.write("rejects", part_id, REJECTS, refused.groups()))
        return Receipt(parts, refused.num_rows_in, dict(sorted((+refused.counts).items())))

    def _usable(self, split: Split, refused: _Rejects) -> Iterator[pa.Table]:
        """Usable pairs of a split, a row group at a time; other rows go to `refused`."""
        for raw in read(split, refused.unreadable):
            refused.num_rows_in += raw.num_rows
            pairs, bad = validate_pairs(raw, split.input.source, self._max_chars)
            for row in zip(
                *(bad[name].to_pylist() for name in ("file", "row", "reason")), strict=True
            ):
                refused.keep(*row)
            left_out = _not_chosen(pairs, split.input.fraction)
            refused.counts[_NOT_CHOSEN] += int(left_out.sum())
            yield pairs.filter(pa.array(~left_out))


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


def _not_chosen(pairs: pa.Table, fraction: float) -> np.ndarray:
    """Which pairs a fraction leaves out, bool [rows]: those whose id, a hash, lies beyond that
    share of all ids.
    """
    limit = max(int(fraction * 2**64) - 1, 0)
    return pairs["pair_id"].to_numpy() > np.uint64(limit)
