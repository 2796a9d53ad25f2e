import contextlib
import glob
import gzip
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterlib.artifacts.config import validate
from clusterlib.artifacts.hub import commit
from clusterlib.errors import StrataError
from pipelines.files import split_pattern
from pipelines.sources import Columns, InputConfig, origin, read, splits

ROWS = [("q1", "p1", "t1"), ("q2", "p2", "t2"), ("q3", "p3", "t1")]


def rows_of(config, folder="/"):
    """(query, passage, topic) of all splits, and (row, reason) of what could not be read."""
    good, bad = [], []
    for split in splits(config.located(str(folder))):
        for table in read(split, lambda file, row, reason: bad.append((row, reason))):
            good += list(
                zip(
                    *(table[name].to_pylist() for name in ("query", "passage", "topic")),
                    strict=True,
                )
            )
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
    lines = config(
        "memory://inputs/*.jsonl",
        format="jsonl",
        columns=Columns(query="title", passage="abstract"),
    )
    assert rows_of(lines)[0] == [("q4", "p4", None)]


@pytest.mark.parametrize(("topic", "kind"), [([{"a": 1}], "list<.*"), (b"text", "binary")])
def test_a_topic_that_is_no_label_is_refused(tmp_path, topic, kind):
    pq.write_table(
        pa.table({"query": ["q"], "passage": ["p"], "topic": [topic]}), tmp_path / "a.parquet"
    )
    with pytest.raises(
        StrataError, match=rf"a\.parquet: columns\.topic: 'topic' is {kind}, not a label"
    ):
        rows_of(config("a.parquet", format="parquet", columns=Columns(topic="topic")), tmp_path)


def test_a_wrong_column_is_told_with_those_there_are(tmp_path, table):
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        StrataError,
        match=r"a\.parquet: no column 'query' for columns\.query; "
        r"the columns are abstract, title, label, x",
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
    data = gzip.compress(
        b"\n".join(json.dumps({"query": f"q{n}", "passage": f"p{n}"}).encode() for n in range(5000))
    )
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
    (tmp_path / "qrels.train.tsv").write_text(
        "1\t0\t9\t1\n2\t0\t7\t1\n1\t0\t8\t0\n5\t0\t7\t1\n2\t0\t77\t1\n"
    )
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
        rows_of(
            config("set", format="huggingface", columns=Columns(query="nope", passage="abstract")),
            tmp_path,
        )
    with pytest.raises(StrataError, match="set: the data set cannot be loaded"):
        rows_of(config("set", format="huggingface", split="nope", columns=COLUMNS), tmp_path)
    (tmp_path / "set" / "train.parquet").rename(tmp_path / "set" / "train.jsonl")
    (tmp_path / "set" / "train.jsonl").write_bytes(b"")
    with pytest.raises(StrataError, match=r"set: the data set cannot be loaded \(StopIteration"):
        rows_of(config("set", format="huggingface", columns=COLUMNS), tmp_path)


def test_a_changed_file_is_another_origin(tmp_path, table):
    pq.write_table(table, tmp_path / "a.parquet")
    source = config("a.parquet", format="parquet", columns=COLUMNS)
    before = origin(source.located(str(tmp_path)))
    assert before == origin(source.located(str(tmp_path)))
    pq.write_table(table.slice(1), tmp_path / "a.parquet")
    assert before != origin(source.located(str(tmp_path)))


def names_of(path, folder, format="jsonl"):
    return [
        split.file.removeprefix(f"{folder}/")
        for split in splits(config(path, format=format).located(str(folder)))
    ]


NAMES = st.sampled_from(["a", "b.jsonl", "a.jsonl", ".a", "a[1].jsonl", "[", "*", "?b", "1"])
PARTS = st.one_of(
    NAMES,
    NAMES.map(glob.escape),
    st.sampled_from(["*", "**", "*.jsonl", "?", "[ab]*", "[!a]*", ".*"]),
)


