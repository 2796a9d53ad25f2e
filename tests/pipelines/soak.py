r"""Soak: the data stages, from ingest to contamination, under random SIGKILLs.

While a driver works, kills a worker, the driver or the raylet at a random moment, again and again;
a driver that is gone is started anew, until the artifacts are finished. They must equal an
undisturbed run's. Every second time another driver works on the same artifacts. Alone, over some
hundred pairs of the demo in many small tasks:

    python tests/pipelines/soak.py --kills 100 demo embed.task_rows=32 shard.block_rows=64 \
        cluster.num_leaves=4 \
        "ingest.inputs=[{source: numpy, format: docstrings, path: numpy, fraction: 0.2},
                        {source: stdlib, format: docstrings, path: stdlib, fraction: 0.1}]"
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from clusterlib.artifacts.artifact import Root

VICTIMS = ("driver", "worker", "raylet")
TITLES = {"worker": "ray::MapWorker", "raylet": "raylet/raylet"}  # of Ray's processes
_LIMIT_SECONDS = 240

Driver = subprocess.Popen[bytes]


def prepare(words: list[str], root: str) -> None:
    """All data stages in one driver; this is what gets killed."""
    import ray

    from clusterlib.artifacts.config import parse_overrides
    from pipelines.recipe import load_recipe
    from pipelines.run import Run
    from pipelines.session import ray_session

    run = Run(load_recipe(words[0], parse_overrides(words[1:])), Root(root))
    # Without the dashboard's ten processes, which the data stages do not need, a driver is sooner
    # at work.
    ray.init(address="local", num_cpus=3, include_dashboard=False, logging_level="ERROR")
    with ray_session(None):
        for stage in ("ingest", "embed", "cluster", "shard", "contamination"):
            run.make(stage)


@contextlib.contextmanager
def running(words: list[str], root: Path) -> Iterator[Driver]:
    """A driver at work; at the end it and all it has started are ended."""
    driver = subprocess.Popen(
        [sys.executable, __file__, "--prepare", str(root), *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield driver
    finally:
        driver.kill()
        driver.wait()
        while processes := family(driver):
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, timeout=20)


def family(driver: Driver, title: str = "") -> list[psutil.Process]:
    """What a driver has started and still runs, under titles that hold `title`; they stay in its
    session.
    """
    found = []
    for process in psutil.process_iter():
        try:
            started = process.pid != driver.pid and os.getsid(process.pid) == driver.pid
            if started and title in process.cmdline()[0]:
                found.append(process)
        except (psutil.Error, ProcessLookupError, IndexError):  # it has just ended
            continue
    return found


def strike(driver: Driver, victim: str, mean_seconds: float) -> bool:
    """Kill one of the driver's processes, or itself, at a random moment once it has workers.

    Returns:
        Whether there was something to kill.
    """
    deadline = time.monotonic() + _LIMIT_SECONDS
    while not family(driver, TITLES["worker"]):
        if driver.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise SystemExit(f"no worker and no end for {_LIMIT_SECONDS} s")
        time.sleep(0.2)
    time.sleep(random.expovariate(1 / mean_seconds))
    processes = (
        [psutil.Process(driver.pid)] if victim == "driver" else family(driver, TITLES[victim])
    )
    if driver.poll() is not None or not processes:
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        random.choice(processes).kill()
        return True
    return False


def check(root: Path, expected: dict[str, list[str]]) -> None:
    """The same artifacts with the same parts as the undisturbed run, whole, and no other file."""
    found = Root(str(root)).artifacts()
    assert {artifact.name: digests(artifact) for artifact in found} == expected
    for artifact in found:
        artifact.verify()
    assert not orphans(root), f"{root}: orphans {orphans(root)}"


def orphans(root: Path) -> set[str]:
    """Files of finished artifacts that no manifest names."""
    found = set()
    for artifact in Root(str(root)).artifacts():
        named = {part["path"] for part in artifact.manifest["parts"]} | {"manifest.json"}
        files = {
            f"{folder}/{name}" for folder, _, names in os.walk(artifact.path) for name in names
        }
        found |= files - {f"{artifact.path}/{path}" for path in named}
    return found


def digests(artifact) -> list[str]:
    return [f"{part['path']} {part['sha256']}" for part in artifact.manifest["parts"]]


def soak(words: list[str], kills: int, seed: int) -> None:
    random.seed(seed)
    victims = [victim for _ in range(kills) for victim in random.sample(VICTIMS, len(VICTIMS))]
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        with running(words, Path(folder) / "undisturbed") as driver:
            assert driver.wait(_LIMIT_SECONDS) == 0
        seconds = time.monotonic() - began
        print(f"undisturbed: {seconds:.0f} s", flush=True)
        expected = {
            artifact.name: digests(artifact)
            for artifact in Root(f"{folder}/undisturbed").artifacts()
        }

        def finishes(driver: Driver) -> bool:
            """Whether a driver comes to its end before it, or its raylet, is killed."""
            fatal = False
            while counts["kills"] < kills and driver.poll() is None and not fatal:
                victim = victims[counts["kills"]]
                if strike(driver, victim, mean_seconds=seconds / 10):
                    counts.update(["kills", f"killed {victim}"])
                    fatal = victim != "worker"
            if fatal:
                driver.kill()  # without a raylet it would wait for a node that is gone
            code = driver.wait(_LIMIT_SECONDS)
            if code and not fatal:
                raise SystemExit(f"a driver ended with {code} though at most workers were killed")
            return code == 0

        while counts["kills"] < kills:
            root = Path(folder) / f"{counts['finished']}"
            pair = counts["finished"] % 2 == 1
            with running(words, root) if pair else contextlib.nullcontext() as second:
                finished = False
                while not finished:
                    with running(words, root) as driver:
                        finished = finishes(driver)
                if second:
                    assert second.wait(_LIMIT_SECONDS) == 0, (
                        "the second driver failed, though nothing of it was killed"
                    )
            check(root, expected)
            counts["finished"] += 1
            counts["two drivers"] += pair
            print(dict(counts), flush=True)
    print(f"RESULT soak kills={counts['kills']} finished={counts['finished']} lost=0")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="+", metavar="RECIPE [SETTING=VALUE]...")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prepare", metavar="ROOT", help="run the data stages and end")
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(arguments.words, arguments.prepare)
    else:
        soak(arguments.words, arguments.kills, arguments.seed)
