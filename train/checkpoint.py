"""Checkpoints: weights, AdamW's moments, the records of all steps so far (their count is the plan
position), the scores of the tests between them with the best weights where those are kept, config.

All of it is whole, so a run continues with any number of ranks and under any ZeRO stage.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSelector, FileSystem, FileType
from safetensors.torch import load_file, save_file

from clusterlib.artifacts.tables import TESTS
from train.config import TrainConfig
from train.engine import Engine
from train.measures import STEPS
from train.progress import Progress

_STATE = "state.safetensors"
_STEPS = "steps.parquet"
_TESTS = "tests.parquet"
_BEST = "best.safetensors"
_CONFIG = "config.json"
_DIGESTS = "digests.json"
_CHUNK = 2**24


def save(folder: Path, engine: Engine, progress: Progress, config: TrainConfig, rank: int) -> None:
    """Every rank calls it; rank 0 writes to the empty folder, the other files' digests last."""
    state = engine.state()
    if rank != 0:
        return
    save_file(state, folder / _STATE)
    pq.write_table(pa.Table.from_pylist(progress.records, schema=STEPS), folder / _STEPS)
    pq.write_table(pa.Table.from_pylist(progress.tests, schema=TESTS), folder / _TESTS)
    save_file(progress.best, folder / _BEST)
    (folder / _CONFIG).write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    digests = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as stream:
            digests[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    (folder / _DIGESTS).write_text(json.dumps(digests), encoding="utf-8")


def load(folder: Path, engine: Engine, rank: int) -> Progress:
    """Continue from a checkpoint; every rank calls it."""
    progress = Progress(pq.read_table(folder / _STEPS).to_pylist())
    if rank == 0:
        progress.tests = pq.read_table(folder / _TESTS).to_pylist()
        progress.best = load_file(folder / _BEST)
    engine.restore(load_file(folder / _STATE), progress.step - progress.num_skipped)
    return progress


def latest(fs: FileSystem, path: str) -> str | None:
    """The path of the latest whole checkpoint among the folders in `path`, whose names sort by
    step; says which it passed over."""
    entries = fs.get_file_info(FileSelector(path, allow_not_found=True))
    for folder in sorted(
        (entry.path for entry in entries if entry.type == FileType.Directory), reverse=True
    ):
        fault = _fault(fs, folder)
        if fault is None:
            return folder
        print(f"train: the checkpoint {folder} is not used: {fault}", flush=True)
    return None


def _fault(fs: FileSystem, folder: str) -> str | None:
    """What is wrong with a checkpoint, if anything."""
    try:
        with fs.open_input_stream(f"{folder}/{_DIGESTS}") as stream:
            digests = json.loads(stream.read())
        for name, digest in digests.items():
            found = hashlib.sha256()
            with fs.open_input_stream(f"{folder}/{name}") as stream:
                while chunk := stream.read(_CHUNK):
                    found.update(chunk)
            if found.hexdigest() != digest:
                return f"{name} is not as it was written"
    except (OSError, ValueError) as error:
        return f"it is incomplete ({type(error).__name__}: {error})"
    return None
