"""Item 15: what no recipe at hand needs is shown, and deleted when asked; nothing else is."""

import os
import re
import time
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner

from clusterlib.artifacts.artifact import Root, Spec
from clusterlib.artifacts.draft import Draft, Receipt
from pipelines.clean import survey
from pipelines.cli import main
from pipelines.recipe import load_recipe
from pipelines.run import Run

SCHEMA = pa.schema([("x", pa.int64())])


def write(draft):
    part = draft.write("things", "0", SCHEMA, [pa.table({"x": [1, 2]}, schema=SCHEMA)])
    draft.commit("0", Receipt([part], 2))
    return Receipt([part])


def model_of(arm):
    (model,) = arm.specs("model").values()
    return model


def age(folder):
    """Make everything there two hours old."""
    then = time.time() - 7200
    for path in [folder, *Path(folder).rglob("*")]:
        os.utime(path, (then, then))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Nobody's own caches."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def place(recipe, tmp_path):
    """(root, the run of a recipe whose artifacts are there but for the model of one arm, cache)."""
    cache = tmp_path / "cache"
    changes = {"train.cache_dir": str(cache), "tune.space": {"batching.k": [1, 2]}}
    path = tmp_path / "recipe.yaml"
    path.write_text(Path(recipe).read_text())
    root = Root(str(tmp_path / "root"))
    run = Run(load_recipe(str(path), changes), root)
    for spec in run.all_specs():
        if spec.name != model_of(run.arms["random"]).name:
            Draft(root, spec).publish([])
    write(Draft(root, model_of(run.arms["random"])))
    cache.mkdir()
    return root, run, cache


def shown(root, runs):
    return {(Path(waste.path).name, waste.reason) for waste in survey(root, runs)}


def draft_of(root, kind="things", **config):
    return Draft(root, Spec(kind, 1, config))


def test_without_a_recipe_drafts_and_files_without_a_manifest_are_shown_once_they_are_old(place):
    root, run, cache = place
    draft, finished = draft_of(root, number=1), draft_of(root, number=2)
    write(draft)
    late = write(finished)
    finished.publish([])
    write(finished)  # by a driver that was overtaken
    (cache / f"{'0' * 16}-{'1' * 16}").mkdir()
    assert not shown(root, [])  # someone may be writing all of these
    age(root.path)
    age(cache)
    model = model_of(run.arms["random"]).fingerprint
    expected = {
        (model, "a draft nobody works on"),
        (draft.spec.fingerprint, "a draft nobody works on"),
        (finished.spec.fingerprint, "files that its manifest does not name"),
    }
    assert shown(root, []) == expected
    with draft.signed_in():  # and writes no file for hours, as a fit of k-means does
        assert shown(root, []) == expected - {(draft.spec.fingerprint, "a draft nobody works on")}
    (waste,) = (waste for waste in survey(root, []) if "does not name" in waste.reason)
    waste.delete()
    assert root.find(finished.spec) is not None
    assert not Path(finished.path, late.parts[0].path).exists()


def test_with_a_recipe_other_artifacts_and_caches_are_shown_and_its_own_are_not(place):
    root, run, cache = place
    finished = draft_of(root, number=2)
    finished.publish([])
    trial = model_of(next(run._trial_arms()))
    Draft(root, trial).publish([])
    needed = f"{run.arms['random'].specs('shards')['jsonl'].fingerprint}-{'1' * 16}-teacher"
    table = f"{model_of(run.arms['random']).fingerprint}-neighbors-000000000-0123.npy"
    others = [f"{'0' * 16}-{'1' * 16}", f"{'0' * 16}-neighbors-000000003-0123.npy"]
    (cache / needed).mkdir()
    (cache / others[0]).mkdir()
    (cache / others[0] / "000000.arrow").write_text("tokens")
    for name in (table, others[1], "somebody's file"):
        (cache / name).write_text("table")
    killed = cache / ".building-abc"
    killed.mkdir()
    age(root.path)
    age(cache)
    assert shown(root, [run]) == {
        (finished.spec.fingerprint, "needed by no recipe given"),
        *((name, "cached for no recipe given") for name in others),
        (killed.name, "left by caching that was killed"),
    }
    for waste in survey(root, [run]):
        waste.delete()
    assert not survey(root, [run])
    assert {path.name for path in cache.iterdir()} == {needed, table, "somebody's file"}
    assert not Path(finished.path).exists()
    assert all(root.find(spec) for spec in run.all_specs() if "model" not in spec.kind)
    assert Draft(root, model_of(run.arms["random"])).receipts() == {"0"}


def test_other_folders_of_a_root_are_nobodys_business(tmp_path):
    for name in ("errors/a.txt", "data/pairs.jsonl", "pairs/mine/a.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    age(tmp_path)
    assert not survey(Root(str(tmp_path)), [])


def test_the_command_shows_and_deletes_when_asked(place, tmp_path):
    root, run, cache = place
    draft = draft_of(root)
    write(draft)
    age(root.path)
    words = ["clean", str(tmp_path / "recipe.yaml"), "--root", root.uri]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert re.search(rf"0\.0 MB  {draft.path}  a draft nobody works on", result.output)
    assert "MB in all" in result.output and "nothing was deleted" in result.output
    assert Path(draft.path).exists()
    result = CliRunner().invoke(main, [*words, "--delete"])
    assert result.exit_code == 0 and not Path(draft.path).exists()
    assert {spec.name for spec in run.all_specs()} >= {made.name for made in root.artifacts()}


def test_what_a_recipe_needs_must_be_known(place, tmp_path):
    root, _, _ = place
    path = tmp_path / "recipe.yaml"
    path.write_text(path.read_text().replace("pairs.jsonl", "gone.jsonl"))
    result = CliRunner().invoke(main, ["clean", str(path), "--root", root.uri, "--delete"])
    assert result.exit_code == 1 and "gone.jsonl" in result.output
    assert root.artifacts()


def test_a_root_that_is_not_there_is_not_made(tmp_path):
    result = CliRunner().invoke(main, ["clean", "--root", str(tmp_path / "root")])
    assert result.exit_code == 0 and "0.0 MB in all" in result.output
    assert not (tmp_path / "root").exists()


def test_on_an_object_store(bucket, monkeypatch):
    root = Root(f"{bucket}/root")
    draft, finished = draft_of(root, number=1), draft_of(root, number=2)
    write(draft)
    write(finished)
    finished.publish([])
    monkeypatch.setattr("pipelines.clean._IDLE_SECONDS", -60)
    (waste,) = survey(root, [])
    assert waste.path == draft.path
    waste.delete()
    assert not survey(root, []) and root.find(finished.spec) is not None
