"""A billion rows in 10,000 strata: build the plan and get any batch, against an epoch's batches
made with numpy.

The other side is what loaders commonly do: shuffle the row ids of every stratum, cut them into
    batches and
shuffle the batches, all of an epoch in memory, again for every epoch. It is run on every tenth
stratum, and its seconds and bytes, which are linear in rows, are scaled by the rows it had. The
ratio is of CPU seconds, which other work on the machine disturbs less; `seconds` passed on the
wall.
"""

from __future__ import annotations

import argparse
import resource
import time

import command
import numpy as np
import pyarrow as pa

from clusterlib.artifacts.tables import INDEX
from clusterlib.batches.plan import BatchingConfig, Plan
from clusterlib.clusters.shards import ShardIndex
from clusterlib.clusters.tree import build

SOURCES = {"forum": 0.1, "news": 0.2, "papers": 0.3, "web": 0.4}  # share of the rows
ONE_STRATUM_IN = 10  # of the other side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000_000)
    parser.add_argument("--leaves", type=int, default=2500, help="of each source")
    parser.add_argument("--file-rows", type=int, default=250_000)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--seeks", type=int, default=200)
    arguments = command.parse(parser, rows=100_000, leaves=20, file_rows=5_000, batch=64, seeks=5)
    num_rows, num_leaves, batch_size = arguments.rows, arguments.leaves, arguments.batch

    generator = np.random.default_rng(0)
    trees = {
        source: build(generator.standard_normal((num_leaves, 8)), np.ones(num_leaves))[0]
        for source in SOURCES
    }
    table, num_files = index_table(generator, num_rows, num_leaves, arguments.file_rows)
    print(
        f"{num_rows:,} rows, {len(SOURCES)} sources, {num_files:,} files, {table.num_rows:,} runs"
    )
    table_gib = table.nbytes / 2**30
    before = peak_gib()

    started, cpu_started = time.perf_counter(), time.process_time()
    index = ShardIndex(table, trees)
    opened = time.perf_counter() - started
    plan = Plan(index, BatchingConfig(strategy="cluster", global_batch_size=batch_size))
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    (phase,) = plan.phases
    assert index.num_rows == num_rows and len(phase.strata) == len(SOURCES) * num_leaves

    steps = generator.integers(0, 3 * phase.num_batches, arguments.seeks).tolist()
    planned, located = [], []
    for step in steps:
        started = time.perf_counter()
        batch = plan.step(step, 3 * phase.num_batches)
        planned.append(time.perf_counter() - started)
        index.locate(batch.rows)
        located.append(time.perf_counter() - started)
    gib = peak_gib()
    sizes = np.array([stratum.num_rows for stratum in phase.strata])
    part = sizes[::ONE_STRATUM_IN]
    scale = num_rows / part.sum()
    their_seconds, their_gib = (scale * value for value in materialize(part, batch_size, generator))

    seek, place = float(np.median(planned)), float(np.median(located))
    print(
        f"{len(sizes):,} strata of {sizes.min():,} to {sizes.max():,} rows, {phase.num_batches:,} "
        "batches an epoch"
    )
    print(
        f"the other side ran on {part.sum():,} rows in {len(part):,} strata; scaled by {scale:.2f}"
    )
    print(f"{'':<40} {'plan':>10} {'numpy':>10}")
    print(f"{'build, CPU s':<40} {cpu_seconds:>10.2f} {their_seconds:>10.2f}")
    print(f"{'build, wall s':<40} {seconds:>10.2f} {'':>10}  (index {opened:.2f})")
    print(
        f"{'a batch of another epoch, s':<40} {seek:>10.4f} {their_seconds:>10.2f}  (worst "
        f"{max(planned):.4f})"
    )
    print(f"{'the same with its places in files, s':<40} {place:>10.4f}")
    print(f"{'batches in memory, GiB':<40} {0:>10.2f} {their_gib:>10.2f}")
    print(
        f"{'peak of the process, GiB':<40} {gib:>10.2f} {'':>10}  (before {before:.2f}, table "
        f"{table_gib:.2f})"
    )
    print(
        f"RESULT bench_plan ratio={their_seconds / cpu_seconds:.1f} seconds={seconds:.2f} "
        f"gib={gib:.2f} seek_ms={1000 * place:.2f}"
    )


def index_table(
    generator: np.random.Generator, total_rows: int, num_leaves: int, file_rows: int
) -> tuple[pa.Table, int]:
    """A table of schema INDEX, leaves of unequal sizes (log-normal, sigma 1) spread evenly over a
    source's files.
    """
    tables = []
    first_file = 0
    for source, share in sorted(SOURCES.items()):
        num_rows = round(share * total_rows)
        files = num_rows // file_rows
        weights = generator.lognormal(size=num_leaves)
        edges = np.round(np.cumsum(weights) / weights.sum() * num_rows).astype(np.int64)
        sizes = np.diff(edges, prepend=0)[:, None]
        counts = np.diff(sizes * np.arange(files + 1) // files)  # [leaf, file]
        firsts = np.cumsum(counts, axis=0) - counts
        leaf, file = (axis.ravel().astype(np.int32) for axis in np.indices(counts.shape))
        columns = {
            "source": pa.DictionaryArray.from_arrays(np.zeros(counts.size, np.int8), [source]).cast(
                pa.string()
            ),
            "leaf": leaf,
            "file": file + np.int32(first_file),
            "row_group": np.zeros(counts.size, np.int32),
            "first_row": firsts.ravel(),
            "num_rows": counts.ravel(),
        }
        tables.append(pa.table(columns, schema=INDEX))
        first_file += files
    return pa.concat_tables(tables), first_file


def materialize(
    sizes: np.ndarray, batch_size: int, generator: np.random.Generator
) -> tuple[float, float]:
    """CPU seconds and GiB of one epoch's batches made whole, an array [batches, rows] of shuffled
    row numbers.
    """
    started = time.process_time()
    starts = np.cumsum(sizes) - sizes
    pieces = []
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        rows = start + generator.permutation(size)
        pieces.append(rows[: size // batch_size * batch_size].reshape(-1, batch_size))
    batches = np.concatenate(pieces)
    batches = batches[generator.permutation(len(batches))]
    return time.process_time() - started, batches.nbytes / 2**30


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
