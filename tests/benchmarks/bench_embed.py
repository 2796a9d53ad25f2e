"""Embedding real texts: Strata's embed stage against SentenceTransformer.encode; same model,
precision, machine.

The other side is run as its manual advises for a CPU, in one process with all threads and on a pool
of one process a core, at two batch sizes; the fastest counts. Ours is timed once past start-up,
from the moment when every worker has written a part to the last part written, so that Ray and the
writing of Parquet are in it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import command
import pyarrow as pa
import pyarrow.parquet as pq
from sentence_transformers import SentenceTransformer

from clusterlib.artifacts.artifact import Artifact, Root, Spec
from pipelines import embed, ingest
from pipelines.embed import EmbedConfig, embeddings_spec
from pipelines.ingest import IngestConfig, pairs_spec
from pipelines.session import ray_session
from pipelines.sources import InputConfig
from pipelines.stage import find_or_make
from train.model import ModelRef

SOURCES = ("oewn", "medquad")  # median words of a passage: 25 and 132
TASKS = 16
MAX_TOKENS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[4800, 800], help=f"of {' and '.join(SOURCES)}"
    )
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[32, 128], help="of the other side"
    )
    parser.add_argument("--rounds", type=int, default=3)
    arguments = command.parse(parser, rows=[320], batch_sizes=[32], rounds=1)
    data = command.data(arguments)
    teacher = data.teacher()
    cores = os.cpu_count() or 1
    worst = float("inf")
    model = SentenceTransformer(str(teacher.folder()), device="cpu")
    model.max_seq_length = MAX_TOKENS
    with tempfile.TemporaryDirectory() as folder, ray_session(None):
        for source, num_rows in zip(SOURCES, arguments.rows, strict=False):
            sides = {side: data.texts(source, side, num_rows) for side in ("query", "passage")}
            pairs = write_pairs(pa.table(sides), source, folder)
            texts = [*sides["query"], *sides["passage"]]
            runs: dict[str, list[float]] = defaultdict(list)
            for number in range(arguments.rounds):
                root = Root(f"{folder}/{source}-{number}")
                find_or_make(ingest.STAGE, [pairs], root)
                made = run(teacher, pairs, num_rows, root)
                runs["strata"].append(rate(made, cores))
                for batch_size in arguments.batch_sizes:
                    runs[f"encode, {batch_size} a batch"].append(encode(model, texts, batch_size))
                    pool = model.start_multi_process_pool(["cpu"] * cores)
                    encode(model, texts[:200], batch_size, pool)  # its start-up is not timed either
                    runs[f"pool of {cores}, {batch_size} a batch"].append(
                        encode(model, texts, batch_size, pool)
                    )
                    model.stop_multi_process_pool(pool)
            rates = {name: statistics.median(values) for name, values in runs.items()}
            theirs = max(value for name, value in rates.items() if name != "strata")
            print(f"\n{len(texts):,} texts of {source}, medians of {arguments.rounds} rounds")
            for name, value in rates.items():
                print(f"  {name:<28} {value:>8.1f} texts/s {rates['strata'] / value:>6.2f}")
            spent = made.stats["spent"]
            seconds = {name: value for name, value in spent.items() if name.endswith("_seconds")}
            shares = ", ".join(
                f"{name.removesuffix('_seconds')} {v / sum(seconds.values()):.1%}"
                for name, v in seconds.items()
            )
            padding = spent["padding_tokens"] / (spent["num_tokens"] + spent["padding_tokens"])
            print(f"  our time: {shares}; padding {padding:.1%} of the tokens", flush=True)
            worst = min(worst, rates["strata"] / theirs)
    print(f"RESULT bench_embed ratio={worst:.3f}")


def write_pairs(table: pa.Table, source: str, folder: str) -> Spec:
    """Pairs of texts that do not repeat, so that neither side gains by embedding a text once."""
    path = f"{folder}/{source}.parquet"
    pq.write_table(table, path)
    inputs = [InputConfig(source=source, format="parquet", path=path)]
    return pairs_spec(IngestConfig(inputs=inputs), inputs)


def run(teacher: ModelRef, pairs: Spec, num_rows: int, root: Root) -> Artifact:
    config = EmbedConfig(teacher=teacher, max_tokens=MAX_TOKENS, task_rows=-(-num_rows // TASKS))
    (made,) = find_or_make(embed.STAGE, [embeddings_spec(config, pairs)], root)
    assert made.num_rows == num_rows
    return made


def rate(made: Artifact, num_workers: int) -> float:
    """Texts a second after each worker's first part."""
    written = sorted(
        (Path(made.path, part.path).stat().st_mtime, part.num_rows) for part in made.parts()
    )
    later = written[num_workers:]
    return 2 * sum(rows for _, rows in later) / (later[-1][0] - written[num_workers - 1][0])


def encode(
    model: SentenceTransformer, texts: list[str], batch_size: int, pool: dict | None = None
) -> float:
    started = time.perf_counter()
    model.encode(texts, batch_size=batch_size, normalize_embeddings=True, pool=pool)
    return len(texts) / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
