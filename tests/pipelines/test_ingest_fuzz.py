"""Whatever the files of an input hold, rows in = rows out + rejects, or one message names the file.

That rows in = rows out + rejects is checked where `read_here` publishes. Batches are made small, so
that files of few rows are at their edges.
"""

import codecs
import gzip
import json
import string
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from clusterlib.errors import StrataError

ROWS = 4  # in a batch
MAX_CHARS = 100
MAX_LINE_BYTES = 2_000

fuzzed = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    for module in ("files", "sources"):
        monkeypatch.setattr(f"pipelines.{module}.BATCH_ROWS", ROWS)
    monkeypatch.setattr("pipelines.files.MAX_LINE_BYTES", MAX_LINE_BYTES)


def told(read_here, settings, folder, *reasons):
    """(pairs, rejects, rows in), or None where one message names the file and a reason."""
    try:
        pairs, rejects, manifest = read_here(settings, folder, MAX_CHARS)
    except StrataError as error:
        assert str(folder) in str(error) and any(reason in str(error) for reason in reasons), error
        return None
    for reject in rejects:
        assert reject["file"] and reject["row"] >= 0 and reject["reason"]
    return pairs, rejects, manifest["num_rows_in"]


TEXT = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", " ", "a", "\ufeff", "\0", "\x85", "\u2028", "\ud83d", "é", "x" * 101]),
)
VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.just("ok")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
NAME = st.sampled_from(["query", "passage", "topic", "_id", "text", "title", "x"])


def as_json(value):
    return json.dumps(value).encode()


GOOD = as_json({"query": "q", "passage": "p", "_id": "1", "text": "t"})
LINE = st.one_of(
    st.just(GOOD),
    st.dictionaries(NAME, st.one_of(st.just("ok"), VALUE), max_size=7).map(as_json),
    VALUE.map(as_json),
    st.binary(max_size=20),
    st.sampled_from(
        [b"", b" ", b"\r", b"{}", b"NaN", b'"', b"[" * 1500, b"9" * 5000, b" " * 3000, b"\xff"]
    ),
    st.sampled_from(["utf-16", "utf-16-le", "utf-32", "latin-1", "utf-8-sig", "utf-7"]).map(
        lambda encoding: '{"query": "é", "passage": "p"}'.encode(encoding)
    ),
)
LINES = st.one_of(
    st.lists(LINE, max_size=3 * ROWS),
    st.sampled_from([ROWS - 1, ROWS, ROWS + 1, 2 * ROWS, 2 * ROWS + 1]).flatmap(
        lambda number: st.lists(
            st.sampled_from([GOOD, GOOD, b"{"]), min_size=number, max_size=number
        )
    ),
)


@st.composite
def files(draw, lines=LINES):
    """What a file of lines holds."""
    data = draw(st.sampled_from([b"\n", b"\n", b"\r\n", b"\r"])).join(draw(lines))
    data = draw(st.sampled_from([b"", b"", codecs.BOM_UTF8, codecs.BOM_UTF16_LE])) + data
    return data + draw(st.sampled_from([b"", b"\n", b"\n\n", b"\0"]))


def lines_that_count(data):
    """Lines that are too long or have more than white space, without the byte order mark."""
    lines = data.removeprefix(codecs.BOM_UTF8).split(b"\n")
    return [line for line in lines if line.strip() or len(line) >= MAX_LINE_BYTES]


def is_pair(line):
    """What makes a line a pair, told once more."""
    if len(line) >= MAX_LINE_BYTES:
        return False
    try:
        record = json.loads(line.decode())
        query, passage = record["query"], record["passage"]
        topic = record.get("topic")
        texts = [query, passage, *([topic] if isinstance(topic, str) else [])]
        assert topic is None or isinstance(topic, (str, int, float))
        assert all(isinstance(text, str) and text.encode() is not None for text in texts)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, AssertionError):
        return False
    return all(1 <= len(text.strip()) <= MAX_CHARS and "\0" not in text for text in texts[:2])


@fuzzed
@given(files(), st.booleans())
@example(b"", True)
@example((GOOD + b"\n") * 2 * ROWS, False)
@example(b'{"query": "q", "passage": ' + b"7" * 1900 + b"}", False)
def test_json_lines(read_here, data, compressed):
    with tempfile.TemporaryDirectory() as folder:
        name = "a.jsonl.gz" if compressed else "a.jsonl"
        Path(folder, name).write_bytes(gzip.compress(data) if compressed else data)
        config = {"format": "jsonl", "path": name, "columns": {"topic": "topic"}}
        found = told(read_here, config, folder, "no column")
    if found is not None:
        pairs, _, num_rows_in = found
        counted = lines_that_count(data)
        assert num_rows_in == len(counted)
        assert len(pairs) == sum(map(is_pair, counted))