@settings(max_examples=300, deadline=None)
@given(
    st.sets(st.lists(NAMES, min_size=1, max_size=3).map("/".join), max_size=8),
    st.lists(PARTS, min_size=1, max_size=3).map("/".join),
)
def test_patterns_find_what_a_shell_finds(paths, pattern):
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(paths):
            with contextlib.suppress(OSError):  # a file where another path has a folder
                file = Path(folder, path)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
        expected = glob.glob(pattern, root_dir=folder, recursive=True)  # noqa: PTH207
        expected = sorted(name for name in set(expected) if Path(folder, name).is_file())
        if Path(folder, split_pattern(pattern)[0]).is_dir() and not split_pattern(pattern)[1]:
            return  # a folder is all that is below it
        if expected:
            assert names_of(pattern, folder) == expected
        else:
            with pytest.raises(StrataError, match="no such file|a pattern that no file matches"):
                names_of(pattern, folder)


def test_a_star_stays_in_its_folder_and_brackets_are_escaped(tmp_path):
    folder = tmp_path / "in [2]"  # where the recipe's paths start is no pattern
    (folder / "faq" / "old").mkdir(parents=True)
    for name in ("faq/a.jsonl", "faq/old/x.jsonl", "faq/.b.jsonl", "data[1].jsonl"):
        (folder / name).touch()
    assert names_of("faq/*.jsonl", folder) == ["faq/a.jsonl"]
    assert (
        names_of("faq/**/*.jsonl", folder)
        == names_of("faq", folder)
        == ["faq/a.jsonl", "faq/old/x.jsonl"]
    )
    assert names_of("data[[]1].jsonl", folder) == ["data[1].jsonl"]
    with pytest.raises(
        StrataError, match=r"data\[1\]\.jsonl: a pattern .* write data\[\[\]1\]\.jsonl for the file"
    ):
        names_of("data[1].jsonl", folder)
    (folder / "data1.jsonl").touch()
    assert names_of("data[1].jsonl", folder) == ["data1.jsonl"]


def test_patterns_in_uris_may_hold_question_marks(bucket, monkeypatch):
    import boto3

    for name in ("faq/a1.jsonl", "faq/a2.jsonl", "faq/old/a3.jsonl"):
        boto3.client("s3").put_object(
            Bucket="bucket", Key=name, Body=b'{"query": "q", "passage": "p"}\n'
        )
    assert names_of("s3://bucket/faq/a?.jsonl", "bucket") == ["faq/a1.jsonl", "faq/a2.jsonl"]
    assert names_of("faq/**/a[13].jsonl", "s3://bucket") == [
        "bucket/faq/a1.jsonl",
        "bucket/faq/old/a3.jsonl",
    ]
    assert rows_of(config("faq/*[2].jsonl", format="jsonl"), "s3://bucket")[0] == [("q", "p", None)]
    assert len(origin(config("s3://bucket/faq/a?.jsonl", format="jsonl"))) == 2


@pytest.mark.parametrize("format", ["parquet", "beir"])
def test_two_columns_of_one_name_are_named(tmp_path, format):
    columns = [pa.array(["a"])] * 4
    pq.write_table(
        pa.Table.from_arrays(columns, ["query", "passage", "query", "x"]), tmp_path / "a.parquet"
    )
    pq.write_table(
        pa.Table.from_arrays(columns, ["_id", "text", "text", "x"]), tmp_path / "corpus.parquet"
    )
    for name in ("queries", "qrels"):
        (tmp_path / f"{name}.parquet").symlink_to("corpus.parquet")
    path, name = ("a.parquet", "query") if format == "parquet" else (".", "text")
    with pytest.raises(StrataError, match=rf"\.parquet: 2 columns are called '{name}'"):
        rows_of(config(path, format=format), tmp_path)
    assert rows_of(config("a.parquet", format="parquet", columns=Columns(query="x")), tmp_path)[
        0
    ] == [("a", "a", None)]


