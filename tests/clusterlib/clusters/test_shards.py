import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clusterlib.clusters import shards
from clusterlib.clusters.shards import ShardIndex, Shards, group, read_range
from clusterlib.clusters.tree import build, from_table


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
    indexes, contents = [], []
    for file, start in enumerate(range(0, table.num_rows, block_rows)):
        groups, runs = group(table.slice(start, block_rows), file)
        contents.append(pa.concat_tables(groups)["pair_id"].to_numpy())
        indexes.append(runs)
    tree, _ = build(np.random.default_rng(0).standard_normal((num_leaves, 3)), np.ones(num_leaves))
    sources = sorted(set(table["source"].to_pylist()))
    return ShardIndex(pa.concat_tables(indexes), dict.fromkeys(sources, tree)), contents


def test_group_sorts_by_leaf_keeps_every_row_and_its_order(monkeypatch):
    monkeypatch.setattr(shards, "_ROW_GROUP_ROWS", 50)
    table = block(np.random.default_rng(0), 997)
    groups, runs = group(table, 3)
    together = pa.concat_tables(groups)
    expected = sorted(
        zip(table["source"].to_pylist(), table["leaf"].to_pylist(), range(997), strict=True)
    )  # ties keep the order of the input
    assert together["pair_id"].to_pylist() == [
        table["pair_id"][row].as_py() for _, _, row in expected
    ]
    assert pc.sum(runs["num_rows"]).as_py() == 997 and set(runs["file"].to_pylist()) == {3}


def test_runs_tell_leaves_apart_and_break_row_groups_only_at_their_edges(monkeypatch):
    monkeypatch.setattr(shards, "_ROW_GROUP_ROWS", 120)
    table = block(np.random.default_rng(1), 1000, sources=("b", "a", "c"), num_leaves=7)
    groups, runs = group(table, 3)
    together = pa.concat_tables(groups)
    starts = np.cumsum([0] + [part.num_rows for part in groups])
    keys = []
    for run in runs.to_pylist():
        rows = together.slice(run["first_row"], run["num_rows"])
        assert set(rows["source"].to_pylist()) == {run["source"]} and set(
            rows["leaf"].to_pylist()
        ) == {run["leaf"]}
        assert starts[run["row_group"]] <= run["first_row"]
        assert run["first_row"] + run["num_rows"] <= starts[run["row_group"] + 1]
        keys.append((run["source"], run["leaf"]))
    assert keys == sorted(set(keys))
    # Small leaves share a row group: 21 leaves of about 48 rows need about 1000 / 120 groups.
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
    groups, runs = group(block(np.random.default_rng(0), 5).slice(0, 0), 0)
    assert groups == [] and runs.num_rows == 0


def test_reading_a_cluster_touches_only_its_row_groups(make_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_ROW_GROUP_ROWS", 8)
    artifact, _ = make_shards(tmp_path)
    index = ShardIndex(artifact.read("index"), from_table(artifact.read("tree")))
    table = artifact.read(columns=["pair_id", "source", "leaf"])
    read = []

    class Counting(pq.ParquetFile):
        def read_row_groups(self, row_groups, **arguments):
            read.extend(self.metadata.row_group(number).num_rows for number in row_groups)
            return super().read_row_groups(row_groups, **arguments)

    monkeypatch.setattr(pq, "ParquetFile", Counting)
    for source, tree in index.trees.items():
        starts = index.leaf_starts[source]
        for k in (1, 2, 4):
            for node in tree.cut(k):
                read.clear()
                start, stop = (
                    int(starts[node.first_leaf]),
                    int(starts[node.first_leaf + node.num_leaves]),
                )
                found = read_range(Shards([artifact]), start, stop, ["pair_id", "source", "leaf"])
                leaves = pc.and_(
                    pc.greater_equal(table["leaf"], node.first_leaf),
                    pc.less(table["leaf"], node.first_leaf + node.num_leaves),
                )
                expected = table.filter(pc.and_(pc.equal(table["source"], source), leaves))
                assert sorted(found["pair_id"].to_pylist()) == sorted(
                    expected["pair_id"].to_pylist()
                )
                leaves = found["leaf"].to_pylist()
                assert leaves == sorted(leaves) and found.num_rows == stop - start
                # A run shares its row group with at most the 7 rows of smaller leaves on either
                # side.
                assert sum(read) <= found.num_rows + 16 * len(artifact.parts())
