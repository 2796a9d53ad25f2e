"""Every benchmark still runs: to its RESULT line, as a user would run it, at its smallest size."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = sorted(Path(__file__).parent.glob("bench_*.py"))
# What a RESULT line has to tell, where it is not a ratio of two sides.
NUMBERS = {"bench_plan": {"ratio", "seconds", "gib", "seek_ms"}, "bench_scale": {"rows", "gib", "seconds"}}


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_runs_to_its_result_line_at_its_smallest_size(path, ray_running):
    done = subprocess.run(
        [sys.executable, path, "--smallest"],
        capture_output=True,
        text=True,
        check=False,
        # One Ray for all: starting one takes longer than what it is to do.
        env={**os.environ, "RAY_ADDRESS": ray_running.address_info["gcs_address"]},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    word, name, *words = done.stdout.splitlines()[-1].split()
    assert (word, name) == ("RESULT", path.stem)
    numbers = {name: float(value) for name, value in (word.split("=") for word in words)}
    assert NUMBERS.get(path.stem, {"ratio"}) <= set(numbers)
    assert all(math.isfinite(number) for number in numbers.values()), numbers
