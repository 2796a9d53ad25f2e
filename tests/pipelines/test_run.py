"""The whole job, through the command line: to the end, again, and killed midway."""

import dataclasses
import doctest
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from clusterlib.artifacts.artifact import Root
from clusterlib.batches.plan import Plan
from clusterlib.clusters.shards import Shards, read_range
from clusterlib.errors import StrataError
from pipelines import report
from pipelines.cli import main
from pipelines.evaluate import mean_score
from pipelines.recipe import load_recipe
from pipelines.run import Run
from pipelines.stage import find_or_make


def digests(root):
    """What must be equal however often a run was killed: all content but the clock's."""
    found = {}
    for artifact in root.artifacts():
        if artifact.kind == "model":
            found[artifact.name] = [
                part.sha256 for table in ("export", "tests") for part in artifact.parts(table)
            ]
        elif artifact.kind != "report":
            found[artifact.name] = [part.sha256 for part in artifact.parts()]
    return found


def start(recipe, root, *overrides):
    """The command in a process and a Ray of its own."""
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "pipelines.cli",
            "run",
            str(recipe),
            *overrides,
            "--root",
            str(root),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def finished(recipe, ray_running, tmp_path_factory):
    """(root, output, digests) of an undisturbed run, before any test adds to its root."""
    root = tmp_path_factory.mktemp("finished")
    result = CliRunner().invoke(main, ["run", str(recipe), "--root", str(root)])
    assert result.exit_code == 0, result.output
    return Root(str(root)), result.stdout, digests(Root(str(root)))


def test_the_run_makes_every_artifact_and_prints_the_scores(finished):
    root, output, _ = finished
    counts = {}
    for artifact in root.artifacts():
        artifact.verify()
        counts[artifact.kind] = counts.get(artifact.kind, 0) + 1
    assert counts == {
        "pairs": 1,
        "embeddings": 1,
        "centroids": 1,
        "shards": 1,
        "contamination": 1,
        "model": 2,
        "scores": 3,
        "report": 1,
    }
    for word in (
        "NDCG@10",
        "recall@100",
        "MRR@10",
        "random",
        "cluster - random",
        "teacher",
        "report-",
    ):
        assert word in output


def test_the_same_command_again_does_nothing(finished, recipe):
    root, output, _ = finished
    before = {
        path: path.stat().st_mtime_ns for path in Path(root.path).rglob("*") if path.is_file()
    }
    result = CliRunner().invoke(main, ["run", str(recipe), "--root", root.uri])
    assert result.exit_code == 0
    assert {
        path: path.stat().st_mtime_ns for path in Path(root.path).rglob("*") if path.is_file()
    } == before
    assert [line for line in result.stdout.splitlines() if line.startswith("report")] == [
        line for line in output.splitlines() if line.startswith("report")
    ]


def test_models_recorded_every_step_and_no_checkpoint_is_left(finished):
    root, _, _ = finished
    for model in (artifact for artifact in root.artifacts() if artifact.kind == "model"):
        steps = model.read("steps").to_pylist()
        assert [row["step"] for row in steps] == list(range(12))
        strategy = model.config["batching"]["strategy"]
        assert {row["stratum"].split("/")[0] for row in steps} == {
            "all" if strategy == "random" else "jsonl"
        }
        assert all(
            np.isfinite([row["loss"], row["gradient_norm"], row["hardness"]]).all() for row in steps
        )
        assert not Path(model.path, "checkpoints").exists()
        assert model.stats["phases"][0]["total"]["pure_fraction"] == 1.0 or strategy == "cluster"


