import numpy as np
import pytest
import torch

from clusterlib.errors import StrataError
from train.data import TokenStore, cache_shards, check_teacher, load_tokenizer, shard_index


@pytest.fixture
def opened(shards, tmp_path):
    artifact, table = shards
    index = shard_index(artifact)
    return artifact, table, index, TokenStore(cache_shards(artifact, tmp_path / "cache", False), index, pad_token_id=0)


def leaf_order(table):
    """The rows of the input in leaf order, by sorting alone."""
    return table.sort_by([("source", "ascending"), ("leaf", "ascending"), ("pair_id", "ascending")])


def rows_of(side):
    flat = [ids[: int(mask.sum())].tolist() for pair in side.micro_batches for ids, mask in zip(*pair, strict=True)]
    return [flat[place] for place in side.places]


def test_planned_rows_are_read_whole(opened):
    _, table, index, store = opened
    expected = leaf_order(table)
    rows = np.array([5, 239, 0, 77, 78, 120])
    batch = store.read(rows, 0, 1, 4)
    found = sorted(
        zip(
            batch.pairs.query_id.tolist(),
            batch.pairs.passage_id.tolist(),
            rows_of(batch.query),
            rows_of(batch.passage),
            strict=True,
        )
    )
    wanted = expected.take(rows)
    assert found == sorted(
        zip(
            wanted["query_id"].to_numpy().view(np.int64).tolist(),
            wanted["passage_id"].to_numpy().view(np.int64).tolist(),
            wanted["query_tokens"].to_pylist(),
            wanted["passage_tokens"].to_pylist(),
            strict=True,
        )
    )
    assert batch.num_tokens == sum(map(len, wanted["query_tokens"].to_pylist() + wanted["passage_tokens"].to_pylist()))


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_share_a_batch_out(opened, num_ranks):
    _, _, _, store = opened
    rows = np.random.default_rng(0).permutation(240)[:48]
    whole = store.read(rows, 0, 1, 48)
    shares = [store.read(rows, rank, num_ranks, 5) for rank in range(num_ranks)]
    assert {len(share.pairs.query_id) for share in shares} == {48 // num_ranks}
    assert torch.cat([share.pairs.query_id for share in shares]).tolist() == whole.pairs.query_id.tolist()
    assert [row for share in shares for row in rows_of(share.passage)] == rows_of(whole.passage)


def test_padding_is_masked_and_micro_batches_are_of_similar_length(opened):
    _, _, _, store = opened
    side = store.read(np.arange(60), 0, 1, 16).passage
    assert [len(ids) for ids, _ in side.micro_batches] == [16, 16, 16, 12]
    for ids, mask in side.micro_batches:
        assert ids.shape == mask.shape and ids.shape[1] % 8 == 0
        assert (ids[mask == 0] == 0).all() and (ids[mask == 1] > 0).all()
    longest = [int(mask.sum(dim=1).max()) for _, mask in side.micro_batches]
    assert longest == sorted(longest, reverse=True)


def test_the_cache_is_made_once_and_never_half(opened, tmp_path, monkeypatch):
    artifact, *_ = opened
    folder = cache_shards(artifact, tmp_path / "cache", False)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert cache_shards(artifact, tmp_path / "cache", False) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before

    def fail(*_):
        raise RuntimeError("killed")

    monkeypatch.setattr("train.data.Path.rename", fail)
    with pytest.raises(RuntimeError, match="killed"):
        cache_shards(artifact, tmp_path / "other", False)
    assert list((tmp_path / "other").iterdir()) == []


def test_shards_carry_their_tokenizer(opened):
    artifact, *_ = opened
    assert load_tokenizer(artifact)("rose tulip")["input_ids"][0] == 2


def test_teacher_vectors_are_read_with_their_rows(make_shards, tmp_path):
    artifact, table = make_shards(tmp_path / "root", teacher_width=6)
    check_teacher(artifact, "a.setting")
    index = shard_index(artifact)
    expected = leaf_order(table)
    for teacher in (True, False):  # both caches of the same shards, side by side
        store = TokenStore(cache_shards(artifact, tmp_path / "cache", teacher), index, 0, teacher)
        pairs = store.read(np.array([7, 200, 31, 90]), 0, 1, 4).pairs
        assert (pairs.teacher_query is not None) == teacher
        if not teacher:
            continue
        for side in ("query", "passage"):
            wanted = {
                (row["query_id"], row["passage_id"] - 2**64): row[f"teacher_{side}"]
                for row in expected.take([7, 200, 31, 90]).to_pylist()
            }
            found = getattr(pairs, f"teacher_{side}")
            assert found.dtype == torch.float16
            ids = zip(pairs.query_id.tolist(), pairs.passage_id.tolist(), strict=True)
            assert dict(zip(ids, found.tolist(), strict=True)) == wanted
        pairs = store.pairs(np.array([200, 7, 90, 31]))  # the order given, not that of the files
        wanted = expected.take([200, 7, 90, 31])
        assert pairs.query_id.tolist() == wanted["query_id"].to_pylist()
        assert pairs.teacher_passage.tolist() == wanted["teacher_passage"].to_pylist()


def test_shards_without_teacher_vectors_are_refused(opened):
    artifact, *_ = opened
    with pytest.raises(StrataError, match="a.setting: .* carries no teacher vectors; set shard.teacher_vectors=true"):
        check_teacher(artifact, "a.setting")
