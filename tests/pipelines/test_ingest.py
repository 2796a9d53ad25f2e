import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clusterlib.artifacts.artifact import Root
from clusterlib.errors import StrataError
from pipelines.ingest import STAGE, IngestConfig, _Rejects, pairs_spec
from pipelines.sources import BATCH_ROWS, InputConfig
from pipelines.stage import find_or_make


def ingest(config, root):
    """The pairs of a config whose inputs are of one source."""
    return find_or_make(STAGE, [pairs_spec(config, config.inputs)], root)[0]


def write(path, rows):
    path.write_bytes(
        b"".join(
            row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows
        )
    )


def config(*paths, **settings):
    return IngestConfig(
        inputs=[
            InputConfig(source="s", format="jsonl", path=str(path), **settings) for path in paths
        ]
    )


def test_rows_in_are_rows_out_and_rejects_with_reasons(ray_running, tmp_path):
    write(
        tmp_path / "a.jsonl",
        [{"query": "q1", "passage": "p1"}, b"\xff\n", {"query": "", "passage": "p"}],
    )
    write(
        tmp_path / "b.jsonl",
        [{"query": "q2", "passage": "p2"}, {"query": "q3", "passage": "x" * 101}],
    )
    settings = config(tmp_path / "a.jsonl", tmp_path / "b.jsonl").replace(max_chars=100)
    pairs = ingest(settings, Root(str(tmp_path / "root")))
    assert pairs.read()["query"].to_pylist() == ["q1", "q2"]
    assert pairs.manifest["num_rows_in"] == 5
    rejects = pairs.read("rejects").to_pylist()
    assert [(row["file"].rsplit("/", 1)[1], row["row"], row["reason"]) for row in rejects] == [
        ("a.jsonl", 2, "not UTF-8"),
        ("a.jsonl", 3, "query is empty"),
        ("b.jsonl", 2, "passage is over 100 characters"),
    ]
    assert pairs.manifest["rejects"] == {
        "not UTF-8": 1,
        "query is empty": 1,
        "passage is over 100 characters": 1,
    }


def test_a_fraction_keeps_the_same_pairs_however_files_are_cut(ray_running, tmp_path, pairs_file):
    lines = pairs_file.read_bytes().splitlines(keepends=True)
    write(tmp_path / "a.jsonl", lines[:100])
    write(tmp_path / "b.jsonl", lines[100:])
    whole = ingest(config(pairs_file, fraction=0.4), Root(str(tmp_path / "root")))
    parts = ingest(
        config(tmp_path / "a.jsonl", tmp_path / "b.jsonl", fraction=0.4),
        Root(str(tmp_path / "root")),
    )
    assert whole.read().equals(parts.read())
    assert 40 < whole.num_rows < 90
    assert whole.manifest["rejects"] == {"not in the fraction to keep": 160 - whole.num_rows}


def test_a_finished_artifact_is_found_and_a_changed_file_makes_another(ray_running, tmp_path):
    write(tmp_path / "a.jsonl", [{"query": "q1", "passage": "p1"}])
    root = Root(str(tmp_path / "root"))
    first = ingest(config(tmp_path / "a.jsonl"), root)
    assert ingest(config(tmp_path / "a.jsonl"), root).manifest == first.manifest
    write(
        tmp_path / "a.jsonl", [{"query": "q1", "passage": "p1"}, {"query": "q2", "passage": "p2"}]
    )
    assert ingest(config(tmp_path / "a.jsonl"), root).num_rows == 2


def test_inputs_without_a_usable_pair_are_refused(ray_running, tmp_path):
    write(tmp_path / "a.jsonl", [{"query": "", "passage": "p1"}])
    root = Root(str(tmp_path / "root"))
    with pytest.raises(
        StrataError, match=r"source .*: no usable pair in its inputs \(query is empty\)"
    ):
        ingest(config(tmp_path / "a.jsonl"), root)
    assert root.artifacts() == []


def line(query="q", passage="p"):
    return json.dumps({"query": query, "passage": passage}).encode() + b"\n"