def test_tests_in_the_loop_score_as_evaluate_does_and_the_best_is_kept(finished):
    root, _, _ = finished
    models = [artifact for artifact in root.artifacts() if artifact.kind == "model"]
    (model,) = (model for model in models if model.parts("tests"))
    rows = model.read("tests").to_pylist()
    means = {
        row["step"]: row["value"]
        for row in rows
        if (row["task"], row["metric"]) == ("mean", "ndcg_at_10")
    }
    assert list(means) == [3, 6, 9, 12]
    kept = model.stats["kept_step"]
    assert means[kept] == max(means.values())
    assert f"after step {kept}." in Path(model.folder("export"), "README.md").read_text()
    (scores,) = (
        artifact.read().to_pylist()
        for artifact in root.artifacts()
        if artifact.kind == "scores" and artifact.manifest["inputs"].get("model") == model.name
    )
    in_loop = [row for row in rows if row["step"] == kept]
    assert len(in_loop) == len(scores) == 6
    for found, row in zip(in_loop, scores, strict=True):
        assert row.pop("run") == "random" and row.pop("value") == pytest.approx(
            found.pop("value"), abs=1e-6
        )
        assert found == row


def test_tensorboard_has_every_step_and_test(finished, recipe):
    folder = load_recipe(str(recipe), {}).train.tensorboard_dir
    data = b"".join(path.read_bytes() for path in Path(folder).glob("random-*/events.*"))
    for name in (
        "train/loss",
        "train/learning_rate",
        "train/pairs_per_second",
        "test/local/ndcg_at_10",
    ):
        assert name.encode() in data
    assert b"histogram" not in data and not list(Path(folder).glob("cluster-*"))


def test_the_student_learns(finished):
    root, _, _ = finished
    for model in (artifact for artifact in root.artifacts() if artifact.kind == "model"):
        losses = model.read("steps")["loss"].to_numpy()
        assert losses[-3:].mean() < losses[:3].mean()


def test_the_export_loads_with_norm_length_and_card(finished):
    """The exported folder loads in sentence-transformers with pooling, norm and length."""
    from sentence_transformers import SentenceTransformer

    root, _, _ = finished
    model = next(artifact for artifact in root.artifacts() if artifact.kind == "model")
    student = SentenceTransformer(model.folder("export"), device="cpu")
    found = student.encode(["rose tulip", "wave"])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert student.max_seq_length == 16
    card = Path(model.folder("export"), "README.md").read_text()
    assert "arXiv 2407.18887" in card and "learning_rate: 0.001" in card


def test_inspect_shows_every_artifact_with_its_lineage(finished):
    root, _, _ = finished
    listing = CliRunner().invoke(main, ["inspect", "--root", root.uri])
    for artifact in root.artifacts():
        assert artifact.name in listing.output
        shown = CliRunner().invoke(main, ["inspect", artifact.name, "--root", root.uri, "--verify"])
        assert shown.exit_code == 0 and artifact.path in shown.output
    report = CliRunner().invoke(main, ["inspect", "report", "--root", root.uri]).output
    assert "pairs/" in report and "(gone)" not in report
    described = json.loads(
        CliRunner().invoke(main, ["inspect", "--json", "--root", root.uri]).stdout
    )
    by_name = {f"{item['kind']}/{item['fingerprint']}": item for item in described}
    assert by_name.keys() == {artifact.name for artifact in root.artifacts()}
    for artifact in root.artifacts():
        item = by_name[artifact.name]
        assert (
            item["tables"].get(artifact.kind, {"num_rows": 0})["num_rows"] == item["num_rows_out"]
        )
        assert set(item["inputs"].values()) <= {source["name"] for source in item["made_from"]}


def test_the_report_is_one_file_that_says_what_ran(finished):
    root, _, _ = finished
    report = next(artifact for artifact in root.artifacts() if artifact.kind == "report")
    html = Path(report.path, report.parts()[0].path).read_text()
    assert "<script" not in html and not re.search(r"""(src|href)=["']?http""", html)
    for artifact in root.artifacts():
        if artifact.kind != "report":
            assert artifact.name in html
    for word in (
        "what about",
        "cluster − random",
        "In-batch accuracy",
        "usable pairs",
        "max_workers",
        "tests in the loop",
        "skipped",
        "Found in training: of 24 queries 0 exactly",
        "Looked through: 160 pairs.",
    ):
        assert word in html, word


def test_arms_share_what_they_can(recipe):
    config = load_recipe(str(recipe), {})
    random, cluster = config.arm_configs().values()
    assert random.batching.strategy == "random" and cluster.batching.strategy == "cluster"
    assert random.replace(batching=cluster.batching, train=cluster.train) == cluster


