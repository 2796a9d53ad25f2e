"""Many rows through the real stages: does memory stay where it is, and how fast do rows go by?

A synthetic `embeddings` of short texts and short vectors is written in parts such as the embed
stage writes, one at a time, and goes through `cluster` and `shard` in a Ray of its own. Peak memory
is that of the whole process tree, with Ray and its object store, sampled.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import command
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from memory import PeakMemory

from clusterlib.artifacts.artifact import Artifact, Root, Spec
from clusterlib.artifacts.draft import Draft, Receipt
from clusterlib.artifacts.tables import embeddings_schema, fixed_size_list
from clusterlib.batches.permutation import mix
from pipelines import cluster, shard
from pipelines.cluster import ClusterConfig, centroids_spec
from pipelines.session import ray_session
from pipelines.shard import ShardConfig, shards_spec
from pipelines.stage import Stage, find_or_make
from train.model import TokenizerRef

SOURCES = {"forum": 0.1, "news": 0.2, "papers": 0.3, "web": 0.4}  # share of the rows
WIDTH = 16
TOPICS = 64  # that the vectors of a source gather around
WORDS = sorted(set(re.findall("[a-z]+", __doc__)))
QUERY_WORDS, PASSAGE_WORDS = 4, 8
PART_ROWS, ROW_GROUP_ROWS = 16_384, 8192  # as embed has them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--leaves", type=int, default=100, help="of each source")
    arguments = command.parse(parser, rows=2000, leaves=4)
    num_rows = arguments.rows
    cluster_config = ClusterConfig(num_leaves=arguments.leaves)
    tokenizer = TokenizerRef(name=command.data(arguments).teacher().name)
    shard_config = ShardConfig(tokenizer=tokenizer, query_max_tokens=16, passage_max_tokens=32)
    print(
        f"{num_rows:,} rows of {len(SOURCES)} sources, {WIDTH} dimensions, {arguments.leaves} "
        "leaves a source"
    )
    print(f"{'stage':<10} {'seconds':>8} {'rows/s':>10} {'files':>7} {'MiB':>7} {'peak MiB':>9}")
    total_seconds, peak_bytes = 0.0, 0

    def timed(stage: Stage, specs: list[Spec]) -> list[Artifact]:
        nonlocal total_seconds, peak_bytes
        with PeakMemory(seconds_between=1) as memory:
            started = time.perf_counter()
            made = find_or_make(stage, specs, root)
            seconds = time.perf_counter() - started
        files = [path for artifact in made for path in Path(artifact.path).rglob("*")]
        sizes = [path.stat().st_size for path in files if path.is_file()]
        print(
            f"{stage.kind:<10} {seconds:>8.1f} {num_rows / seconds:>10,.0f} {len(sizes):>7,} "
            f"{sum(sizes) / 2**20:>7,.0f} {memory.peak_bytes / 2**20:>9,.0f}",
            flush=True,
        )
        total_seconds, peak_bytes = total_seconds + seconds, max(peak_bytes, memory.peak_bytes)
        return made

    with tempfile.TemporaryDirectory() as folder:
        root = Root(folder)
        embeddings = write_embeddings(root, num_rows)
        centroids = [centroids_spec(cluster_config, spec) for spec in embeddings]
        shards = [shards_spec(shard_config, [], spec) for spec in centroids]
        with ray_session(None):
            timed(cluster.STAGE, centroids)
            made = timed(shard.STAGE, shards)
        assert sum(artifact.num_rows for artifact in made) == num_rows
    print(
        f"RESULT bench_scale rows={num_rows} gib={peak_bytes / 2**30:.2f} "
        f"seconds={total_seconds:.0f}"
    )


def write_embeddings(root: Root, num_rows: int) -> list[Spec]:
    """Finished artifacts such as `embed` makes, one of each source."""
    generator = np.random.default_rng(0)
    counts = {source: int(num_rows * share) for source, share in SOURCES.items()}
    counts["web"] += num_rows - sum(counts.values())
    schema = embeddings_schema(WIDTH)
    specs, first_id = [], 0
    for source, count in counts.items():
        specs.append(Spec("embeddings", 1, {"rows": count, "source": source}, label=source))
        draft, receipts = Draft(root, specs[-1]), []
        topics = generator.standard_normal((TOPICS, WIDTH), np.float32)
        for first in range(0, count, PART_ROWS):
            size = min(PART_ROWS, count - first)
            groups = row_groups(generator, source, topics, first_id, size)
            receipts.append(
                Receipt([draft.write("embeddings", f"{first_id:09d}", schema, groups)], size)
            )
            first_id += size
        draft.publish(receipts, {"width": WIDTH})
    return specs


def row_groups(
    generator: np.random.Generator, source: str, topics: np.ndarray, first_id: int, count: int
) -> Iterator[pa.Table]:
    for first in range(0, count, ROW_GROUP_ROWS):
        size = min(ROW_GROUP_ROWS, count - first)
        passage = topics[generator.integers(0, TOPICS, size)] + generator.standard_normal(
            (size, WIDTH), np.float32
        )
        query = passage + generator.standard_normal((size, WIDTH), np.float32) / 2
        numbers = np.arange(first_id + first, first_id + first + size, dtype=np.uint64)
        columns = [
            mix(numbers),
            pa.repeat(source, size),
            mix(numbers + np.uint64(2**32)),
            texts(generator, size, QUERY_WORDS),
            mix(numbers + np.uint64(2**33)),
            texts(generator, size, PASSAGE_WORDS),
            pa.nulls(size, pa.string()),
            *(unit(matrix) for matrix in (query, passage)),
        ]
        yield pa.Table.from_arrays(
            [pa.array(column) for column in columns], schema=embeddings_schema(WIDTH)
        )


def unit(matrix: np.ndarray) -> pa.Array:
    return fixed_size_list(
        (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float16)
    )


def texts(generator: np.random.Generator, count: int, num_words: int) -> pa.Array:
    words = pa.array(WORDS)
    chosen = generator.integers(0, len(WORDS), (num_words, count))
    return pc.binary_join_element_wise(*(words.take(pa.array(column)) for column in chosen), " ")


if __name__ == "__main__":
    main()
