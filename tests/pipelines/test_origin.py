"""What identifies inputs and retrieval tests: an edit is always seen, and nothing else is."""

import json
import os
import shutil

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from clusterlib.artifacts.artifact import resolve
from pipelines.retrieval_tests import RetrievalTestConfig
from pipelines.sources import InputConfig, origin, package_content

JUDGED = "query-id\tcorpus-id\tscore\nx\ta\t1\n"
LAYOUTS = {
    "jsonl": {"in.jsonl": json.dumps({"query": "one", "passage": "two"})},
    "tsv": {
        "collection.tsv": "1\tone\n",
        "queries.train.tsv": "1\ttwo\n",
        "qrels.train.tsv": "1\t0\t1\t1\n",
    },
    "beir": {
        "corpus.jsonl": json.dumps({"_id": "a", "text": "one"}),
        "queries.jsonl": json.dumps({"_id": "x", "text": "two"}),
        "qrels/train.tsv": JUDGED,
        "qrels/test.tsv": JUDGED,
    },
    "huggingface": {"train.jsonl": json.dumps({"query": "one", "passage": "two"})},
}


def input_at(folder, format):
    return InputConfig(source="s", format=format, path=str(folder))


def as_test(folder, _):
    return RetrievalTestConfig(name="t", format="beir", path=str(folder))


CASES = [(input_at, format) for format in LAYOUTS] + [(as_test, "beir")]


@pytest.fixture
def laid_out(tmp_path):
    def write(format):
        for name, text in LAYOUTS[format].items():
            path = tmp_path / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "in"

    return write


@pytest.mark.parametrize("make, format", CASES)
def test_touched_or_copied_files_are_the_same(laid_out, tmp_path, make, format):
    folder = laid_out(format)
    before = origin(make(folder, format))
    for path in folder.rglob("*"):
        os.utime(path, (1, 1))
    assert origin(make(folder, format)) == before
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert origin(make(tmp_path / "elsewhere", format)) == before


@pytest.mark.parametrize("make, format", CASES)
def test_an_edit_of_equal_size_is_seen_though_its_time_is_put_back(laid_out, make, format):
    folder = laid_out(format)
    found = [origin(make(folder, format))]
    read = [
        name
        for name in LAYOUTS[format]
        if name != ("qrels/train.tsv" if make is as_test else "qrels/test.tsv")
    ]
    for name in read:
        path = folder / name
        stat = path.stat()
        path.write_text(path.read_text().replace("1", "3", 1) if "1" in path.read_text() else
                        path.read_text().replace("o", "0", 1))  # fmt: skip
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        found.append(origin(make(folder, format)))
        assert path.stat().st_size == stat.st_size
    assert len({json.dumps(each) for each in found}) == 1 + len(read)


def put(path, data):
    fs, inner = resolve(path)
    with fs.open_output_stream(inner) as stream:
        stream.write(data)


def test_a_file_system_without_times_is_read():
    """fsspec's own memory:// tells names and sizes alone."""
    source = InputConfig(source="s", format="jsonl", path="memory://without-times/*.jsonl")
    found = []
    for data in (b'{"query": 1}', b'{"query": 1}', b'{"query": 2}'):
        put("memory://without-times/a.jsonl", data)
        found.append(origin(source))
    assert found[0] == found[1] != found[2]


class Tagged(MemoryFileSystem):
    """A store that tells an entity tag, and must not be read."""

    protocol = "tagged"
    store = {}
    pseudo_dirs = [""]
    tag = '"1"'

    def info(self, path, **options):
        return {**super().info(path, **options), "ETag": self.tag}

    def _open(self, path, mode="rb", **options):
        assert mode == "wb", "read"
        return super()._open(path, mode, **options)


def test_a_file_system_with_entity_tags_is_not_read(monkeypatch):
    fsspec.register_implementation("tagged", Tagged, clobber=True)
    put("tagged://in/a.jsonl", b'{"query": 1}')
    source = InputConfig(source="s", format="jsonl", path="tagged://in/*.jsonl")
    before = origin(source)
    assert origin(source) == before
    monkeypatch.setattr(Tagged, "tag", '"2"')
    assert origin(source) != before


def test_an_object_stores_entity_tag_tells_edits_within_a_second_and_nothing_else(bucket):
    """S3 tells times in whole seconds."""
    source = InputConfig(source="s", format="jsonl", path=f"{bucket}/in/*.jsonl")
    found = []
    for data in (b'{"query": 1}', b'{"query": 1}', b'{"query": 2}'):
        put(f"{bucket}/in/a.jsonl", data)
        found.append(origin(source))
    assert found[0] == found[1] != found[2]


def test_edited_docstrings_of_the_same_version_are_seen(tmp_path, monkeypatch):
    """As in a package that is installed to be worked on."""
    package = tmp_path / "worked_on"
    package.mkdir()
    (package / "__init__.py").write_text('"""One."""')
    (tmp_path / "worked_on-1.0.dist-info").mkdir()
    (tmp_path / "worked_on-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: worked-on\nVersion: 1.0\n"
    )
    (tmp_path / "worked_on-1.0.dist-info" / "top_level.txt").write_text("worked_on\n")
    monkeypatch.syspath_prepend(tmp_path)
    source = InputConfig(source="s", format="docstrings", path="worked_on")
    before = origin(source)
    assert before == origin(source) and "worked-on 1.0" in before
    package_content.cache_clear()  # another command
    assert origin(source) == before
    (package / "__init__.py").write_text('"""Two."""')
    package_content.cache_clear()
    assert origin(source) != before


def test_parquet_files_too(tmp_path):
    found = []
    for text in ("one", "one", "two"):
        pq.write_table(pa.table({"query": [text], "passage": [text]}), tmp_path / "a.parquet")
        found.append(origin(input_at(tmp_path, "parquet")))
    assert found[0] == found[1] != found[2]
