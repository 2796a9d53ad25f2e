"""Bad input ends in one clear message and status 1, and nothing half-written is taken for
complete.
"""

import os
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from clusterlib.artifacts.artifact import Root
from pipelines.cli import main


def strata(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def refused(result, *parts):
    """The one message of a command that ended with status 1."""
    assert result.exit_code == 1, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("strata: ")]
    assert len(errors) == 1 and "Traceback" not in result.stderr, result.stderr
    for part in parts:
        assert part in result.stderr, result.stderr
    return errors[0]


def kinds(root):
    return {artifact.kind for artifact in Root(str(root)).artifacts()}


def test_help_needs_no_heavy_import():
    code = (
        "import sys, pipelines.cli; "
        "print({'ray', 'torch', 'pyarrow', 'transformers'} & set(sys.modules))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == "set()"
    assert strata("--help").exit_code == 0 and "ingest" in strata("--help").output


def test_unknown_settings_recipes_and_artifacts(recipe, tmp_path):
    refused(
        strata("run", recipe, "cluster.kk=5", "--root", tmp_path), "cluster.kk: unknown setting"
    )
    refused(strata("run", recipe, "train.stepz=5", "--root", tmp_path), "did you mean train.steps?")
    refused(
        strata("run", recipe, "arms.cluster={batching.kk: 2}", "--root", tmp_path),
        "arms.cluster",
        "batching.k?",
    )
    refused(strata("run", "no-such", "--root", tmp_path), "no such recipe", "demo", "msmarco")
    mined = "arms.cluster={batching.strategy: neighbors}"
    refused(
        strata("run", recipe, mined, "--root", tmp_path),
        "arms.cluster",
        "set shard.teacher_vectors=true",
    )
    nothing = ["train.test_every_steps=2", "evaluate.tests=[]"]
    refused(
        strata("run", recipe, *nothing, "--root", tmp_path),
        "train.test_every_steps=2 has nothing to test on",
    )
    refused(strata("inspect", "pairs", "--root", tmp_path), "no finished artifact", "none")
    assert kinds(tmp_path) == set()


def test_a_missing_input_is_named(recipe, ray_running, tmp_path):
    result = strata("ingest", recipe, "ingest.inputs.0.path=absent.jsonl", "--root", tmp_path)
    refused(result, "absent.jsonl: no such file")
    assert kinds(tmp_path) == set()


def test_a_wrong_column_is_told_with_those_there_are(recipe, ray_running, tmp_path):
    result = strata("ingest", recipe, "ingest.inputs.0.columns.query=title", "--root", tmp_path)
    refused(result, "no column 'title' for columns.query; the columns are query, passage")
    assert kinds(tmp_path) == set()


def test_a_truncated_file_is_named(recipe, ray_running, tmp_path):
    pq.write_table(
        pa.table({"query": ["a"] * 5000, "passage": ["b"] * 5000}), tmp_path / "a.parquet"
    )
    os.truncate(tmp_path / "a.parquet", 300)
    inputs = f"ingest.inputs=[{{source: s, format: parquet, path: {tmp_path}/a.parquet}}]"
    refused(
        strata("ingest", recipe, inputs, "--root", tmp_path / "root"),
        "a.parquet: not a whole Parquet file",
    )
    assert kinds(tmp_path / "root") == set()


def test_a_model_without_weights_is_refused_before_any_work(recipe, tmp_path, tokenizer_folder):
    for setting in ("embed.teacher.name", "evaluate.references.teacher.name"):
        result = strata("run", recipe, f"{setting}={tokenizer_folder}", "--root", tmp_path / "root")
        refused(
            result,
            f"{tokenizer_folder}: no config.json or modules.json in it; it is not a complete model "
            "folder",
        )
    assert kinds(tmp_path / "root") == set()


def test_a_stage_without_its_input_says_what_to_run(recipe, ray_running, tmp_path):
    refused(
        strata("embed", recipe, "--root", tmp_path),
        "no finished pairs of jsonl there; run the stage",
    )


def test_a_root_that_cannot_be_written_is_refused(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    refused(strata("ingest", recipe, "--root", tmp_path / "file" / "root"), "cannot be written")


def test_more_leaves_than_a_source_fills_and_too_large_batches_are_refused(
    recipe, ray_running, tmp_path
):
    for stage in ("ingest", "embed"):
        assert strata(stage, recipe, "--root", tmp_path).exit_code == 0
    refused(
        strata("cluster", recipe, "cluster.num_leaves=500", "--root", tmp_path),
        "num_leaves=500",
        "160 pairs",
        "at most 16",
    )
    assert kinds(tmp_path) == {"pairs", "embeddings"}
    for stage in ("cluster", "shard"):
        assert strata(stage, recipe, "--root", tmp_path).exit_code == 0
    big = ("arms={}", "batching.global_batch_size=256")
    refused(
        strata("train", recipe, *big, "batching.leftover=drop", "--root", tmp_path),
        "no stratum fills a batch",
        "256",
    )
    refused(
        strata("train", recipe, "arms={}", "batching.k=5", "--root", tmp_path),
        "batching.k=5 is larger than the 4 leaves",
    )
    refused(
        strata("train", recipe, "arms={}", "batching.global_batch_size=15", "--root", tmp_path),
        "does not divide by train.num_workers=2",
    )
    refused(
        strata(
            "train",
            recipe,
            "train.student.architecture.max_position_embeddings=8",
            "--root",
            tmp_path,
        ),
        "at most 8 tokens",
    )
    assert kinds(tmp_path) == {"pairs", "embeddings", "centroids", "shards"}


def test_dry_run_shows_what_would_run_and_writes_nothing(recipe, tmp_path):
    result = strata("run", recipe, "--dry-run", "train.steps=7", "--root", tmp_path / "root")
    assert result.exit_code == 0, result.output
    assert "steps: 7" in result.output
    assert [
        line.split()[0] for line in result.output.splitlines() if line.startswith("to make")
    ] == ["to"] * 11
    assert not (tmp_path / "root").exists()


def test_plan_shows_what_each_arm_will_see(recipe, shards, tmp_path, monkeypatch):
    refused(
        strata("plan", recipe, "--root", tmp_path),
        "no finished shards of jsonl there; run the stage",
    )
    made, rows = shards
    monkeypatch.setattr(Root, "open", lambda *_: made)
    phases = "[{fraction: 0.5, strategy: random}, {fraction: 0.5, strategy: source}]"
    arm = f"arms={{half: {{batching.phases: {phases}}}}}"
    result = strata("plan", recipe, arm, "train.steps=21")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines() if line]
    assert lines[0][:6] == ["half:", "21", "steps", "of", "16", "pairs;"]
    sources = rows["source"].to_pylist()
    sizes = {source: sources.count(source) for source in ("a", "b")}
    whole = {source: size // 16 for source, size in sizes.items()}
    total = sum(whole.values())
    assert lines[2][:2] == ["random", "10"] and lines[2][-5:] == [
        "100.0%",
        "100.0%",
        "100.0%",
        "0",
        "0",
    ]
    assert lines[3][:5] == ["source", "11", f"{11 / total:.2f}", "all", "2"]
    for line, (source, size) in zip(lines[4:], sizes.items(), strict=True):
        covered = [
            f"{whole[source] / total:.1%}",
            f"{whole[source] * 16 / size:.1%}",
            "100.0%",
            str(size % 16),
            "0",
        ]
        assert line == [source, "1", *[f"{size / 16:.1f}"] * 3, str(whole[source]), *covered]


def test_the_papers_recipe_resolves_without_network_or_data(tmp_path):
    started = time.monotonic()
    result = strata("run", "msmarco", "--dry-run", "--root", tmp_path)
    refused(result, "msmarco: holds no collection.tsv")  # what would run cannot be told yet
    for part in (
        "snowflake-arctic-embed-m",
        "bert-base-uncased",
        "global_batch_size: 4096",
        "temperature: 0.02",
    ):
        assert part in result.stdout
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("command", [["run"], ["train"], ["evaluate"], ["run", "--dry-run"]])
def test_a_task_that_mteb_cannot_rank_texts_by_is_refused_at_the_start(recipe, tmp_path, command):
    def told(*tasks, of="evaluate.tasks"):
        return refused(strata(*command, recipe, f"{of}=[{', '.join(tasks)}]", "--root", tmp_path))

    assert "evaluate.tasks.1.name: mteb has no task 'msmarko'; did you mean MSMARCO" in told(
        "NFCorpus", "msmarko"
    )
    assert "Banking77Classification is a task of type Classification" in told(
        "Banking77Classification"
    )
    assert "is the mean of several tasks; name those of them: CQADupstackAndroidRetrieval" in told(
        "CQADupstackRetrieval"
    )
    assert "WIT" in told("WITT2IRetrieval")
    arms = "arms={one: {}, two: {evaluate.tasks: [FiQA-2018]}}"
    refused(
        strata(*command, recipe, arms, "--root", tmp_path),
        "arms.two: evaluate.tasks.0.name: mteb has no task 'FiQA-2018'; did you mean FiQA2018",
    )
    assert kinds(tmp_path) == set()


def test_tasks_of_mteb_are_taken_by_name(recipe, tmp_path):
    tasks = "evaluate.tasks=[NanoMSMARCORetrieval, MSMARCO, AskUbuntuDupQuestions]"
    assert strata("run", recipe, tasks, "--dry-run", "--root", tmp_path).exit_code == 0


def test_names_that_would_take_each_others_place_are_refused(recipe, tmp_path):
    def told(*words):
        return refused(strata("run", recipe, *words, "--dry-run", "--root", tmp_path))

    assert "arm teacher is named like evaluate.references.teacher" in told("arms.teacher={}")
    assert "arm tiny is named like" in told(
        "arms={}", "evaluate.references={tiny: {name: mteb/baseline-bm25s}}"
    )
    assert "an arm has an empty name" in told("arms={'': {}}")
    test = "{name: %s, format: docstrings, path: numpy}"
    assert "2 of tests and tasks are called local" in told(
        f"evaluate.tests=[{test % 'local'}, {test % 'local'}]"
    )
    assert "2 of tests and tasks are called MSMARCO" in told(
        f"evaluate.tests=[{test % 'MSMARCO'}]", "evaluate.tasks=[MSMARCO]"
    )
    assert "a test is called mean" in told(f"evaluate.tests=[{test % 'mean'}]")
    assert "line 1 gives 'a' a second time" in told("arms={a: {}, a: {}}")


def test_a_dry_run_that_cannot_resolve_fails(recipe, tmp_path):
    result = strata(
        "run", recipe, "ingest.inputs.0.path=absent.jsonl", "--dry-run", "--root", tmp_path
    )
    refused(result, "absent.jsonl: no such file")
    assert "absent.jsonl" in result.stdout and "to make" not in result.stdout


def test_roots_that_cannot_be_read_are_named(recipe, tmp_path):
    (tmp_path / "file").touch()
    for command in (["inspect"], ["plan", recipe], ["run", recipe, "--dry-run"]):
        refused(strata(*command, "--root", tmp_path / "file"), "file: cannot be read", "a folder")
        refused(strata(*command, "--root", "s3://"), "s3://: names no bucket")
        refused(strata(*command, "--root", "nope://x"), "nope://x: no file system for it")


SECRET = "s3://KEY:se/cret@bucket/in"


@pytest.mark.parametrize(
    "words",
    [
        [f"data={SECRET}"],
        ["data=s3://bucket/in?secret_key=se/cret"],
        [f"ingest.inputs.0.path={SECRET}"],
        [f"evaluate.tests.0.path={SECRET}"],
        [f"embed.teacher.name={SECRET}"],
        [f"train.tensorboard_dir={SECRET}"],
        [f"train.cache_dir={SECRET}"],
        [f"description=see {SECRET}"],
        [f"arms.cluster={{data: '{SECRET}'}}"],
        [f"tune.space={{data: ['{SECRET}']}}"],
        ["--root", SECRET],
        ["--root", "s3://bucket/in?access_key=KEY&secret_key=se/cret"],
    ],
)
@pytest.mark.parametrize("command", ["run", "evaluate", "plan", "submit"])
def test_credentials_in_a_uri_are_refused_and_not_shown(recipe, tmp_path, command, words):
    ends = {"run": ["--dry-run"], "evaluate": ["--model", "x"], "submit": []}.get(command, [])
    start = ["submit", "run"] if command == "submit" else [command]
    result = strata(*start, recipe, "--root", tmp_path, *words, *ends)
    refused(result, "AWS_SECRET_ACCESS_KEY", "s3://", "***", "bucket/in")
    assert "cret" not in result.output.replace("SECRET", "").replace("secret_key", "")
    assert not list(tmp_path.iterdir())


def test_credentials_of_models_roots_and_addresses_are_not_shown(recipe, tmp_path):
    for words in (
        ["evaluate", recipe, "--model", SECRET, "--root", tmp_path],
        ["inspect", "--root", SECRET],
        ["submit", "run", recipe, "--root", tmp_path, "--address", "http://u:cret@127.0.0.1:9"],
    ):
        result = strata(*words)
        assert "cret" not in refused(result, "***")


def test_unexpected_errors_are_not_dressed_up(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.recipe.load_recipe", lambda *_: 1 / 0)
    result = strata("run", recipe, "--root", tmp_path)
    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.parametrize("words", [[], ["run"], ["nonsense"], ["submit", "run"]])
def test_usage_errors_have_status_2(words):
    assert strata(*words).exit_code == 2
