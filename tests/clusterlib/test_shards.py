import numpy as np
import pyarrow as pa

from clusterlib import shards
from clusterlib.shards import ShardIndex, group, index_table
from clusterlib.tree import build


def block(generator, num_rows, sources=("a", "b"), num_leaves=5):
    return pa.table(
        {
            "pair_id": pa.array(generator.permutation(num_rows).astype(np.uint64)),
            "source": [str(generator.choice(sources)) for _ in range(num_rows)],
            "leaf": pa.array(generator.integers(0, num_leaves, num_rows), pa.int32()),
        }
    )


def make_index(table, block_rows, num_leaves=5):
    """The index of a table cut into blocks, and the row of the table at each place of each file."""
    runs_by_file, contents = [], []
    for start in range(0, table.num_rows, block_rows):
        groups, runs = group(table.slice(start, block_rows))
        contents.append(pa.concat_tables(groups)["pair_id"].to_numpy())
        runs_by_file.append(runs)
    tree, _ = build(np.random.default_rng(0).standard_normal((num_leaves, 3)), np.ones(num_leaves))
    sources = sorted(set(table["source"].to_pylist()))
    return ShardIndex(index_table(runs_by_file), dict.fromkeys(sources, tree)), contents


def test_group_sorts_by_leaf_keeps_every_row_and_its_order(monkeypatch):
    monkeypatch.setattr(shards, "_ROW_GROUP_ROWS", 50)
    table = block(np.random.default_rng(0), 997)
    groups, runs = group(table)
    together = pa.concat_tables(groups)
    expected = sorted(
        zip(table["source"].to_pylist(), table["leaf"].to_pylist(), range(997), strict=True)
    )  # ties keep the order of the input
    assert together["pair_id"].to_pylist() == [table["pair_id"][row].as_py() for _, _, row in expected]
    assert sum(run.num_rows for run in runs) == 997


def test_runs_tell_leaves_apart_and_break_row_groups_only_at_their_edges(monkeypatch):
    monkeypatch.setattr(shards, "_ROW_GROUP_ROWS", 120)
    table = block(np.random.default_rng(1), 1000, sources=("b", "a", "c"), num_leaves=7)
    groups, runs = group(table)
    together = pa.concat_tables(groups)
    starts = np.cumsum([0] + [part.num_rows for part in groups])
    for run in runs:
        rows = together.slice(run.first_row, run.num_rows)
        assert set(rows["source"].to_pylist()) == {run.source} and set(rows["leaf"].to_pylist()) == {run.leaf}
        assert starts[run.row_group] <= run.first_row
        assert run.first_row + run.num_rows <= starts[run.row_group + 1]
    assert [(run.source, run.leaf) for run in runs] == sorted({(run.source, run.leaf) for run in runs})
    # Small neighbours share a row group: 21 leaves of about 48 rows need about 1000 / 120 groups.
    assert len(groups) < 12


def test_leaf_order_does_not_depend_on_blocks():
    table = block(np.random.default_rng(2), 500)
    orders = []
    for block_rows in (500, 97, 1):
        index, contents = make_index(table, block_rows)
        files, rows = index.locate(np.arange(500))
        orders.append([int(contents[file][row]) for file, row in zip(files, rows, strict=True)])
    assert orders[0] == orders[1] == orders[2]
    keys = dict(
        zip(
            table["pair_id"].to_pylist(),
            zip(table["source"].to_pylist(), table["leaf"].to_pylist(), strict=True),
            strict=True,
        )
    )
    assert [keys[pair] for pair in orders[0]] == sorted(keys.values())


def test_leaf_starts_count_every_leaf_of_every_source():
    table = block(np.random.default_rng(3), 300)
    index, _ = make_index(table, 64)
    assert index.num_rows == 300 and index.sources == ["a", "b"]
    pairs = list(zip(table["source"].to_pylist(), table["leaf"].to_pylist(), strict=True))
    start = 0
    for source in index.sources:
        for leaf in range(5):
            assert index.leaf_starts[source][leaf] == start
            start += pairs.count((source, leaf))
        assert index.leaf_starts[source][5] == start


def test_an_empty_block_makes_an_empty_file():
    groups, runs = group(block(np.random.default_rng(0), 5).slice(0, 0))
    assert groups == [] and runs == []