@fuzzed
@given(files(), st.data())
def test_damaged_compressed_files(read_here, content, data):
    whole = gzip.compress(content)
    damaged = data.draw(
        st.one_of(
            st.binary(max_size=30),
            st.integers(0, len(whole)).map(lambda end: whole[:end]),
            st.binary(min_size=1, max_size=9).map(lambda more: whole + more),
            st.just(whole * 2),
            st.just(gzip.compress(whole)),
            st.tuples(st.integers(0, len(whole) - 1), st.integers(1, 255)).map(
                lambda flip: (
                    whole[: flip[0]] + bytes([whole[flip[0]] ^ flip[1]]) + whole[flip[0] + 1 :]
                )
            ),
        ),
        label="damaged",
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "a.jsonl.gz").write_bytes(damaged)
        told(read_here, {"format": "jsonl", "path": "."}, folder, "no column", "be read to its end")


ID = st.sampled_from(["1", "2", "3", "", " ", "é"])
TSV_LINE = st.one_of(
    st.tuples(ID, TEXT).map("\t".join),
    st.tuples(ID, st.sampled_from(["0", "Q0"]), ID, st.sampled_from(["1", "0", "-1", "x"])).map(
        "\t".join
    ),
    st.tuples(ID, ID, st.sampled_from(["1", "1.5", "9" * 5000, "١"])).map(" ".join),
).map(lambda line: line.encode(errors="surrogatepass"))
TSV_FILE = files(st.lists(st.one_of(TSV_LINE, TSV_LINE, TSV_LINE, LINE), max_size=3 * ROWS))
BEIR_LINE = st.fixed_dictionaries(
    {"_id": st.one_of(ID, st.integers(0, 3), VALUE), "text": TEXT}, optional={"title": VALUE}
).map(as_json)
BEIR_FILE = files(st.lists(st.one_of(BEIR_LINE, BEIR_LINE, LINE), max_size=3 * ROWS))


@fuzzed
@given(TSV_FILE, TSV_FILE, TSV_FILE)
def test_tsv_folders(read_here, collection, queries, judgements):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "collection.tsv").write_bytes(collection)
        Path(folder, "queries.train.tsv").write_bytes(queries)
        Path(folder, "qrels.train.tsv").write_bytes(judgements)
        _, rejects, num_rows_in = told(read_here, {"format": "tsv", "path": "."}, folder)
    beside = [reject for reject in rejects if "qrels" not in reject["file"]]
    assert num_rows_in == len(lines_that_count(judgements)) + len(beside)


@fuzzed
@given(BEIR_FILE, BEIR_FILE, TSV_FILE)
def test_beir_folders(read_here, corpus, queries, judgements):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "qrels").mkdir()
        Path(folder, "corpus.jsonl").write_bytes(corpus)
        Path(folder, "queries.jsonl").write_bytes(queries)
        Path(folder, "qrels", "train.tsv").write_bytes(judgements)
        _, rejects, num_rows_in = told(read_here, {"format": "beir", "path": "."}, folder)
    beside = [reject for reject in rejects if "qrels" not in reject["file"]]
    counted = len(lines_that_count(judgements))
    assert num_rows_in - len(beside) in (counted, counted - 1)  # the first may be a header


def not_all_utf8(texts):
    """A string column as some writers make it: with any bytes."""
    return pa.Array.from_buffers(pa.string(), len(texts), pa.array(texts, pa.binary()).buffers())


def columns(num_rows):
    """Strategies of columns by what they hold."""

    def of(values, kind):
        return st.lists(st.one_of(st.none(), values), min_size=num_rows, max_size=num_rows).map(
            lambda found: pa.array(found, kind)
        )

    text = st.one_of(
        st.just("ok"), st.text(max_size=8), st.sampled_from(["", " ", "\0", "x" * 101])
    )
    return st.one_of(
        of(text, pa.string()),
        of(text, pa.string()),
        of(text, pa.large_string()),
        of(text, pa.string_view()),
        of(text, pa.string()).map(lambda column: column.dictionary_encode()),
        of(st.binary(max_size=4), pa.binary()).map(lambda found: not_all_utf8(found.to_pylist())),
        of(st.binary(max_size=4), pa.binary()),
        of(st.integers(-(2**63), 2**63 - 1), pa.int64()),
        of(st.integers(0, 3), pa.uint8()),
        of(st.floats(), pa.float64()),
        of(st.booleans(), pa.bool_()),
        of(st.datetimes(), pa.timestamp("us")),
        of(st.decimals(0, 9, places=2), pa.decimal128(5, 2)),
        of(st.lists(text, max_size=2), pa.list_(pa.string())),
        of(st.fixed_dictionaries({"a": text}), pa.struct([("a", pa.string())])),
        st.just(pa.nulls(num_rows)),
    )