@pytest.mark.parametrize(
    ("data", "num_pairs", "num_rejects"),
    {
        "as many rows as a batch": (line() * BATCH_ROWS, BATCH_ROWS, 0),
        "and one more": (line() * (BATCH_ROWS + 1), BATCH_ROWS + 1, 0),
        "as many rows as two batches, without a last line end": (
            (line() * 2 * BATCH_ROWS)[:-1],
            2 * BATCH_ROWS,
            0,
        ),
        "empty": (b"", 0, 0),
        "blank lines only": (b"\n \r\n\t\n", 0, 0),
        "a byte order mark only": (b"\xef\xbb\xbf", 0, 0),
        "a byte order mark and line ends of Windows": (
            b"\xef\xbb\xbf" + line()[:-1] + b"\r\n\r\n" + line(),
            2,
            0,
        ),
        "no row that can be read in a batch": (
            line() + b"{\n" * 2 * BATCH_ROWS + line(),
            2,
            2 * BATCH_ROWS,
        ),
        "no row that can be used": (line(" ") * (BATCH_ROWS + 1), 0, BATCH_ROWS + 1),
    }.values(),
)
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_files_of_any_number_of_rows_are_read(
    read_here, tmp_path, ending, data, num_pairs, num_rejects
):
    (tmp_path / f"a.{ending}").write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    pairs, rejects, manifest = read_here({"format": "jsonl", "path": "."}, tmp_path)
    assert (len(pairs), len(rejects)) == (num_pairs, num_rejects)
    assert manifest["num_rows_in"] == num_pairs + num_rejects


def test_files_without_a_row_are_read(read_here, tmp_path):
    schema = pa.schema([("query", pa.string()), ("passage", pa.large_string())])
    pq.write_table(schema.empty_table(), tmp_path / "no_rows.parquet")
    pq.ParquetWriter(tmp_path / "no_groups.parquet", schema).close()
    (tmp_path / "zero_bytes.jsonl.gz").touch()
    for name in ("collection", "queries.train", "qrels.train"):
        (tmp_path / f"{name}.tsv").touch()
    for settings in (
        ("parquet", "no_rows.parquet"),
        ("parquet", "no_groups.parquet"),
        ("jsonl", "."),
        ("tsv", "."),
    ):
        pairs, rejects, _ = read_here(
            dict(zip(("format", "path"), settings, strict=True)), tmp_path
        )
        assert pairs == rejects == []


