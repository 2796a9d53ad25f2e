"""Mining against a search spelled out row by row, and the share of ranks."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from clusterlib.artifacts.artifact import Spec
from clusterlib.artifacts.draft import Draft, Receipt
from clusterlib.artifacts.tables import fixed_size_list, neighbors_schema
from clusterlib.batches.blocks import Stratum
from clusterlib.batches.neighbors import NOBODY, NeighborsConfig
from clusterlib.batches.plan import BatchingConfig, Plan
from clusterlib.clusters.shards import Shards
from train.data import TokenStore, cache_shards
from train.mine import Miner, nearest, share


def spelled_out(query, passage, query_id, passage_id, config):
    similarity = query @ passage.T
    found = []
    for row in range(len(query)):
        eligible, seen = [], set()
        for other in range(len(query)):
            if passage_id[other] in seen:
                continue
            seen.add(passage_id[other])
            known = {passage_id[j] for j in range(len(query)) if query_id[j] == query_id[row]}
            if passage_id[other] in known:
                continue
            if similarity[row, other] > similarity[row, row] - config.margin:
                continue
            if passage[row] @ passage[other] >= config.duplicate_similarity:
                continue
            eligible.append(other)
        ranked = sorted(eligible, key=lambda other: -similarity[row, other])[
            config.first_rank : config.last_rank
        ]
        found.append(ranked + [NOBODY] * (config.num_ranks - len(ranked)))
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"per_seed": 1, "last_rank": 5},
        {"per_seed": 1, "first_rank": 3, "last_rank": 60},  # more than there are
        {"per_seed": 1, "last_rank": 5, "margin": -0.2, "duplicate_similarity": 0.3},
        {"per_seed": 1, "last_rank": 5, "margin": 2},  # none are left
    ],
)
def test_nearest_equals_a_search_spelled_out(options, monkeypatch):
    monkeypatch.setattr("train.mine._BLOCK_SCORES", 170)  # several blocks
    generator = np.random.default_rng(0)
    num_rows = 50
    query_id, passage_id = generator.integers(0, 40, num_rows), generator.integers(0, 30, num_rows)
    sides = [
        generator.standard_normal((40, 6))[query_id],
        generator.standard_normal((30, 6))[passage_id],
    ]
    query, passage = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides)
    config = NeighborsConfig(**options)
    tensors = [torch.from_numpy(array) for array in (query, passage, query_id, passage_id)]
    found = nearest(*tensors, config).tolist()
    assert found == spelled_out(query, passage, query_id.tolist(), passage_id.tolist(), config)
    assert all(set(row) == {NOBODY} for row in found) == (options.get("margin") == 2)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_ranks_share_clusters_evenly_and_in_order(num_ranks):
    sizes = [100, 0, 300, 50, 200, 10, 290]
    clusters = [Stratum(str(place), sum(sizes[:place]), size) for place, size in enumerate(sizes)]
    shares = share(clusters, num_ranks)
    assert len(shares) == num_ranks
    assert [cluster for mine in shares for cluster in mine] == clusters
    costs = [sum(cluster.num_rows**2 for cluster in mine) for mine in shares]
    assert max(costs) <= sum(costs) / num_ranks + 300**2


def test_a_node_does_not_use_the_table_of_an_earlier_try(make_shards, tmp_path):
    artifact, _ = make_shards(tmp_path / "root", teacher_width=6)
    index = Shards([artifact]).index
    neighbors = {"per_seed": 2, "last_rank": 4, "margin": -1}
    plan = Plan(
        index, BatchingConfig(strategy="neighbors", k=2, global_batch_size=24, neighbors=neighbors)
    )
    store = TokenStore(cache_shards(Shards([artifact]), tmp_path / "cache", True), index, 0)
    draft = Draft(artifact.root, Spec("model", 1, {}))
    engine = SimpleNamespace(device=torch.device("cpu"))
    miner = Miner(draft, tmp_path / "cache", plan, store, engine, 8, writes_cache=True)
    mining = plan.mining(0, 10)
    first = np.array(miner(mining, 0))
    assert first.shape == (240, 4) and first.max() < 240

    schema = neighbors_schema(4)
    other = pa.Table.from_arrays([fixed_size_list(first[::-1])], schema=schema)
    draft.commit(
        "neighbors-000000000", Receipt([draft.write("neighbors", "other", schema, [other])])
    )
    np.testing.assert_array_equal(miner(mining, 3), first[::-1])
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1
    miner.forget()
    assert not list((tmp_path / "cache").glob("*.npy"))
