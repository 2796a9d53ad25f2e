"""Item 15: caching that was killed leaves nothing for ever."""

import signal
import subprocess
import sys
import threading

import pytest

from train.cache import abandoned, building

BUILD = """
import sys, time
from pathlib import Path
from train.cache import building
with building(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("")
    print("building", flush=True)
    time.sleep(60)
"""


def test_what_is_built_is_moved_away_or_gone(tmp_path):
    with building(tmp_path / "cache") as folder:
        (folder / "file").write_text("whole")
        folder.rename(tmp_path / "cache" / "final")
    with pytest.raises(KeyError), building(tmp_path / "cache") as folder:
        (folder / "file").write_text("half")
        raise KeyError
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["final"]


def test_folders_of_killed_processes_are_swept_and_those_of_others_are_not(tmp_path):
    words = [sys.executable, "-c", BUILD, str(tmp_path)]
    builders = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        assert [builder.stdout.readline() for builder in builders] == ["building\n"] * 2
        left = set(tmp_path.iterdir())
        assert len(left) == 2 and not list(abandoned(tmp_path))
        builders[0].send_signal(signal.SIGKILL)
        builders[0].wait()
        (dead,) = abandoned(tmp_path)
        with building(tmp_path) as folder:
            assert set(tmp_path.iterdir()) == left - {dead} | {folder}
    finally:
        for builder in builders:
            builder.kill()
            builder.wait()
            builder.stdout.close()


def test_many_build_at_once(tmp_path):
    """None is swept between the making of its folder and the lock."""
    failed = []

    def build():
        for _ in range(30):
            with building(tmp_path) as folder:
                try:
                    (folder / "file").write_text("")
                except OSError as error:
                    failed.append(error)

    threads = [threading.Thread(target=build) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and not list(tmp_path.iterdir())