def test_a_row_that_no_parser_or_column_takes_is_a_reject(read_here, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.files.MAX_LINE_BYTES", 20_000)
    write(
        tmp_path / "a.jsonl",
        [
            line(),
            b'{"query": "\\ud83d", "passage": "p"}\n',
            b'{"query": "q", "passage": ' + b"[" * 10_000 + b"\n",
            b'{"query": "q", "passage": "p", "n": ' + b"7" * 5_000 + b"}\n",
            b'{"query": "q", "passage": "a\\u0000b"}\n',
            b'{"query": "q", "passage": "a\0b"}\n',
            b'{"query": "q", "passage": "p", "topic": ["t"]}\n',
            b'{"query": "q", "passage": "p", "topic": "\\udc00"}\n',
            b'{"query": "q", "passage": "' + b"x" * 50_000 + b'"}\n',
            b'{"query": "no", "query": "q", "passage": "p", "topic": 5}\n',
            b'{"passage": "p"}',
        ],
    )
    settings = {"format": "jsonl", "path": "a.jsonl", "columns": {"topic": "topic"}}
    pairs, rejects, _ = read_here(settings, tmp_path)
    assert [(row["query"], row["passage"], row["topic"]) for row in pairs] == [
        ("q", "p", None),
        ("q", "p", "5"),
    ]
    assert {row["file"] for row in rejects} == {str(tmp_path / "a.jsonl")}
    assert sorted((row["row"], row["reason"]) for row in rejects) == [
        (2, "query holds half of a surrogate pair"),
        (3, "nested too deep"),
        (4, "holds a number of too many digits"),
        (5, "passage holds a NUL character"),
        (6, "not JSON"),
        (7, "topic is not text"),
        (8, "topic holds half of a surrogate pair"),
        (9, "line has 20000 bytes or more"),
        (11, "query is missing"),
    ]


def reasons(rejects):
    return sorted((row["file"].rsplit("/", 1)[1], row["row"], row["reason"]) for row in rejects)


def test_bad_rows_of_a_tsv_join_are_rejects_of_their_own_file(read_here, tmp_path):
    (tmp_path / "collection.tsv").write_bytes(b"7\tp seven\n\xff\t?\nno tab\n\n8\t\n")
    (tmp_path / "queries.train.tsv").write_bytes(b"\xef\xbb\xbf1\tq one\nbare\n2\tq\xfe\n")
    (tmp_path / "qrels.train.tsv").write_bytes(
        b"1\t0\t7\t1\n1\t0\t7\tmany\n1 1\n2\t0\t7\t1\n1\t0\t8\t1\n\xff\n \xe2\x80\x83\n"
    )
    pairs, rejects, manifest = read_here({"format": "tsv", "path": "."}, tmp_path)
    assert [(row["query"], row["passage"]) for row in pairs] == [("q one", "p seven")]
    no_judgement = "not a judgement: a query, a passage and a whole number"
    assert reasons(rejects) == [
        ("collection.tsv", 2, "not UTF-8"),
        ("collection.tsv", 3, "not an id, a tab and a text"),
        ("qrels.train.tsv", 2, no_judgement),
        ("qrels.train.tsv", 3, no_judgement),
        ("qrels.train.tsv", 4, "names a query that is not among the queries"),
        ("qrels.train.tsv", 5, "passage is empty"),
        ("qrels.train.tsv", 6, "not UTF-8"),
        ("qrels.train.tsv", 7, no_judgement),
        ("queries.train.tsv", 2, "not an id, a tab and a text"),
        ("queries.train.tsv", 3, "not UTF-8"),
    ]
    assert (
        manifest["num_rows_in"] == 7 + 4
    )  # judgements, and lines of the other files that cannot be read


def test_bad_rows_of_a_beir_folder_are_rejects_of_their_own_file(read_here, tmp_path):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_bytes(
        b'{"_id": 7, "text": "p"}\n{"_id": "8"}\n{"text": "t"}\n{\n{"_id": true, "text": "t"}\n'
        b'{"_id": "9", "title": 3, "text": "t"}\n{"_id": "9", "text": "\\ud800"}\n'
    )
    (tmp_path / "queries.jsonl").write_bytes(b'{"_id": "1", "text": "q"}\n[]\n')
    (tmp_path / "qrels" / "train.tsv").write_text("1\t7\t1\n1\t7\t-\n")  # without BEIR's header
    pairs, rejects, _ = read_here({"format": "beir", "path": "."}, tmp_path)
    assert [(row["query"], row["passage"]) for row in pairs] == [("q", "p")]
    assert reasons(rejects) == [
        ("corpus.jsonl", 2, "text is missing"),
        ("corpus.jsonl", 3, "_id is missing"),
        ("corpus.jsonl", 4, "not JSON"),
        ("corpus.jsonl", 5, "_id is not text"),
        ("corpus.jsonl", 6, "title is not text"),
        ("corpus.jsonl", 7, "text holds half of a surrogate pair"),
        ("queries.jsonl", 2, "not a JSON object"),
        ("train.tsv", 2, "not a judgement: a query, a passage and a whole number"),
    ]


def test_bad_rows_of_beir_tables_are_rejects_of_their_own_file(read_here, tmp_path):
    binary = pa.array([b"p", b"\xff", None], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, binary.buffers())
    pq.write_table(pa.table({"_id": [1, 2, 3], "text": text}), tmp_path / "corpus.parquet")
    pq.write_table(pa.table({"_id": ["x", None], "text": ["q", "r"]}), tmp_path / "queries.parquet")
    columns = {"query-id": ["x"] * 3, "corpus-id": [1, None, 1], "score": [1.0, 1.0, float("nan")]}
    pq.write_table(pa.table(columns), tmp_path / "qrels.parquet")
    pairs, rejects, _ = read_here({"format": "beir", "path": "."}, tmp_path)
    assert [(row["query"], row["passage"]) for row in pairs] == [("q", "p")]
    assert reasons(rejects) == [
        ("corpus.parquet", 1, "not UTF-8"),
        ("corpus.parquet", 2, "text is missing"),
        ("qrels.parquet", 1, "corpus-id is missing"),
        ("qrels.parquet", 2, "score is not a number"),
        ("queries.parquet", 1, "_id is missing"),
    ]


def test_any_number_of_rejects_is_written_in_row_groups(read_here, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.ingest._REJECTS_ROWS", 100)
    held, spill = [], _Rejects._spill
    monkeypatch.setattr(
        _Rejects, "_spill", lambda self: (held.append(len(self._held)), spill(self))
    )
    write(tmp_path / "a.jsonl", [line("" if number % 3 else "q") for number in range(1000)])
    _, rejects, manifest = read_here({"format": "jsonl", "path": "a.jsonl"}, tmp_path)
    assert max(held) == 100
    assert [row["row"] for row in rejects] == [number + 1 for number in range(1000) if number % 3]
    assert manifest["rejects"] == {"query is empty": 666}


def test_a_fraction_smaller_than_an_id_can_tell_keeps_nothing(read_here, tmp_path, pairs_file):
    pairs, _, manifest = read_here(
        {"format": "jsonl", "path": str(pairs_file), "fraction": 1e-20}, tmp_path
    )
    assert pairs == [] and manifest["rejects"] == {"not in the fraction to keep": 160}
