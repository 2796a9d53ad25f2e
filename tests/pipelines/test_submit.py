from click.testing import CliRunner

from clusterlib.artifacts.artifact import Root
from pipelines.cli import main


def submit(ray_running, *words):
    address = f"http://{ray_running.dashboard_url}"
    return CliRunner().invoke(main, ["submit", *map(str, words), "--address", address])


def test_a_job_runs_the_same_command_and_returns_its_status(
    ray_running, recipe, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    result = submit(ray_running, "ingest", recipe, "ingest.max_chars=5000", "--root", "root")
    assert result.exit_code == 0, result.output
    assert (
        "ingest: " in result.output and "succeeded" in result.output
    )  # the job's log, and its end
    (pairs,) = Root(str(tmp_path / "root")).artifacts()
    assert pairs.num_rows == 160 and pairs.config["max_chars"] == 5000


def test_a_failed_job_fails_here_with_its_message(ray_running, recipe, tmp_path):
    result = submit(
        ray_running,
        "ingest",
        recipe,
        "ingest.inputs.0.path=/absent.jsonl",
        "--root",
        tmp_path / "root",
    )
    assert result.exit_code == 1
    assert "/absent.jsonl: no such file" in result.output and "failed" in result.output


def test_no_cluster_is_one_message(recipe, tmp_path):
    result = CliRunner().invoke(
        main,
        [
            "submit",
            "ingest",
            str(recipe),
            "--root",
            str(tmp_path),
            "--address",
            "http://127.0.0.1:9",
        ],
    )
    assert result.exit_code == 1
    assert "no Ray dashboard answers there" in result.stderr
