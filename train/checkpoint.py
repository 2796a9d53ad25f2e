"""Checkpoints: engine state, the records of all steps so far (their count is the plan position), and config."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from clusterlib.tables import STEPS
from train.engine import Engine
from train.loop import Progress, TrainConfig

CONFIG = "config.json"


def save(folder: Path, engine: Engine, progress: Progress, config: TrainConfig, rank: int) -> None:
    """Write a checkpoint; every rank calls it with its own or a shared folder, rank 0 writes the records."""
    engine.save(folder)
    if rank == 0:
        pq.write_table(pa.Table.from_pylist(progress.records, schema=STEPS), folder / "steps.parquet")
        (folder / CONFIG).write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")


def load(folder: Path, engine: Engine) -> Progress:
    """Continue from a checkpoint that the same number of ranks made under the same ZeRO stage."""
    engine.load(folder)
    return Progress(pq.read_table(folder / "steps.parquet").to_pylist())