class Hub:
    """Stands in for the Hugging Face hub."""

    def __init__(self, commits=(), answers=True):
        self.commits, self.answers = dict(commits), answers

    def resolve_revision(self, name, *, repo_type, revision):
        from huggingface_hub.errors import RevisionResolutionError

        assert repo_type == "dataset"
        if not self.answers:
            raise RevisionResolutionError("not reached")
        return SimpleNamespace(resolved=self.commits[name, revision])


@pytest.fixture
def hub(monkeypatch):
    hub = Hub({("o/set", None): "1" * 40, ("o/set", "v2"): "2" * 40})
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    commit.cache_clear()
    yield hub
    commit.cache_clear()


def test_a_data_set_on_the_hub_is_pinned_to_a_commit(hub, tmp_path, table, monkeypatch):
    import datasets

    pq.write_table(table, tmp_path / "train.parquet")
    builder = datasets.load_dataset_builder("parquet", data_files=str(tmp_path / "train.parquet"))
    asked = []

    def load(path, subset, revision):
        asked.append((path, revision))
        builder.hash = revision
        return builder

    monkeypatch.setattr("datasets.load_dataset_builder", load)
    plain, tagged = (
        config("o/set", format="huggingface", revision=name, columns=COLUMNS).located("/")
        for name in (None, "v2")
    )
    assert [origin(plain), origin(tagged)] == ["1" * 40, "2" * 40]
    assert (
        plain.content() == tagged.content()
    )  # the commit says what it is, by whatever name it was asked for
    hub.commits["o/set", None] = "3" * 40  # a push between the fingerprint and the load
    assert rows_of(plain)[0] == ROWS and rows_of(tagged)[0] == ROWS
    assert asked == [("hf://datasets/o/set", "1" * 40), ("hf://datasets/o/set", "2" * 40)]


def test_without_the_hub_a_data_set_is_its_name_and_the_user_is_told(hub, capsys):
    hub.answers = False
    source = config("o/set", format="huggingface", revision="v2").located("/")
    assert origin(source) == origin(source) == {"revision": "v2"}
    assert (
        capsys.readouterr().err.count(
            "o/set at v2: the hub does not say which commit this dataset is at"
        )
        == 1
    )


def test_another_commit_than_the_one_in_the_fingerprint_is_not_loaded(hub, monkeypatch):
    monkeypatch.setattr(
        "datasets.load_dataset_builder", lambda *_, **__: SimpleNamespace(hash="9" * 40)
    )
    with pytest.raises(StrataError, match=f"o/set: .* cache has commit {'9' * 40}, not {'1' * 40}"):
        rows_of(config("o/set", format="huggingface"))


def test_what_is_no_data_set_is_told_apart(hub, tmp_path):
    with pytest.raises(
        StrataError, match="'s3://bucket/in' is a URI, .* read files at a URI with format parquet"
    ):
        validate(
            InputConfig,
            {"source": "s", "format": "huggingface", "path": "s3://bucket/in"},
            "x.yaml",
        )
    with pytest.raises(StrataError, match="revision 'v2' is for format huggingface, not jsonl"):
        validate(
            InputConfig, {"source": "s", "format": "jsonl", "path": "x", "revision": "v2"}, "x.yaml"
        )
    with pytest.raises(StrataError, match="absent: no such file"):
        origin(config(tmp_path / "absent", format="huggingface").located("/"))


def test_a_hub_that_knows_no_such_data_set_is_an_error(monkeypatch):
    import httpx2
    from huggingface_hub.errors import RepositoryNotFoundError

    def refuse(*_, **__):
        request = httpx2.Request("GET", "https://huggingface.co")
        raise RepositoryNotFoundError(
            "404 not found", response=httpx2.Response(404, request=request)
        )

    monkeypatch.setattr("huggingface_hub.HfApi.resolve_revision", refuse)
    with pytest.raises(
        StrataError, match="o/nope: the hub does not give this dataset .404 not found"
    ):
        origin(config("o/nope", format="huggingface").located("/"))
    monkeypatch.undo()
    with pytest.raises(
        StrataError, match=r"\./a/b: neither a local folder nor the name of a dataset"
    ):
        origin(config("./a/b", format="huggingface").located("/"))
