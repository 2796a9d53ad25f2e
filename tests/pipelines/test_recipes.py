"""Every packaged recipe resolves, in every arm, once its inputs are there."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import pipelines.recipes
from clusterlib.artifacts.config import read_yaml
from pipelines.cli import main

RECIPES = sorted(Path(pipelines.recipes.__file__).parent.glob("*.yaml"))


def write_input(data, config):
    """What an input or a retrieval test of a recipe reads; docstrings are those of installed
    packages.
    """
    path = data / config["path"]
    if config["format"] == "parquet":
        path.parent.mkdir(parents=True, exist_ok=True)
        names = config.get("columns", {"query": "query", "passage": "passage"})
        pq.write_table(pa.table({name: ["a text"] for name in names.values()}), path)
    elif config["format"] in ("beir", "tsv"):
        (path / "qrels").mkdir(parents=True, exist_ok=True)
        (path / "corpus.jsonl").write_text(json.dumps({"_id": "p", "text": "a passage"}) + "\n")
        (path / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "a query"}) + "\n")
        (path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\tp\t1\n")
        (path / "collection.tsv").write_text("1\ta passage\n")
        (path / "queries.train.tsv").write_text("1\ta query\n")
        (path / "qrels.train.tsv").write_text("1\t0\t1\t1\n")
    else:
        assert config["format"] == "docstrings"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_resolves_once_its_inputs_are_there(path, tmp_path):
    recipe = read_yaml(path)
    assert recipe["name"] == path.stem
    for config in [*recipe["ingest"]["inputs"], *recipe["evaluate"].get("tests", [])]:
        write_input(tmp_path / "data", config)
    words = [
        "run",
        path.stem,
        f"data={tmp_path}/data",
        "--dry-run",
        "--root",
        str(tmp_path / "root"),
    ]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    owners = {line.split()[-1] for line in result.output.splitlines() if line.startswith("to make")}
    assert set(recipe["arms"]) | set(recipe["evaluate"]["references"]) <= owners