@st.composite
def tables(draw, names):
    num_rows = draw(st.sampled_from([0, 1, 3, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS, 2 * ROWS + 1]))
    found = draw(st.lists(st.sampled_from(names), min_size=1, max_size=4))
    found = draw(st.sampled_from([names, found]))
    return pa.Table.from_arrays([draw(columns(num_rows)) for _ in found], list(found))


PARQUET = [
    "no column",
    "columns are called",
    "neither text nor a number",
    "not a label",
    "not a whole Parquet file",
]


@fuzzed
@given(tables(["query", "passage", "topic"]), st.integers(1, 9), st.booleans())
def test_parquet_files(read_here, table, row_group_size, with_topic):
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(table, Path(folder, "a.parquet"), row_group_size=row_group_size)
        config = {"format": "parquet", "path": "a.parquet"}
        if with_topic:
            config["columns"] = {"topic": "topic"}
        found = told(read_here, config, folder, *PARQUET)
    assert found is None or found[2] == table.num_rows


@fuzzed
@given(tables(["query", "passage"]), st.data())
def test_damaged_parquet_files(read_here, table, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.parquet")
        pq.write_table(table, path, compression=data.draw(st.sampled_from(["none", "snappy"])))
        whole = path.read_bytes()
        place = data.draw(st.integers(0, len(whole)), label="place")
        path.write_bytes(
            data.draw(
                st.one_of(
                    st.just(whole[:place]),
                    st.just(whole[place:]),
                    st.binary(max_size=40),
                    st.binary(min_size=1, max_size=4).map(
                        lambda new: whole[:place] + new + whole[place + len(new) :]
                    ),
                ),
                label="damaged",
            )
        )
        told(read_here, {"format": "parquet", "path": "a.parquet"}, folder, *PARQUET)


@fuzzed
@given(
    tables(["_id", "text", "title"]),
    tables(["_id", "text"]),
    tables(["query-id", "corpus-id", "score"]),
)
def test_beir_tables(read_here, corpus, queries, judgements):
    with tempfile.TemporaryDirectory() as folder:
        for name, table in (("corpus", corpus), ("queries", queries), ("qrels", judgements)):
            pq.write_table(table, Path(folder, f"{name}.parquet"))
        told(read_here, {"format": "beir", "path": "."}, folder, *PARQUET)


SOURCE = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda text: text.encode(errors="surrogatepass")),
    st.text(string.printable, max_size=120).map(lambda text: f'"""{text}"""'.encode()),
    st.sampled_from(
        ["\\ud83d", "\\x00", ":: ", "- ", "`", "*" * 50, "(" * 80, "\n\n", "=" * 9]
    ).flatmap(
        lambda odd: st.lists(st.sampled_from([odd, "word " * 9, "\n\n", "\n"]), max_size=12).map(
            lambda parts: f'"""{"".join(parts)}"""'.encode()
        )
    ),
    st.sampled_from(["utf-16", "latin-1", "utf-8-sig"]).map(
        lambda encoding: '# coding: latin-1\n"""é\n\nwords"""'.encode(encoding)
    ),
)


@fuzzed
@given(st.lists(SOURCE, max_size=3))
def test_docstrings(read_here, monkeypatch, sources):
    with tempfile.TemporaryDirectory() as folder:
        places = [(f"m{number}", Path(folder, f"m{number}.py")) for number in range(len(sources))]
        for (_, path), source in zip(places, sources, strict=True):
            path.write_bytes(source)
        monkeypatch.setattr("pipelines.docstrings.module_files", lambda _: places)
        monkeypatch.setattr("pipelines.docstrings.HELD_OUT_PERCENT", 0)
        told(read_here, {"format": "docstrings", "path": "x"}, folder)


@settings(fuzzed, max_examples=20)
@given(
    st.one_of(
        files().map(lambda data: ("train.jsonl", data)),
        st.binary(max_size=60).map(lambda data: ("train.parquet", data)),
        files().map(lambda data: ("train.csv", data)),
        tables(["query", "passage"]).map(lambda table: ("train.parquet", table)),
    )
)
def test_data_sets(read_here, monkeypatch, file):
    name, content = file
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path(folder, "cache"))
        path = Path(folder, "set", name)
        path.parent.mkdir()
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            pq.write_table(content, path)
        config = {"format": "huggingface", "path": "set"}
        found = told(read_here, config, folder, *PARQUET, "the data set cannot be loaded")
    assert found is None or isinstance(content, bytes) or found[2] == content.num_rows