def test_any_model_is_scored_on_the_recipes_tests(finished, recipe):
    root, _, _ = finished
    model = next(artifact for artifact in root.artifacts() if artifact.kind == "model")
    words = ["evaluate", str(recipe), "--model", model.folder("export"), "--root", root.uri]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    scored = [
        artifact.read().to_pylist() for artifact in root.artifacts() if artifact.kind == "scores"
    ]
    values = [rows[0]["value"] for rows in scored if rows[0]["run"] == model.folder("export")]
    arms = [rows[0]["value"] for rows in scored if rows[0]["run"] in ("random", "cluster")]
    assert len(values) == 1 and values[0] in arms
    assert f"{values[0]:.4f}" in result.stdout


@pytest.mark.timeout(600)
def test_tune_tries_every_k_on_the_same_shards(finished, recipe):
    root, _, _ = finished
    words = [
        "tune",
        str(recipe),
        "tune.space={batching.k: [1, 2, 4]}",
        "train.steps=3",
        "--root",
        root.uri,
    ]
    before = {artifact.name for artifact in root.artifacts()}
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    made = [artifact.kind for artifact in root.artifacts() if artifact.name not in before]
    assert sorted(made) == ["model"] * 3 + ["scores"] * 3
    table = re.findall(r"^ *(\d\.\d+) .*(batching\.k=\d)", result.stdout, re.MULTILINE)
    values = [float(value) for value, _ in table]
    assert sorted(trial for _, trial in table) == ["batching.k=1", "batching.k=2", "batching.k=4"]
    assert values == sorted(values, reverse=True) and all(0 <= value <= 1 for value in values)


def test_a_run_on_an_object_store_makes_the_same(finished, recipe, pairs_file, bucket):
    _, _, undisturbed = finished
    store = Root(bucket)
    with store.fs.open_output_stream(f"{store.path}/in/pairs.jsonl") as stream:
        stream.write(pairs_file.read_bytes())
    changes = [
        "arms={cluster: {}}",
        f"ingest.inputs=[{{source: jsonl, format: jsonl, path: '{bucket}/in/*.jsonl'}}]",
    ]
    process = start(recipe, f"{bucket}/runs", *changes)
    assert process.wait() == 0
    made = Root(f"{bucket}/runs")
    kinds = []
    for artifact in made.artifacts():
        artifact.verify()
        kinds.append(artifact.kind)
        # The paths of inputs are in the fingerprints, and in the model's card, but not in the
        # content.
        table = "export" if artifact.kind == "model" else artifact.kind
        digests = [
            part.sha256 for part in artifact.parts(table) if not part.path.endswith("README.md")
        ]
        assert artifact.kind == "report" or any(
            set(digests) <= set(same)
            for name, same in undisturbed.items()
            if name.startswith(f"{artifact.kind}/")
        )
    assert sorted(kinds) == sorted(
        [
            "pairs",
            "embeddings",
            "centroids",
            "shards",
            "contamination",
            "model",
            "scores",
            "scores",
            "report",
        ]
    )


@pytest.mark.timeout(900)
def test_killed_in_every_stage_it_ends_the_same(finished, recipe, tmp_path):
    """kill -9 of the driver once in each stage, then the command to its end."""
    _, _, undisturbed = finished
    root = tmp_path / "root"
    done: dict[Path, int] = {}
    for kind, sign in (
        ("pairs", "receipts/*"),
        ("embeddings", "receipts/*"),
        ("centroids", "receipts/*"),
        ("shards", "receipts/*"),
        ("contamination", "receipts/*"),
        ("model", "checkpoints/step-*"),
        ("scores", "manifest.json"),
    ):
        process = start(recipe, root)
        deadline = time.monotonic() + 240
        while not (
            list(root.glob(f"{kind}/*/{sign}")) or list(root.glob(f"{kind}/*/manifest.json"))
        ):
            assert process.poll() is None and time.monotonic() < deadline, (
                f"{kind} never came so far"
            )
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = {path: path.stat().st_mtime_ns for path in root.glob("*/*/manifest.json")}
        assert {path: now[path] for path in done} == done  # what was finished was not made again
        done = now

    result = CliRunner().invoke(main, ["run", str(recipe), "--root", str(root)])
    assert result.exit_code == 0, result.output
    assert digests(Root(str(root))) == undisturbed
    for model in root.glob("model/*"):
        steps = pq.read_table(next(model.glob("steps/*.parquet")))["step"].to_pylist()
        assert steps == list(range(12))


