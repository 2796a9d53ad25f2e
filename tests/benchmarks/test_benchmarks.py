"""Every benchmark still runs: to its RESULT line, as a user would run it, at its smallest size."""

import importlib
import inspect
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train.model import ModelRef

BENCHMARKS = sorted(Path(__file__).parent.glob("bench_*.py"))
# What a RESULT line has to tell, where it is not a ratio of two sides.
NUMBERS = {
    "bench_plan": {"ratio", "seconds", "gib", "seek_ms"},
    "bench_scale": {"rows", "gib", "seconds"},
}


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


@pytest.fixture
def real(monkeypatch):
    """The module real.py."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("real")


def test_real_texts_are_distinct_and_embedded_once(real, monkeypatch, tmp_path, teacher_folder):
    (tmp_path / "data" / "animals").mkdir(parents=True)
    table = pa.table({"query": ["rose", "tulip", "rose"], "passage": ["wave", "tide", "reef"]})
    pq.write_table(table, tmp_path / "data" / "animals" / "train.parquet")
    monkeypatch.setattr(real, "_DATA", tmp_path / "data")
    monkeypatch.setattr(real, "_CACHE", tmp_path / "cache")
    monkeypatch.setattr(real, "teacher", lambda: ModelRef(name=str(teacher_folder)))
    assert real.sources() == ["animals"]
    assert real.texts("animals", "query") == ["rose", "tulip"]
    assert real.texts("animals", "passage", 2) == ["wave", "tide"]
    vectors = real.vectors("animals", "query", 8)
    assert vectors.shape == (2, 32) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    monkeypatch.delattr(real, "Teacher")
    assert (real.vectors("animals", "query", 8) == vectors).all()
    with pytest.raises(SystemExit, match="plants: no such source"):
        real.texts("plants", "query")


def test_what_is_made_up_is_asked_for_as_what_is_real(real):
    made_up = importlib.import_module("made_up")
    for name in ("sources", "texts", "vectors", "teacher"):
        assert inspect.signature(getattr(made_up, name)) == inspect.signature(getattr(real, name))
