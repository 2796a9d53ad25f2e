"""ingest: source files -> `pairs`, one part for every file read; unusable rows -> rejects, with reasons."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
from pydantic import Field

from clusterlib.artifact import Artifact, Root, Spec
from clusterlib.config import Config
from clusterlib.draft import Draft, Receipt
from clusterlib.errors import StrataError
from clusterlib.tables import PAIRS, REJECTS, rejects, validate_pairs
from pipelines.retrieval_tests import RetrievalTestConfig, is_held_out, passage_ids, read_test
from pipelines.sources import InputConfig, Split, origin, read, splits
from pipelines.stage import Task, Workers, make

_HELD_OUT = "passage belongs to a retrieval test"
_NOT_CHOSEN = "not in the fraction to keep"


class IngestConfig(Config):
    """The pairs to train on."""

    inputs: list[InputConfig] = Field(..., min_length=1)
    max_chars: int = Field(100_000, ge=1, description="a longer query or passage is refused")


def pairs_spec(config: IngestConfig, tests: Sequence[RetrievalTestConfig]) -> Spec:
    """What the pairs are made from."""
    return Spec(
        "pairs",
        1,
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
    made = root.find(spec)
    if made is not None:
        return made
    draft = Draft(root, spec)
    tasks = [
        Task(f"{number:04d}-{split.id}", (f"{number:04d}-{split.id}", split))
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
                f"no usable pair in any input ({', '.join(reasons) or 'all are empty'}); see ingest.inputs"
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
        refused: list[pa.Table] = []
        counts: Counter[str] = Counter()
        pairs = self._draft.write("pairs", part_id, PAIRS, self._usable(split, refused, counts))
        parts = [pairs]
        if refused:
            parts.append(self._draft.write("rejects", part_id, REJECTS, [pa.concat_tables(refused)]))
            counts.update(reason for table in refused for reason in table["reason"].to_pylist())
        return Receipt(
            parts,
            pairs.num_rows + sum(counts.values()),
            {reason: count for reason, count in sorted(counts.items()) if count},
            {"num_rows_by_source": {split.input.source: pairs.num_rows}},
        )

    def _usable(self, split: Split, refused: list[pa.Table], counts: Counter[str]) -> Iterator[pa.Table]:
        """Usable pairs of a split, a row group at a time; refused rows go to `refused` or `counts`."""
        source = split.input.source
        for raw, unreadable in read(split):
            pairs, bad = validate_pairs(raw, source, split.file, self._max_chars)
            rows, reasons = zip(*unreadable, strict=True) if unreadable else ((), ())
            refused += [table for table in (rejects(source, split.file, rows, reasons), bad) if table.num_rows]
            for reason, drop in (
                (_HELD_OUT, lambda table: is_held_out(table["passage_id"], self._held_out)),
                (_NOT_CHOSEN, _not_chosen(split.input.fraction)),
            ):
                dropped = drop(pairs)
                counts[reason] += int(dropped.sum())
                pairs = pairs.filter(pa.array(~dropped))
            yield pairs


def _not_chosen(fraction: float) -> Callable[[pa.Table], np.ndarray]:
    """Which pairs a fraction leaves out: those whose id, a hash, lies beyond that share of all ids."""
    limit = int(fraction * 2**64) - 1
    return lambda pairs: pairs["pair_id"].to_numpy() > np.uint64(limit)