def test_relative_paths_are_absolute_once_the_recipe_is_loaded(
    recipe, tmp_path, monkeypatch, teacher_folder
):
    """A driver, a job and a worker have working folders of their own."""
    (tmp_path / "in").mkdir()
    (tmp_path / "model").symlink_to(teacher_folder)
    monkeypatch.chdir(tmp_path)
    config = load_recipe(
        str(recipe),
        {
            "data": "in",
            "ingest.inputs": [
                {"source": "a", "format": "jsonl", "path": "a/*.jsonl"},
                {"source": "b", "format": "tsv", "path": "s3://bucket/b"},
                {"source": "c", "format": "docstrings", "path": "numpy"},
                {"source": "d", "format": "huggingface", "path": "owner/data"},
            ],
            "evaluate.tests.0.path": "test",
            "embed.teacher.name": "model",
            "arms": {"other": {"embed.teacher.name": "./model"}},
        },
    )
    assert config.data == str(tmp_path / "in")
    paths = [item.path for item in config.ingest.inputs]
    assert paths == [str(tmp_path / "in/a/*.jsonl"), "s3://bucket/b", "numpy", "owner/data"]
    assert config.evaluate.tests[0].path == str(tmp_path / "in/test")
    assert (
        config.embed.teacher.name
        == config.arm_configs()["other"].embed.teacher.name
        == str(tmp_path / "model")
    )


def test_the_same_files_in_another_folder_are_the_same_pairs(recipe, tmp_path, pairs_file):
    names = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        shutil.copy(pairs_file, tmp_path / place / "pairs.jsonl")  # at another time
        config = load_recipe(
            str(recipe), {"data": str(tmp_path / place), "ingest.inputs.0.path": "pairs.jsonl"}
        )
        names.append([spec.name for spec in Run(config, Root("nowhere")).specs("pairs")])
    assert names[0] == names[1]


