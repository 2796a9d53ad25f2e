import json

import pytest

from clusterlib.artifact import Root
from clusterlib.errors import StrataError
from pipelines.ingest import IngestConfig, ingest
from pipelines.retrieval_tests import RetrievalTestConfig
from pipelines.sources import InputConfig


def write(path, rows):
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))


def config(*paths, **settings):
    return IngestConfig(inputs=[InputConfig(source="s", format="jsonl", path=str(path), **settings) for path in paths])


def test_rows_in_are_rows_out_and_rejects_with_reasons(ray_running, tmp_path):
    write(tmp_path / "a.jsonl", [{"query": "q1", "passage": "p1"}, b"\xff\n", {"query": "", "passage": "p"}])
    write(tmp_path / "b.jsonl", [{"query": "q2", "passage": "p2"}, {"query": "q3", "passage": "x" * 101}])
    settings = config(tmp_path / "a.jsonl", tmp_path / "b.jsonl").replace(max_chars=100)
    pairs = ingest(settings, [], Root(str(tmp_path / "root")))
    assert pairs.read()["query"].to_pylist() == ["q1", "q2"]
    assert pairs.manifest["num_rows_in"] == 5
    rejects = pairs.read("rejects").to_pylist()
    assert [(row["file"].rsplit("/", 1)[1], row["row"], row["reason"]) for row in rejects] == [
        ("a.jsonl", 2, "not UTF-8"),
        ("a.jsonl", 3, "query is empty"),
        ("b.jsonl", 2, "passage is over 100 characters"),
    ]
    assert pairs.manifest["rejects"] == {"not UTF-8": 1, "query is empty": 1, "passage is over 100 characters": 1}


def test_passages_of_a_retrieval_test_never_get_in(ray_running, tmp_path, beir_folder, pairs_file):
    corpus = [json.loads(line)["text"] for line in (beir_folder / "corpus.jsonl").read_text().splitlines()]
    write(
        tmp_path / "a.jsonl", [{"query": "q", "passage": f"  {corpus[3].upper()} "}, {"query": "q", "passage": "free"}]
    )
    test = RetrievalTestConfig(name="t", format="beir", path=str(beir_folder))
    pairs = ingest(config(tmp_path / "a.jsonl"), [test], Root(str(tmp_path / "root")))
    assert pairs.read()["passage"].to_pylist() == ["free"]
    assert pairs.manifest["rejects"] == {"passage belongs to a retrieval test": 1}


def test_a_fraction_keeps_the_same_pairs_however_files_are_cut(ray_running, tmp_path, pairs_file):
    lines = pairs_file.read_bytes().splitlines(keepends=True)
    write(tmp_path / "a.jsonl", lines[:100])
    write(tmp_path / "b.jsonl", lines[100:])
    whole = ingest(config(pairs_file, fraction=0.4), [], Root(str(tmp_path / "root")))
    parts = ingest(config(tmp_path / "a.jsonl", tmp_path / "b.jsonl", fraction=0.4), [], Root(str(tmp_path / "root")))
    assert whole.read().equals(parts.read())
    assert 40 < whole.num_rows < 90
    assert whole.manifest["rejects"] == {"not in the fraction to keep": 160 - whole.num_rows}


def test_a_finished_artifact_is_found_and_a_changed_file_makes_another(ray_running, tmp_path):
    write(tmp_path / "a.jsonl", [{"query": "q1", "passage": "p1"}])
    root = Root(str(tmp_path / "root"))
    first = ingest(config(tmp_path / "a.jsonl"), [], root)
    assert ingest(config(tmp_path / "a.jsonl"), [], root).manifest == first.manifest
    write(tmp_path / "a.jsonl", [{"query": "q1", "passage": "p1"}, {"query": "q2", "passage": "p2"}])
    assert ingest(config(tmp_path / "a.jsonl"), [], root).num_rows == 2


def test_inputs_without_a_usable_pair_are_refused(ray_running, tmp_path):
    write(tmp_path / "a.jsonl", [{"query": "", "passage": "p1"}])
    root = Root(str(tmp_path / "root"))
    with pytest.raises(StrataError, match=r"no usable pair in any input \(query is empty\)"):
        ingest(config(tmp_path / "a.jsonl"), [], root)
    assert root.artifacts() == []
