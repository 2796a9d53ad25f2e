import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clusterlib.errors import StrataError
from pipelines.sources import Columns, InputConfig, origin, read, splits

ROWS = [("q1", "p1", "t1"), ("q2", "p2", "t2"), ("q3", "p3", "t1")]


def rows_of(config, folder="/"):
    """(query, passage, topic) of all splits, and (row, reason) of what could not be read."""
    good, bad = [], []
    for split in splits(config.located(str(folder))):
        for table, rejects in read(split):
            good += list(zip(*(table[name].to_pylist() for name in ("query", "passage", "topic")), strict=True))
            bad += rejects
    return good, bad


def config(path, **settings):
    return InputConfig(**{"source": "s", "path": str(path), **settings})


COLUMNS = Columns(query="title", passage="abstract", topic="label")


@pytest.fixture
def table():
    return pa.table(
        {
            "abstract": [p for _, p, _ in ROWS],
            "title": [q for q, _, _ in ROWS],
            "label": [t for *_, t in ROWS],
            "x": [1, 2, 3],
        }
    )


def test_parquet_files_folders_and_globs_with_mapped_columns(tmp_path, table):
    (tmp_path / "in").mkdir()
    pq.write_table(table.slice(0, 2), tmp_path / "in" / "a.parquet")
    pq.write_table(table.slice(2), tmp_path / "in" / "b.parquet")
    for path, count in (("in", 3), ("in/*.parquet", 3), ("in/b.parquet", 1)):
        good, bad = rows_of(config(path, format="parquet", columns=COLUMNS), tmp_path)
        assert good == ROWS[-count:] and bad == []


def test_inputs_on_another_file_system(table):
    import fsspec

    files = fsspec.filesystem("memory")
    with files.open("/inputs/a.parquet", "wb") as stream:
        pq.write_table(table, stream)
    with files.open("/inputs/b.jsonl", "wb") as stream:
        stream.write(json.dumps({"title": "q4", "abstract": "p4"}).encode())
    parquet = config("inputs", format="parquet", columns=COLUMNS)
    assert rows_of(parquet, "memory://")[0] == ROWS
    assert len(origin(parquet.located("memory://"))) == 1
    lines = config("memory://inputs/*.jsonl", format="jsonl", columns=Columns(query="title", passage="abstract"))
    assert rows_of(lines)[0] == [("q4", "p4", None)]


def test_a_topic_that_is_no_label_is_refused(tmp_path):
    pq.write_table(pa.table({"query": ["q"], "passage": ["p"], "topic": [[{"a": 1}]]}), tmp_path / "a.parquet")
    with pytest.raises(StrataError, match="columns.topic: 'topic' is list<.*not a label"):
        rows_of(config("a.parquet", format="parquet", columns=Columns(topic="topic")), tmp_path)


def test_a_wrong_column_is_told_with_those_there_are(tmp_path, table):
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        StrataError,
        match=r"a\.parquet: no column 'query' for columns\.query; the columns are abstract, title, label, x",
    ):
        rows_of(config("a.parquet", format="parquet"), tmp_path)


def test_a_truncated_parquet_file_is_named(tmp_path, table):
    pq.write_table(table, tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(StrataError, match=r"a\.parquet: not a whole Parquet file"):
        rows_of(config("a.parquet", format="parquet", columns=COLUMNS), tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines_with_bad_rows(tmp_path, name):
    lines = [
        *(json.dumps({"title": q, "abstract": p, "label": t}).encode() for q, p, t in ROWS),
        b'{"title": "\xff\xfe", "abstract": "p"}',
        b"not json",
        b"[1]",
        b"",
        b'{"title": "q"}',
        b'{"title": 5, "abstract": "p"}',
    ]
    data = b"\n".join(lines) + b"\n"
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    good, bad = rows_of(config(name, format="jsonl", columns=COLUMNS), tmp_path)
    assert good == ROWS
    assert bad == [
        (4, "not UTF-8"),
        (5, "not JSON"),
        (6, "not a JSON object"),
        (8, "passage is missing"),
        (9, "query is not text"),
    ]


def test_a_truncated_gzip_file_is_named(tmp_path):
    data = gzip.compress(b"\n".join(json.dumps({"query": f"q{n}", "passage": f"p{n}"}).encode() for n in range(5000)))
    (tmp_path / "a.jsonl.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(StrataError, match=r"a\.jsonl\.gz: cannot be read to its end"):
        rows_of(config("a.jsonl.gz", format="jsonl"), tmp_path)


@pytest.mark.parametrize("format", ["parquet", "jsonl", "tsv", "beir", "huggingface"])
def test_missing_inputs_are_named(tmp_path, format):
    with pytest.raises(StrataError, match="absent"):
        rows_of(config("absent", format=format), tmp_path)


def test_ms_marco_layout_joins_queries_and_collection(tmp_path):
    (tmp_path / "collection.tsv").write_text("7\tp seven\n8\tp eight\n9\tp nine, with\ttab\n")
    (tmp_path / "queries.train.tsv").write_text("1\tq one\n2\tq two\n")
    (tmp_path / "qrels.train.tsv").write_text("1\t0\t9\t1\n2\t0\t7\t1\n1\t0\t8\t0\n5\t0\t7\t1\n2\t0\t77\t1\n")
    good, bad = rows_of(config(".", format="tsv"), tmp_path)
    assert good == [("q two", "p seven", None), ("q one", "p nine, with\ttab", None)]
    assert sorted(bad) == [
        (3, "judged not relevant"),
        (4, "names a query that is not among the queries"),
        (5, "names a passage that is not in the collection"),
    ]


def test_beir_folders(judged_folder):
    good, bad = rows_of(config(".", format="beir"), judged_folder)
    assert good == [("q x", "T body", None), ("q x", "other", None)]
    assert [reason for _, reason in bad] == ["judged not relevant"]


def test_hugging_face_data_sets_by_local_folder(tmp_path, table):
    (tmp_path / "set").mkdir()
    pq.write_table(table, tmp_path / "set" / "train.parquet")
    good, bad = rows_of(config("set", format="huggingface", columns=COLUMNS), tmp_path)
    assert good == ROWS and bad == []
    with pytest.raises(StrataError, match="no column 'nope'"):
        rows_of(config("set", format="huggingface", columns=Columns(query="nope", passage="abstract")), tmp_path)
    with pytest.raises(StrataError, match="set: the data set cannot be loaded"):
        rows_of(config("set", format="huggingface", split="nope", columns=COLUMNS), tmp_path)


def test_a_changed_file_is_another_origin(tmp_path, table):
    pq.write_table(table, tmp_path / "a.parquet")
    source = config("a.parquet", format="parquet", columns=COLUMNS)
    before = origin(source.located(str(tmp_path)))
    assert before == origin(source.located(str(tmp_path)))
    pq.write_table(table.slice(1), tmp_path / "a.parquet")
    assert before != origin(source.located(str(tmp_path)))