def test_a_test_more_makes_its_shards_and_no_vector_and_shows_what_is_contaminated(
    finished, recipe, tmp_path, pairs_file
):
    """A test whose texts are trained on: what it holds out, and what is found where it does not."""
    root, _, _ = finished
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()[:9]]
    (tmp_path / "qrels").mkdir()
    for name, side in (("corpus", "passage"), ("queries", "query")):
        lines = [json.dumps({"_id": f"{n}", "text": row[side]}) for n, row in enumerate(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    judged = "".join(f"{n}\t{n}\t1\n" for n in range(3))
    (tmp_path / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    stages = ("ingest", "embed", "cluster", "shard", "contamination")

    def run(policy, *stages):
        test = f"{{name: known, format: beir, path: {tmp_path}, hold_out: {policy}}}"
        local = load_recipe(str(recipe), {}).evaluate.tests[0].path
        tests = f"evaluate.tests=[{{name: local, format: beir, path: {local}}}, {test}]"
        before = {artifact.name for artifact in root.artifacts()}
        output = ""
        for stage in stages:
            words = [stage, str(recipe), tests, "--root", root.uri]
            result = CliRunner().invoke(main, words)
            assert result.exit_code == 0, result.output
            output += result.stdout
        made = [artifact for artifact in root.artifacts() if artifact.name not in before]
        return {artifact.kind: artifact for artifact in made}, output

    for policy, num_held_out in (("corpus", 9), ("judged", 3)):
        made, output = run(policy, *stages)
        assert set(made) == {"shards", "contamination"}
        assert sum(made["shards"].manifest["rejects"].values()) == num_held_out
        assert made["shards"].manifest["num_rows_in"] == 160
        assert re.search(rf"known +{policy} +queries +3 +0 ", output), output
    made, output = run("none", *stages)
    assert set(made) == {"contamination"}  # the shards are those of the recipe without it
    assert re.search(r"known +none +queries +3 +3 ", output)
    assert re.search(r"known +none +all passages +9 +9 ", output)
    shown = CliRunner().invoke(main, ["inspect", made["contamination"].name, "--root", root.uri])
    assert re.search(r"known +none +judged passages +3 +3 ", shown.output)
    assert f"known, queries: {rows[0]['query']!r}\n  is the same as the query" in shown.output

    (spec,) = Run(load_recipe(str(recipe), {}), root).specs("report")
    tests = [
        load_recipe(str(recipe), {}).evaluate.tests[0].model_dump(),
        {"name": "known", "format": "beir", "path": str(tmp_path), "hold_out": "none"},
    ]
    (table,) = Run(load_recipe(str(recipe), {"evaluate.tests": tests}), root).specs("contamination")
    assert table.name == made["contamination"].name
    spec = dataclasses.replace(spec, inputs={**spec.inputs, "contamination.cluster": table})
    (told,) = find_or_make(report.STAGE, [spec], root)
    html = " ".join(Path(told.path, told.parts()[0].path).read_text().split())
    assert "<h3>random</h3>" in html and "<h3>cluster</h3>" in html
    assert "of 27 queries 3 exactly and 0 nearly" in html
    assert '<td>known</td><td class="text">none</td><td class="text">judged passages</td>' in html
    assert rows[0]["passage"] in html


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"evaluate.tests.0.name": "renamed"}, set()),
        ({"evaluate.tests.0.hold_out": "judged"}, {"shards"}),
        ({"evaluate.tests.0.hold_out": "none"}, {"shards"}),
        ({"evaluate.tasks": ["MSMARCO"]}, {"shards"}),
        ({"evaluate.tasks": [{"name": "MSMARCO", "hold_out": "none"}]}, set()),
    ],
    ids=str,
)
def test_a_test_shapes_no_data_before_the_shards_and_these_by_what_it_holds_out(
    recipe, change, changed
):
    alone = {"arms": {}, "evaluate.references": {}}
    before, after = (
        Run(load_recipe(str(recipe), {**alone, **changes}), Root("nowhere"))
        for changes in ({}, change)
    )
    kinds = ("pairs", "embeddings", "centroids", "shards", "model")
    same = {
        kind
        for kind in kinds
        if [spec.name for spec in before.specs(kind)] == [spec.name for spec in after.specs(kind)]
    }
    assert set(kinds) - same == (changed | {"model"} if changed else set())


def test_hub_models_of_every_arm_are_pinned_to_their_own_commit(recipe, tmp_path, monkeypatch):
    """An arm that names another model must not ask for it at the commit of the recipe's."""
    commits = {"owner/one": "1" * 40, "owner/two": "2" * 40, "owner/three": "3" * 40}
    monkeypatch.setattr("clusterlib.artifacts.hub.commit", lambda name, revision: commits[name])
    bm25 = {"name": "mteb/baseline-bm25s"}
    config = load_recipe(
        str(recipe),
        {
            "embed.teacher": {"name": "owner/one"},
            "shard.tokenizer": {"name": "owner/three"},
            "arms": {"same": {}, "other": {"embed.teacher.name": "owner/two"}},
            "evaluate.references": {"bm25": bm25, "teacher": {"name": "owner/one"}},
        },
    )
    run = Run(config, Root(str(tmp_path)))
    pinned = {
        name: arm.specs("embeddings")["jsonl"].config["embed"].teacher
        for name, arm in run.arms.items()
    }
    assert {arm: (ref.name, ref.revision) for arm, ref in pinned.items()} == {
        "same": ("owner/one", "1" * 40),
        "other": ("owner/two", "2" * 40),
    }
    shards = run.arms["same"].specs("shards")["jsonl"]
    assert shards.config["shard"].tokenizer.revision == "3" * 40
    assert run.config.evaluate.references["teacher"].revision == "1" * 40
    assert run.config.evaluate.references["bm25"].revision is None
    names = {spec.name for spec in run.all_specs()}
    commits["owner/one"] = "4" * 40  # it moves on, and the next run sees it
    later = Run(config, Root(str(tmp_path))).arms
    embeddings = {name: arm.specs("embeddings")["jsonl"].name for name, arm in later.items()}
    assert embeddings["other"] in names and embeddings["same"] not in names


