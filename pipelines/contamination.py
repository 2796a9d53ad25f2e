"""contamination: `shards` + `embeddings` -> `contamination`, what of the tests occurs in the pairs
that are trained on.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from clusterlib.artifacts.artifact import Artifact, Root, Slice, Spec
from clusterlib.artifacts.draft import Draft, Receipt
from clusterlib.artifacts.tables import CONTAMINATION, MATCHES, text_ids
from pipelines.held_out import HoldOutConfig
from pipelines.overlap import MAX_WORDS, MIN_WORDS, Lookup, words
from pipelines.retrieval_tests import TestConfig, UnavailableError, forms, texts, whole
from pipelines.sources import origin
from pipelines.stage import Stage
from pipelines.tasks import Job, Task, Workers, make

if TYPE_CHECKING:
    from pipelines.run import Arm

MEANING = (
    "Exactly: the whole text, whatever its case, white space and Unicode composition, is the query "
    "or the passage of a pair; so is, of a passage with a title, the text alone. Nearly: another "
    f"text shares a run of {MAX_WORDS} words with a query or a passage, or all its words where it "
    f"has {MIN_WORDS} to {MAX_WORDS - 1}, whatever case and punctuation; stock phrases count too. "
    f"Too short: texts of fewer than {MIN_WORDS} words, which are compared exactly only, as are "
    "passages that are not judged."
)
_LISTED = {"query": "queries", "judged passage": "judged passages"}
_ALL_PASSAGES = "all passages"
_LENGTHS = range(MIN_WORDS, MAX_WORDS + 1)
_BLOCK_ROWS = 65_536  # of the embeddings, in a task
_BATCH_ROWS = 4096  # cut into words at once
_SHOWN_CHARS = 1000  # of a training text in MATCHES

_NAMED = pa.schema(
    [("test", pa.int64()), ("texts", pa.string()), ("text", pa.string()), ("is_short", pa.bool_())]
)
# What a task finds: the number of a listed text, how it occurs, and a pair that it occurs in.
_FOUND = pa.schema([("number", pa.int64()), *list(MATCHES)[3:]])
_OTHERS = pa.schema([("number", pa.int64())])


class Contamination(Stage):
    """What of the tests occurs in the pairs of all sources that an arm trains on.

    The artifact holds the table `contamination`, and in `matches` every query and judged passage
    that was found. Of a task that holds nothing out and whose data cannot be had all counts are
    null.
    """

    kind = "contamination"

    def specs(self, arm: Arm) -> dict[str, Spec]:
        tests = arm.config.evaluate.all_tests
        return {arm.name: contamination_spec(tests, arm.specs("shards"), arm.name)}

    def make(self, specs: Sequence[Spec], root: Root) -> None:
        """Count the texts of tests that occur in the rows of shards, exactly or nearly.

        Raises:
            StrataError: the files or data of a test that holds something out cannot be had.
        """
        make("contamination", [_job(spec, root) for spec in specs], Workers())


STAGE = Contamination()


def contamination_spec(tests: Sequence[TestConfig], shards: Mapping[str, Spec], label: str) -> Spec:
    """What the contamination table is made from.

    Args:
        shards: of each source; the texts looked through are those of their embeddings.
    """
    return Spec(
        "contamination",
        2,
        {
            "tests": [{"name": test.name, "hold_out": test.hold_out} for test in tests],
            "held_out": HoldOutConfig(tests=list(tests)),
        },
        {f"shards.{source}": shards[source] for source in sorted(shards)},
        {"tests": [origin(test) for test in tests]},
        label=label,
    )


@dataclass(frozen=True)
class Source:
    """A source's texts, and which of its rows are in the shards.

    Attributes:
        rejected: part of the embeddings -> its rows that are not, int64.
    """

    embeddings: Artifact
    rejected: Mapping[str, np.ndarray]


def _job(spec: Spec, root: Root) -> Job:
    draft, tests = Draft(root, spec), spec.config["held_out"].tests
    shards = [root.open(made_from) for made_from in spec.inputs.values()]
    embeddings = [root.open(made_from.inputs["embeddings"]) for made_from in spec.inputs.values()]
    wanted = collect(tests)
    tasks = [
        Task(
            f"{source:04d}-{number:06d}-{_BLOCK_ROWS}",
            (source, number, block),
            ", ".join(map(str, block)),
        )
        for source, artifact in enumerate(embeddings if tests else [])
        for number, block in enumerate(artifact.blocks(_BLOCK_ROWS))
    ]
    sources = [
        Source(artifact, rejected_rows(of_source))
        for artifact, of_source in zip(embeddings, shards, strict=True)
    ]
    # Once in the memory of each node, whatever the number of workers.
    shared = ray.put((wanted.index, sources))

    def publish(receipts: list[Receipt]) -> Artifact:
        num_rows = sum(receipt.stats["num_rows"] for receipt in receipts)
        num_in_shards = sum(artifact.num_rows for artifact in shards)
        if tests and num_rows != num_in_shards:
            raise RuntimeError(
                f"{num_rows} pairs were looked through, and the shards hold {num_in_shards}"
            )
        found, others = _gathered(draft, receipts, wanted)
        table = wanted.table(found, others)
        parts = [
            draft.write("contamination", "contamination", CONTAMINATION, [table]),
            draft.write("matches", "matches", MATCHES, [wanted.matches(found)]),
        ]
        return draft.publish([Receipt(parts, table.num_rows)], {"num_training_rows": num_rows})

    return Job(draft, tasks, functools.partial(_Worker, draft, shared), publish)


def rejected_rows(shards: Artifact) -> dict[str, np.ndarray]:
    """Part of the embeddings -> the rows that are not in the shards, int64."""
    if not shards.parts("rejects"):
        return {}
    grouped = shards.read("rejects", columns=["file", "row"]).group_by("file")
    rows = grouped.aggregate([("row", "list")])
    return {
        file: rows["row_list"][number].values.to_numpy()
        for number, file in enumerate(rows["file"].to_pylist())
    }


@dataclass(frozen=True)
class Index:
    """How the texts of tests are found; it travels to the workers.

    Attributes:
        ids: of queries and judged passages, which are listed, by the ids of their forms.
        runs: of the same, by runs of so many words.
        other_ids: of other passages, by their number among these.
    """

    ids: Lookup
    runs: Mapping[int, Lookup]
    other_ids: Lookup


@dataclass(frozen=True)
class Wanted:
    """The texts of all tests.

    Attributes:
        listed: of schema _NAMED, test being its number; a row's number is the text's.
        others: for each test, the numbers of its other passages.
        missing: numbers of the tests whose data could not be had.
    """

    tests: Sequence[TestConfig]
    index: Index
    listed: pa.Table
    others: Sequence[range]
    missing: frozenset[int]

    def table(self, found: pa.Table, others: np.ndarray) -> pa.Table:
        """The counts.

        Args:
            found: of schema _FOUND, one row for each listed text.
            others: which of the other passages were found, bool [n].
        """
        listed = self.listed.append_column("match", self._match_of_each(found))
        rows: list[dict[str, Any]] = []
        for number, test in enumerate(self.tests):
            of_test = listed.filter(pc.equal(listed["test"], number))
            counts = {name: _count(of_test, name) for name in _LISTED.values()}
            judged, mine = counts["judged passages"], self.others[number]
            counts[_ALL_PASSAGES] = {
                "num_texts": judged["num_texts"] + len(mine),
                "num_exact": judged["num_exact"] + int(others[mine.start : mine.stop].sum()),
            }
            rows += [
                {"test": test.name, "hold_out": test.hold_out, "texts": name}
                | ({} if number in self.missing else count)
                for name, count in counts.items()
            ]
        return pa.Table.from_pylist(rows, schema=CONTAMINATION)

    def matches(self, found: pa.Table) -> pa.Table:
        """What was found, of schema MATCHES, in the order of the texts."""
        listed = self.listed.take(found["number"])
        names = pa.array([test.name for test in self.tests], pa.string())
        columns = [names.take(listed["test"]), listed["texts"], listed["text"]]
        return pa.Table.from_arrays([*columns, *found.columns[1:]], schema=MATCHES)

    def _match_of_each(self, found: pa.Table) -> pa.Array:
        matches = np.full(self.listed.num_rows, None)
        matches[found["number"].to_numpy()] = found["match"].to_pylist()
        return pa.array(matches, pa.string())


def _count(listed: pa.Table, name: str) -> dict[str, int]:
    table = listed.filter(pc.equal(listed["texts"], name))
    return {
        "num_texts": table.num_rows,
        "num_exact": pc.sum(pc.equal(table["match"], "exact")).as_py() or 0,
        "num_near": pc.sum(pc.equal(table["match"], "near")).as_py() or 0,
        "num_short": pc.sum(table["is_short"]).as_py() or 0,
    }


def collect(tests: Sequence[TestConfig]) -> Wanted:
    """The texts of tests, and how to find them.

    Raises:
        StrataError: the files or data of a test that holds something out cannot be had.
    """
    gathered = _Gathered()
    others: list[range] = []
    missing = set()
    for number, test in enumerate(tests):
        start = gathered.num_others
        try:
            for role, table in texts(test):
                if role in _LISTED:
                    gathered.add_listed(number, _LISTED[role], table)
                else:
                    gathered.add_others(table)
        except UnavailableError as error:
            if test.hold_out != "none":
                raise
            print(f"contamination: {test.name} is not looked for: {error}")
            missing.add(number)
        others.append(range(start, gathered.num_others))
    return Wanted(tests, gathered.index(), gathered.listed(), others, frozenset(missing))


class _Gathered:
    """Keys and numbers of texts, as they come."""

    def __init__(self) -> None:
        self.num_others = self._num_listed = 0
        self._listed: list[pa.Table] = []
        self._ids: list[tuple[np.ndarray, np.ndarray]] = []
        self._other_ids: list[tuple[np.ndarray, np.ndarray]] = []
        self._runs: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {n: [] for n in _LENGTHS}

    def add_listed(self, test: int, name: str, table: pa.Table) -> None:
        """Texts to be told of one by one."""
        found, rows = forms(table)
        numbers = rows.to_numpy() + self._num_listed
        self._ids.append((text_ids(found), numbers))
        cut = words(found)
        num_words = np.bincount(cut.rows, minlength=len(found))
        for length, hashes, starts in cut.runs(_LENGTHS):
            form = cut.rows[starts]
            mine = np.clip(num_words[form], MIN_WORDS, MAX_WORDS) == length
            self._runs[length].append((hashes[mine], numbers[form[mine]]))
        columns = [
            np.full(table.num_rows, test),
            pa.array([name] * table.num_rows, pa.string()),
            whole(table),
            num_words[: table.num_rows] < MIN_WORDS,
        ]
        self._listed.append(pa.Table.from_arrays(columns, schema=_NAMED))
        self._num_listed += table.num_rows

    def add_others(self, table: pa.Table) -> None:
        """Texts to be counted only."""
        found, rows = forms(table)
        self._other_ids.append((text_ids(found), rows.to_numpy() + self.num_others))
        self.num_others += table.num_rows

    def listed(self) -> pa.Table:
        return pa.concat_tables([_NAMED.empty_table(), *self._listed])

    def index(self) -> Index:
        runs = {length: _lookup(found) for length, found in self._runs.items()}
        return Index(_lookup(self._ids), runs, _lookup(self._other_ids))


def _lookup(found: Sequence[tuple[np.ndarray, np.ndarray]]) -> Lookup:
    keys = [np.empty(0, np.uint64), *(keys for keys, _ in found)]
    numbers = [np.empty(0, np.int64), *(numbers for _, numbers in found)]
    return Lookup(np.concatenate(keys), np.concatenate(numbers))


class _Worker:
    def __init__(self, draft: Draft, shared: ray.ObjectRef) -> None:
        self._draft = draft
        self._index: Index
        self._sources: Sequence[Source]
        self._index, self._sources = ray.get(shared)

    def __call__(self, work: tuple[int, int, list[Slice]]) -> Receipt:
        source, number, pieces = work
        tables = [_trained_on(self._sources[source], piece) for piece in pieces]
        table = pa.concat_tables(tables).combine_chunks()
        found = [self._exact(table, side) for side in ("query", "passage")]
        found += [
            self._near(table, first, side)
            for first in range(0, table.num_rows, _BATCH_ROWS)
            for side in ("query", "passage")
        ]
        ids = [table[f"{side}_id"].to_numpy() for side in ("query", "passage")]
        others = np.unique(np.concatenate([self._index.other_ids.first(each)[0] for each in ids]))
        part_id = f"{source:04d}-{number:06d}"
        parts = [
            self._draft.write("found", part_id, _FOUND, [_first(pa.concat_tables(found))]),
            self._draft.write("others", part_id, _OTHERS, [pa.table({"number": others})]),
        ]
        num_rows = sum(piece.num_rows for piece in pieces)
        return Receipt(parts, num_rows, stats={"num_rows": table.num_rows})

    def _exact(self, table: pa.Table, side: str) -> pa.Table:
        numbers, rows = self._index.ids.first(table[f"{side}_id"].to_numpy())
        return _found(table, side, "exact", numbers, rows, pa.nulls(len(rows), pa.string()))

    def _near(self, table: pa.Table, first: int, side: str) -> pa.Table:
        """What rows from `first` on nearly hold."""
        cut = words(table[side].slice(first, _BATCH_ROWS).combine_chunks())
        numbers, rows, runs = [], [], []
        for length, hashes, starts in cut.runs(_LENGTHS):
            texts, at = self._index.runs[length].first(hashes)
            numbers.append(texts)
            rows.append(first + cut.rows[starts[at]])
            runs += [cut.run(start, length) for start in starts[at].tolist()]
        return _found(
            table,
            side,
            "near",
            np.concatenate(numbers),
            np.concatenate(rows),
            pa.array(runs, pa.string()),
        )


def _found(
    table: pa.Table, side: str, match: str, numbers: np.ndarray, rows: np.ndarray, runs: pa.Array
) -> pa.Table:
    """Of schema _FOUND: the listed texts `numbers`, found in `rows` of a table of pairs."""
    pairs = table.take(rows)
    columns = [
        numbers,
        pa.array([match] * len(rows), pa.string()),
        runs,
        pairs["source"],
        pa.array([side] * len(rows), pa.string()),
        pc.utf8_slice_codeunits(pairs[side], 0, _SHOWN_CHARS),
        pairs["file"],
        pairs["row"],
    ]
    return pa.Table.from_arrays(columns, schema=_FOUND)


def _first(found: pa.Table) -> pa.Table:
    """One row for each text, sorted by number: the first that is exact or, where none is, the
    first.
    """
    near = pc.equal(found["match"], "near")
    found = pa.concat_tables([found.filter(pc.invert(near)), found.filter(near)])
    _, first = np.unique(found["number"].to_numpy(), return_index=True)
    return found.take(first)


def _trained_on(source: Source, piece: Slice) -> pa.Table:
    """The rows of a slice that are in the shards, with the places they are from."""
    columns = ["source", "query_id", "query", "passage_id", "passage"]
    table = source.embeddings.read_slice(piece, columns)
    rows = np.arange(piece.first_row, piece.first_row + piece.num_rows)
    file = piece.part.path
    table = table.append_column("file", pa.array([file] * len(rows), pa.string()))
    table = table.append_column("row", pa.array(rows))
    return table.filter(pa.array(~np.isin(rows, source.rejected.get(file, []))))


def _gathered(
    draft: Draft, receipts: Sequence[Receipt], wanted: Wanted
) -> tuple[pa.Table, np.ndarray]:
    """What all tasks found, as `Wanted.table` takes it."""
    others = np.zeros(wanted.others[-1].stop if wanted.others else 0, bool)
    found = _FOUND.empty_table()
    for table in _parts(draft, receipts, "found"):
        found = _first(pa.concat_tables([found, table]))
    for table in _parts(draft, receipts, "others"):
        others[table["number"].to_numpy()] = True
    return found, others


def _parts(draft: Draft, receipts: Sequence[Receipt], table: str) -> Iterator[pa.Table]:
    """What tasks have written for `publish` alone; it is swept after that."""
    for part in (part for receipt in receipts for part in receipt.parts if part.table == table):
        yield pq.read_table(f"{draft.path}/{part.path}", filesystem=draft.root.fs)


def summary(counts: Sequence[Mapping[str, Any]]) -> str:
    """All tests in one sentence, given the rows of a contamination table."""
    parts = []
    for name in _LISTED.values():
        rows = [row for row in counts if row["texts"] == name and row["num_texts"] is not None]
        total, exact, near = (
            sum(row[column] for row in rows) for column in ("num_texts", "num_exact", "num_near")
        )
        parts.append(f"of {total:,} {name} {exact:,} exactly and {near:,} nearly")
    return f"Found in training: {', '.join(parts)}."


def examples(matches: pa.Table, each: int = 3) -> list[dict[str, Any]]:
    """The first matches of every test, kind of text and kind of match, of schema MATCHES."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in matches.to_pylist():
        group = found.setdefault((row["test"], row["texts"], row["match"]), [])
        if len(group) < each:
            group.append(row)
    return [row for group in found.values() for row in group]


def format_contamination(
    counts: Sequence[Mapping[str, Any]], shown: Sequence[Mapping[str, Any]] = ()
) -> str:
    """A contamination table and examples of its matches as text."""
    width = max([len("test"), *(len(row["test"]) for row in counts)])
    lines = [
        f"{'test':<{width}}  {'held out':<8}  {'texts':<15} {'number':>11} {'exactly':>11} "
        f"{'nearly':>11} {'too short':>11}"
    ]
    for row in counts:
        numbers = (row[name] for name in ("num_texts", "num_exact", "num_near", "num_short"))
        cells = " ".join(f"{'-' if n is None else f'{n:,}':>11}" for n in numbers)
        lines.append(f"{row['test']:<{width}}  {row['hold_out']:<8}  {row['texts']:<15} {cells}")
    for row in shown:
        match = f"shares {row['shared']!r} with" if row["match"] == "near" else "is the same as"
        pair = f"the {row['side']} of a pair of {row['source']}: {row['training_text']!r}"
        lines.append(f"{row['test']}, {row['texts']}: {row['text']!r}\n  {match} {pair}")
    return "\n".join(lines)
