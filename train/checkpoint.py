"""Checkpoints: engine state, the records of all steps so far (their count is the plan position), and config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clusterlib.errors import StrataError
from clusterlib.tables import STEPS
from train.engine import Engine
from train.loop import Progress, TrainConfig


def save(folder: Path, engine: Engine, progress: Progress, config: TrainConfig, rank: int) -> None:
    """Write a checkpoint; every rank calls it with its own or a shared folder, rank 0 writes the records."""
    engine.save(folder)
    if rank == 0:
        pq.write_table(pa.Table.from_pylist(progress.records, schema=STEPS), folder / "steps.parquet")
        (folder / "config.json").write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")


def load(folder: Path, engine: Engine, config: TrainConfig) -> Progress:
    """Continue from a checkpoint.

    Raises:
        StrataError: it was made by another number of ranks or another ZeRO stage.
    """
    saved: Mapping[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name in ("num_workers", "zero_stage"):
        if saved[name] != getattr(config, name):
            raise StrataError(
                f"train.{name}={getattr(config, name)}: the run to continue was started with {saved[name]}; "
                f"set train.{name}={saved[name]}, or give another --root to start afresh"
            )
    engine.load(folder)
    return Progress(pq.read_table(folder / "steps.parquet").to_pylist())
