"""Item 13: who is at work in a folder, told without comparing clocks."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pyarrow.fs as pafs
import pytest

from clusterlib.artifacts import lease
from clusterlib.artifacts.artifact import Root
from clusterlib.artifacts.lease import HeldError, Lease, alone, signed_in
from clusterlib.errors import StrataError

HOLD = """
import sys, time
from clusterlib.artifacts.artifact import Root
from clusterlib.artifacts.lease import alone
root = Root(sys.argv[1])
with alone(root.fs, root.path):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "DEAD_SECONDS", 1.0)
    monkeypatch.setattr(lease, "_POLL_SECONDS", 0.05)


@pytest.fixture(params=["local", "memory", "s3"])
def place(request, tmp_path):
    """A file system and a folder there."""
    uri = {"local": str(tmp_path), "memory": f"memory:/{tmp_path}", "s3": "s3://bucket/root"}
    if request.param == "s3":
        request.getfixturevalue("bucket")
    root = Root(uri[request.param])
    return root.fs, root.path


def test_the_second_is_told_who_is_there_since_when_and_what_to_do(place):
    with alone(*place) as first:
        with (
            pytest.raises(
                HeldError,
                match=rf"process {os.getpid()} on .* since {re.escape(first.since)}; let it end",
            ),
            alone(*place),
        ):
            pass
        first.check()
    with alone(*place):
        pass


def test_drivers_that_share_the_work_do_not_mind_each_other_but_are_seen(place):
    with signed_in(*place) as one, signed_in(*place) as other:
        assert one.others() == [Lease(other.fs, other.folder, other.id)]
        with pytest.raises(HeldError), alone(*place):
            pass
    assert not list(place[0].get_file_info(pafs.FileSelector(place[1])))


def silent(place, machine):
    """A driver that signed in and gave no other sign."""
    fs, folder = place
    held = Lease(fs, folder, "0" * 32, "long ago")
    held.beat(0)
    with fs.open_input_stream(f"{folder}/{held.id}.json") as stream:
        owner = json.loads(stream.read())
    lease.write(fs, f"{folder}/{held.id}.json", json.dumps({**owner, "machine": machine}).encode())
    return held


@pytest.mark.parametrize("machine", ["another boot", None])
def test_who_gives_no_sign_is_dead_after_a_while_and_learns_it(place, machine, capsys):
    held = silent(place, machine)
    held.check()
    began = time.monotonic()
    with alone(*place) as second:
        assert time.monotonic() - began >= 1
        with pytest.raises(StrataError, match="gave no sign for 1 s, so another took its place"):
            held.check()
        held.beat(1)  # it wakes up
        with pytest.raises(StrataError, match="so another took its place"):
            held.check()
        second.check()
    assert "alive? waiting 1 s at most" in capsys.readouterr().err
    with alone(*place):  # and nobody waits for it again
        assert time.monotonic() - began < 3


def test_a_store_that_is_away_says_nothing_of_the_driver(place, monkeypatch):
    """While it does not answer the watcher, it takes no signs from the driver either."""
    held = silent(place, None)
    read, delays = Lease._read, iter([0, 1.5, 0, 0])

    def slow(self):
        delay = next(delays, None)
        if delay is None:
            held.beat(1)
        time.sleep(delay or 0)
        return read(self)

    monkeypatch.setattr(Lease, "_read", slow)
    with pytest.raises(HeldError), alone(*place):
        pass


@pytest.mark.parametrize("reaped", [True, False])
def test_whose_process_was_killed_on_this_machine_is_dead_at_once(tmp_path, monkeypatch, reaped):
    monkeypatch.setattr(lease, "DEAD_SECONDS", 1000)
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    holder = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGKILL)
    if reaped:
        holder.wait()
    else:
        time.sleep(0.5)
    fs = pafs.LocalFileSystem()
    with alone(fs, str(tmp_path)) as second:
        second.check()
    holder.wait()
    holder.stdout.close()


def test_a_file_that_is_being_written_is_no_sign(tmp_path):
    held = Lease(pafs.LocalFileSystem(), str(tmp_path), "0" * 32)
    path = tmp_path / f"{held.id}.json"
    path.write_text("")
    timer = threading.Timer(0.2, lambda: held.beat(0))
    timer.start()
    with alone(held.fs, held.folder):  # one sign is not two
        timer.join()
    assert json.loads(path.read_text())["beat"] == 0


def test_however_many_come_at_once_one_is_alone_at_a_time(tmp_path):
    fs, inside, most, count = pafs.LocalFileSystem(), [], [], 6
    everyone = threading.Barrier(count)

    def come():
        everyone.wait()
        while True:
            try:
                with alone(fs, str(tmp_path)):
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0.05)
                    inside.pop()
                return
            except HeldError:
                continue

    threads = [threading.Thread(target=come) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * count
