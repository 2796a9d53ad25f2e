"""Grouping rows by cluster: Strata's shards against Ray Data's sort and against partitioned Parquet
files.

The three read the same synthetic rows (key, cluster, payload) from the same Parquet blocks and
write Parquet. At two sizes, one four times the other, to show the slope, and at k = 10 and 1,000.
Peak memory is that of the whole process tree, sampled, less what it was before; each side runs in a
process and a Ray of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import command
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from memory import PeakMemory

SIDES = ("strata", "ray sort", "partitioned")
BLOCK_ROWS = 65_536
PAYLOAD_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000_000, 4_000_000])
    parser.add_argument("--ks", type=int, nargs="+", default=[10, 1000])
    parser.add_argument(
        "--side", choices=SIDES, help="run one side and print what it took; for this script itself"
    )
    parser.add_argument("--folder")
    parser.add_argument("--out")
    arguments = command.parse(parser, sizes=[2000], ks=[4])
    if arguments.side:
        print(json.dumps(run_side(arguments.side, Path(arguments.folder), Path(arguments.out))))
        return
    print(
        f"{'rows':>10} {'k':>6} {'side':<12} {'rows/s':>10} {'peak MiB':>9} {'files':>7} {'MiB':>7}"
    )
    ratios = []
    for num_rows in arguments.sizes:
        for k in arguments.ks:
            rates = {}
            with tempfile.TemporaryDirectory() as folder:
                write_blocks(Path(folder) / "in", num_rows, k)
                for side in SIDES:
                    out = Path(folder) / side.replace(" ", "-")
                    words = ["--side", side, "--folder", f"{folder}/in", "--out", str(out)]
                    child = subprocess.run(
                        [sys.executable, __file__, *words], capture_output=True, text=True
                    )
                    if child.returncode:
                        sys.exit(f"{side}: {child.stderr[-2000:]}")
                    took = json.loads(child.stdout.splitlines()[-1])
                    files = [path for path in out.rglob("*.parquet") if path.parent.name != "index"]
                    written = sum(pq.ParquetFile(path).metadata.num_rows for path in files)
                    assert written == num_rows, f"{side} wrote {written} of {num_rows} rows"
                    rates[side] = num_rows / took["seconds"]
                    size = sum(path.stat().st_size for path in files) / 2**20
                    print(
                        f"{num_rows:>10,} {k:>6,} {side:<12} {rates[side]:>10,.0f} "
                        f"{took['peak_mib']:>9,.0f} {len(files):>7,} {size:>7,.0f}",
                        flush=True,
                    )
            ratios.append(rates["strata"] / rates["ray sort"])
    print(f"RESULT bench_shard ratio={min(ratios):.2f}")


def write_blocks(folder: Path, num_rows: int, k: int) -> None:
    """Rows as they come out of embedding: in no order of their clusters."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number, first in enumerate(range(0, num_rows, BLOCK_ROWS)):
        count = min(BLOCK_ROWS, num_rows - first)
        tokens = pa.array(generator.integers(0, 30_000, count * PAYLOAD_TOKENS).astype(np.uint16))
        table = pa.table(
            {
                "pair_id": np.arange(first, first + count, dtype=np.uint64),
                "source": pa.array(["s"]).take(pa.array(np.zeros(count, np.int32))),
                "leaf": generator.integers(0, k, count).astype(np.int32),
                "tokens": pa.FixedSizeListArray.from_arrays(pa.array(tokens), PAYLOAD_TOKENS).cast(
                    pa.list_(pa.uint16())
                ),
            }
        )
        pq.write_table(table, folder / f"{number:06d}.parquet", compression="zstd")


def run_side(side: str, folder: Path, out: Path) -> dict[str, float]:
    from pipelines.session import ray_session

    with ray_session(None):
        warm_up()
        with PeakMemory(seconds_between=0.2) as memory:
            started = time.perf_counter()
            {"strata": by_shards, "ray sort": by_sort, "partitioned": by_partitions}[side](
                folder, out
            )
            seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_mib": (memory.peak_bytes - memory.first_bytes) / 2**20}


def warm_up() -> None:
    import ray.data

    ray.data.from_items([{"x": 1}]).map_batches(lambda batch: batch).materialize()


def by_shards(folder: Path, out: Path) -> None:
    from clusterlib.artifacts.artifact import Root, Spec
    from clusterlib.artifacts.draft import Draft
    from pipelines.tasks import Job, Task, Workers, make

    draft = Draft(Root(str(out)), Spec("shards", 1, {}))
    tasks = [
        Task(path.stem, (file, path), path.name)
        for file, path in enumerate(sorted(folder.iterdir()))
    ]
    make("shard", [Job(draft, tasks, lambda: Grouper(draft), draft.publish)], Workers())


class Grouper:
    """The grouping of pipelines/shard.py, without assigning and tokenising, which the other sides
    do not do.
    """

    def __init__(self, draft) -> None:  # type: ignore[no-untyped-def]
        self.draft = draft

    def __call__(self, work):  # type: ignore[no-untyped-def]
        from clusterlib.artifacts.draft import Receipt
        from clusterlib.artifacts.tables import INDEX
        from clusterlib.clusters import shards

        file, path = work
        block = pq.read_table(path)
        groups, runs = shards.group(block, file)
        parts = [
            self.draft.write("shards", path.stem, block.schema, groups),
            self.draft.write("index", path.stem, INDEX, [runs]),
        ]
        return Receipt(parts, block.num_rows)


def by_sort(folder: Path, out: Path) -> None:
    import ray.data

    ray.data.read_parquet(str(folder)).sort("leaf").write_parquet(str(out))


def by_partitions(folder: Path, out: Path) -> None:
    import ray.data

    ray.data.read_parquet(str(folder)).write_parquet(str(out), partition_cols=["leaf"])


if __name__ == "__main__":
    main()
