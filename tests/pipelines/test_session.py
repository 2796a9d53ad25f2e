"""A Ray of our own: what a run prints, and what listens while it runs (issue items 27 and 28)."""

import contextlib
import re
import subprocess
import sys

import psutil
import pytest

from pipelines.session import _print_lines

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def listening(pid):
    """(address, process) of all that a process and those below it listen on."""
    found = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                for connection in process.net_connections("inet"):
                    if connection.status == psutil.CONN_LISTEN:
                        found.add((connection.laddr.ip, process.name()))
    return found


@pytest.fixture(scope="module")
def watched(recipe, tmp_path_factory):
    """(stdout, stderr, what listened) of a whole run through pipes."""
    root = tmp_path_factory.mktemp("watched")
    words = ["arms={}", "evaluate.references={}", "train.steps=3"]
    command = [sys.executable, "-m", "pipelines.cli", "run", str(recipe), *words, "--root", root]
    listeners = set()
    with (root / "out").open("w") as out, (root / "err").open("w") as err:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=err)
        while True:
            listeners |= listening(process.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                assert process.wait(0.5) == 0, (root / "err").read_text()
                break
    return (root / "out").read_text(), (root / "err").read_text(), listeners


def test_a_log_holds_our_lines_as_they_are_and_no_noise(watched):
    stdout, stderr, _ = watched
    for text in (stdout, stderr):
        assert "\x1b" not in text and ".cc:" not in text and "pid=" not in text
        assert "Traceback" not in text
    assert re.search(r"^train step 3/3 loss \d", stdout, re.MULTILINE)
    assert re.search(r"^embed: \d+/\d+ tasks, ", stderr, re.MULTILINE)
    assert len(stderr.splitlines()) < 20, stderr


@pytest.mark.parametrize(
    ("pid", "line", "shown"),
    [
        (12, "train step 3/3 loss 1.2", "train step 3/3 loss 1.2"),
        (12, "[2026-11-25 12:46:40,455 E 21682 21719] core_worker.cc:2465: Actor", None),
        ("gcs_server", "[2026-11-25 15:02:59,323 E 1 1] (gcs_server) a_b.cc:538: Failed", None),
        ("autoscaler", "Error: No available node", "ray autoscaler: Error: No available node"),
    ],
)
def test_what_rays_own_code_logs_is_left_in_its_files(capsys, pid, line, shown):
    _print_lines({"pid": pid, "lines": [line], "is_err": False})
    assert capsys.readouterr().out == (f"{shown}\n" if shown else "")


def test_nothing_listens_beyond_loopback_but_torchs_store(watched):
    """torch's TCPStore, by which ranks meet, listens on every interface and has no setting."""
    _, _, listeners = watched
    beyond = {name for address, name in listeners if address not in LOOPBACK}
    assert ("127.0.0.1", "ray::RuntimeEnvAgent") in listeners
    assert beyond <= {"ray::RayTrainWorker"}


def test_a_cluster_that_is_not_there_is_one_message(recipe, tmp_path):
    words = ["ingest", str(recipe), "--root", str(tmp_path), "--address", "nonsense"]
    command = [sys.executable, "-m", "pipelines.cli", *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "--address nonsense: no Ray cluster to connect to" in result.stderr