def test_arms_that_differ_in_what_they_do_not_use_are_one_model(recipe):
    arms = {
        "one": {"batching.strategy": "random"},
        "two": {"batching.strategy": "random", "batching.k": 4},
        "three": {},
    }
    run = Run(load_recipe(str(recipe), {"arms": arms}), Root("nowhere"))
    names = [spec.name for arm in run.arms.values() for spec in arm.specs("model").values()]
    assert names[0] == names[1] != names[2]


@pytest.fixture
def with_sources(recipe, pairs_file, tmp_path):
    """The recipe with a source of each letter, each with 160 pairs of its own."""
    records = [json.loads(line) for line in pairs_file.read_text().splitlines()]

    def load(names, **changes):
        inputs = []
        for name in names:
            path = tmp_path / f"{name}.jsonl"
            own = [{side: f"{text} {name}" for side, text in pair.items()} for pair in records]
            path.write_text("\n".join(map(json.dumps, own)))
            inputs.append({"source": name, "format": "jsonl", "path": str(path)})
        settings = {"ingest.inputs": inputs, "arms": {}, **changes}
        return load_recipe(str(recipe), settings)

    return load


def shard_all(config, root):
    run = Run(config, Root(str(root)))
    for stage in ("ingest", "embed", "cluster", "shard"):
        run.make(stage)
    return run


def test_another_source_makes_its_own_artifacts_alone_and_ends_as_a_fresh_run(
    with_sources, ray_running, tmp_path
):
    three = shard_all(with_sources("abc"), tmp_path / "grown")
    before = digests(three.root)
    four = with_sources("abcd")
    grown = shard_all(four, tmp_path / "grown")
    added = [artifact for artifact in grown.root.artifacts() if artifact.name not in before]
    assert [(artifact.kind, artifact.label) for artifact in added] == [
        (kind, "d") for kind in ("pairs", "embeddings", "centroids", "shards")
    ]
    fresh = shard_all(four, tmp_path / "fresh")
    assert digests(grown.root) == digests(fresh.root)
    assert [spec.name for spec in grown.all_specs()] == [spec.name for spec in fresh.all_specs()]
    batches = [batches_of(run) for run in (grown, fresh)]
    for one, other in zip(*batches, strict=True):
        np.testing.assert_array_equal(one, other)


def batches_of(run):
    (arm,) = run.arms.values()
    shards = Shards([run.root.open(spec) for spec in arm.specs("shards").values()])
    plan = Plan(shards.index, arm.config.batching)
    return [plan.step(step, 12).rows for step in range(12)]


def test_settings_of_a_source_change_that_source_alone(with_sources):
    def names(**changes):
        run = Run(with_sources("ab", **changes), Root("nowhere"))
        (arm,) = run.arms.values()
        return {
            (kind, source): spec.name
            for kind in ("pairs", "embeddings", "centroids", "shards")
            for source, spec in arm.specs(kind).items()
        }

    plain = names()
    for setting, value, first in (
        ("embed.query_prompt", "ask: ", 1),
        ("cluster.num_leaves", 1, 2),
        ("shard.passage_max_tokens", 9, 3),
    ):
        changed = {
            key
            for key, name in names(sources={"b": {setting: value}}).items()
            if name != plain[key]
        }
        kinds = ("pairs", "embeddings", "centroids", "shards")[first:]
        assert changed == {(kind, "b") for kind in kinds}
    weighted = names(**{"batching.source_weights": {"a": 2}})
    assert weighted == plain


@pytest.mark.parametrize(
    "sources, message",
    [
        ({"b": {"embed.teacher": {"name": "x"}}}, "b: embed.teacher cannot differ by source"),
        ({"b": {"train.steps": 2}}, "b: train.steps cannot differ by source"),
        ({"z": {"cluster.num_leaves": 1}}, "sources.z: no input is of that source; there are a, b"),
        ({"b": {"cluster.leaves": 1}}, "cluster.leaves: unknown setting"),
    ],
)
def test_settings_that_cannot_differ_by_source_are_refused(with_sources, sources, message):
    with pytest.raises(StrataError, match=re.escape(message)):
        with_sources("ab", sources=sources)


