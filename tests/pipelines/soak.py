r"""Soak: ingest, embed, cluster and shard under random SIGKILLs; the artifacts must equal an undisturbed run's.

Kills a driver, a worker or the raylet at a random moment, starts the command again, and every few rounds has two
drivers work on the same artifacts. Alone, over some hundred pairs of the demo in many small tasks:

    python tests/pipelines/soak.py --kills 100 demo embed.task_rows=32 shard.block_rows=64 cluster.num_leaves=4 \
        "ingest.inputs=[{source: numpy, format: docstrings, path: numpy, fraction: 0.2},
                        {source: stdlib, format: docstrings, path: stdlib, fraction: 0.1}]"
"""

from __future__ import annotations

import argparse
import collections
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from clusterlib.artifact import Root

VICTIMS = ("driver", "worker", "raylet")
_LIMIT_SECONDS = 240


def prepare(words: list[str], root: str) -> None:
    """All data stages in one driver; this is what gets killed."""
    from clusterlib.config import parse_overrides
    from pipelines.run import Run, load_recipe
    from pipelines.stage import ray_session

    run = Run(load_recipe(words[0], parse_overrides(words[1:])), Root(root))
    with ray_session(None):
        for stage in (run.ingest, run.embed, run.cluster, run.shard):
            stage()


def start(words: list[str], root: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, __file__, "--prepare", str(root), *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def family(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """All processes that a driver has started."""
    try:
        return psutil.Process(driver.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def pick(driver: subprocess.Popen[bytes], victim: str) -> psutil.Process | None:
    if victim == "driver":
        return psutil.Process(driver.pid)
    sign = "raylet/raylet" if victim == "raylet" else "ray::"
    found = []
    for process in family(driver):
        try:
            if sign in " ".join(process.cmdline()[:1]):
                found.append(process)
        except psutil.Error:
            continue
    return random.choice(found) if found else None


def clear(processes: list[psutil.Process]) -> None:
    """End what a killed driver left running."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=20)


def check(root: Path, expected: dict[str, list[str]], late: bool) -> None:
    """The same artifacts with the same parts as the undisturbed run, whole, and nothing else on disk.

    Args:
        late: a second driver was killed, whose last tasks may have written after the first one had swept.
    """
    found = Root(str(root)).artifacts()
    assert {artifact.name: digests(artifact) for artifact in found} == expected
    for artifact in found:
        artifact.verify()
        named = {part["path"] for part in artifact.manifest["parts"]} | {"manifest.json"}
        files = {str(path.relative_to(artifact.path)) for path in Path(artifact.path).rglob("*") if path.is_file()}
        assert named <= files, f"{artifact.path}: missing {named - files}"
        assert late or files == named, f"{artifact.path}: orphans {files - named}"


def digests(artifact) -> list[str]:
    return [f"{part['path']} {part['sha256']}" for part in artifact.manifest["parts"]]


def soak(words: list[str], kills: int, seed: int) -> None:
    random.seed(seed)
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        assert start(words, Path(folder) / "undisturbed").wait(_LIMIT_SECONDS) == 0
        seconds = time.monotonic() - began
        expected = {artifact.name: digests(artifact) for artifact in Root(f"{folder}/undisturbed").artifacts()}
        while counts["kills"] < kills:
            root = Path(folder) / f"{counts['finished']}"
            pair = counts["finished"] % 4 == 3
            drivers = [start(words, root) for _ in range(2 if pair else 1)]
            counts["two drivers"] += pair
            victim = VICTIMS[counts["kills"] % len(VICTIMS)]
            time.sleep(random.uniform(0.3, 1.0) * seconds * len(drivers))
            left = family(drivers[0])
            process = pick(drivers[0], victim) if drivers[0].poll() is None else None
            if process is not None:
                process.kill()
                counts["kills"] += 1
                counts[f"killed {victim}"] += 1
            if victim == "raylet" and process is not None:  # the driver waits for a node that is gone
                drivers[0].kill()
            codes = [driver.wait(_LIMIT_SECONDS) for driver in drivers]
            if victim != "worker" and process is not None:
                clear(left)
            if 0 in codes:
                check(root, expected, late=pair and process is not None)
                counts["finished"] += 1
            elif process is None or victim == "worker":
                raise SystemExit(f"{root}: ended with {codes} though only a worker or nothing was killed")
            print(dict(counts), flush=True)
        if start(words, root).wait(_LIMIT_SECONDS) == 0:
            check(root, expected, late=False)
            counts["finished"] += 1
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