def substituted(text, recipe, root):
    """An example of a document, on the tests' recipe and its finished run."""
    for said, here in (
        ('"demo"', repr(str(recipe))),
        ('"runs"', repr(root.uri)),
        ('"numpy"', '"jsonl"'),
        ('"train.steps": 400', '"train.steps": 12'),
    ):
        text = text.replace(said, here)
    return text


def test_the_example_of_a_run_in_python_runs(finished, recipe):
    root, _, _ = finished
    before = {artifact.name for artifact in root.artifacts()}
    names = {"Run": Run}
    examples = doctest.DocTestParser().get_examples(Run.__doc__)
    exec(substituted("".join(example.source for example in examples), recipe, root), names)
    assert {artifact.name for artifact in root.artifacts()} == before  # all was found
    assert list(names["numpy"].columns[:2]) == ["pair_id", "source"]
    assert len(names["labels"]) == 12 and set(names["labels"]) <= {
        "jsonl/0",
        "jsonl/1",
        "jsonl/mixed",
    }
    assert names["first"].column_names == ["source", "query", "passage"]
    assert len(names["losses"]) == 12
    frame = names["ndcg"]
    assert list(frame.index) == ["teacher", "random", "cluster"]
    scores = names["run"].scores()["cluster"]
    assert frame.loc["cluster"][("mean", "")] == mean_score(scores, "ndcg_at_10")


def test_the_readmes_python_runs(finished, recipe):
    root, _, _ = finished
    (code,) = re.findall(
        r"^```python\n(.*?)^```",
        Path(__file__).parents[2].joinpath("README.md").read_text(),
        re.M | re.S,
    )
    exec(substituted(code, recipe, root), {})


def test_texts_are_those_of_the_batchs_rows(recipe, pairs_file, ray_running, tmp_path):
    half = {"source": "half", "format": "jsonl", "path": str(pairs_file), "fraction": 0.5}
    run = Run.open(
        str(recipe),
        {"ingest.inputs": [{**half, "source": "all", "fraction": 1}, half]},
        root=str(tmp_path),
    )
    assert [artifact.label for artifact in run.run_to("shard")] == ["all", "half"]
    arm = run.arms["random"]
    pairs = {
        (row["source"], row["pair_id"]): row
        for table in arm.tables("pairs").values()
        for row in table.to_pylist()
    }
    every = read_range(arm.shards, 0, arm.plan.num_rows, ["source", "pair_id"]).to_pylist()
    batch = next(arm.batches())
    wanted = [pairs[every[row]["source"], every[row]["pair_id"]] for row in batch.rows]
    assert {row["source"] for row in wanted} == {"all", "half"}
    assert arm.texts(batch).to_pylist() == [
        {name: row[name] for name in ("source", "query", "passage")} for row in wanted
    ]


def test_what_is_not_there_is_said(recipe, tmp_path):
    run = Run.open(str(recipe), root=str(tmp_path))
    arm = run.arms["cluster"]
    for call, said in (
        (lambda: run.run_to("fly"), "no such stage; there are ingest"),
        (lambda: arm.tables("words"), "no such kind; there are pairs"),
        (lambda: run.score_frame("f1"), "no such metric; there are ndcg_at_10"),
        (lambda: arm.tables("shards"), "no finished shards of jsonl"),
        (lambda: next(arm.batches()), "no finished shards of jsonl"),
    ):
        with pytest.raises(StrataError, match=said):
            call()


def test_mined_batches_are_not_told_before_they_are_mined(recipe, chain, tmp_path):
    changes = {
        "arms": {},
        "batching.strategy": "neighbors",
        "batching.neighbors.per_seed": 1,
        "shard.teacher_vectors": True,
    }
    arm = Run.open(str(recipe), changes, root=str(tmp_path)).arms["tiny"]
    arm.shards = Shards(list(chain.shards.values()))
    with pytest.raises(StrataError, match="tiny: step 0 has mined neighbors"):
        next(arm.batches())
