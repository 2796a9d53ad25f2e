from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from clusterlib.clusters.shards import Shards
from clusterlib.errors import StrataError
from train.data import (
    TokenStore,
    cache_shards,
    check_teacher,
    deal,
    load_tokenizer,
)


def open_store(artifact, cache_dir, teacher=False, max_tokens=None):
    shards = Shards([artifact])
    folders = cache_shards(shards, cache_dir, teacher)
    return TokenStore(folders, shards.index, 0, teacher, max_tokens)


@pytest.fixture
def opened(shards, tmp_path):
    artifact, table = shards
    index = Shards([artifact]).index
    return (
        artifact,
        table,
        index,
        open_store(artifact, tmp_path / "cache"),
    )


def leaf_order(table):
    """The rows of the input in leaf order, by sorting alone."""
    return table.sort_by([("source", "ascending"), ("leaf", "ascending"), ("pair_id", "ascending")])


def rows_of(side):
    flat = [
        ids[: int(mask.sum())].tolist()
        for pair in side.micro_batches
        for ids, mask in zip(*pair, strict=True)
    ]
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
    assert batch.num_tokens == sum(
        map(len, wanted["query_tokens"].to_pylist() + wanted["passage_tokens"].to_pylist())
    )


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_share_a_batch_out(opened, num_ranks):
    _, _, _, store = opened
    rows = np.random.default_rng(0).permutation(240)[:48]
    whole = store.read(rows, 0, 1, 48)
    shares = [store.read(rows, rank, num_ranks, 5) for rank in range(num_ranks)]
    assert {len(share.pairs.query_id) for share in shares} == {48 // num_ranks}
    assert sorted(row for share in shares for row in share.rows) == sorted(rows)
    content = [contents(share) for share in shares]
    assert {row: read for share in content for row, read in share.items()} == contents(whole)
    order = {row: place for place, row in enumerate(whole.rows)}
    for share in shares:  # in file order, as the whole is
        assert [order[row] for row in share.rows] == sorted(order[row] for row in share.rows)
    assert {share.num_tokens for share in shares} == {whole.num_tokens}
    assert whole.num_tokens == sum(num_tokens(share) for share in shares)


def contents(batch):
    """What was read of each row."""
    columns = (
        batch.pairs.query_id.tolist(),
        batch.pairs.passage_id.tolist(),
        map(tuple, rows_of(batch.query)),
    )
    return dict(
        zip(batch.rows, zip(*columns, map(tuple, rows_of(batch.passage)), strict=True), strict=True)
    )


def num_tokens(batch):
    return sum(
        int(mask.sum()) for side in (batch.query, batch.passage) for _, mask in side.micro_batches
    )


def test_ranks_that_do_not_divide_a_batch_are_refused(opened):
    _, _, _, store = opened
    with pytest.raises(
        StrataError, match="a batch of 50 pairs cannot be shared out evenly over 4 ranks"
    ):
        store.read(np.arange(50), 0, 4, 8)


def test_ranks_have_as_many_tokens_where_sources_differ_in_length(tmp_path):
    """Four sources of 40 to 220 tokens in files of their own, as random batches find them: slices
    in file order gave the slowest of 8 ranks 1.82 times the mean."""
    generator = np.random.default_rng(0)
    rows_of_source = 512
    for file, mean in enumerate((40, 90, 150, 220)):
        lengths = np.maximum(4, generator.normal(mean, mean / 5, rows_of_source).astype(int))
        tokens = pa.array([[7] * (length // 2) for length in lengths], pa.list_(pa.uint16()))
        ids = pa.array(np.arange(rows_of_source, dtype=np.uint64) + file * rows_of_source)
        columns = {
            "query_id": ids,
            "passage_id": ids,
            "query_tokens": tokens,
            "passage_tokens": tokens,
        }
        table = pa.table(columns)
        with pa.ipc.new_file(tmp_path / f"{file:06d}.arrow", table.schema) as writer:
            writer.write_table(table)
    index = SimpleNamespace(locate=lambda rows: (rows // rows_of_source, rows % rows_of_source))
    store = TokenStore([tmp_path], index, pad_token_id=0)
    for batch in generator.permutation(4 * rows_of_source).reshape(-1, 128):
        loads = [num_tokens(store.read(batch, rank, 8, 32)) for rank in range(8)]
        assert max(loads) <= 1.05 * sum(loads) / 8


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=80).map(np.array),
    num_ranks=st.integers(1, 9),
)
def test_a_deal_is_fair_in_rows_and_in_tokens(lengths, num_ranks):
    ranks = deal(lengths, num_ranks)
    rows = np.bincount(ranks, minlength=num_ranks)
    assert len(rows) == num_ranks and rows.max() - rows.min() <= 1
    assert rows.sum() == len(lengths) and (deal(lengths, num_ranks) == ranks).all()
    tokens = np.bincount(ranks, lengths, minlength=num_ranks)
    longest, shortest = lengths.max(), lengths.min() if len(lengths) % num_ranks == 0 else 0
    assert tokens.max() - tokens.min() <= longest - shortest


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
    (folder,) = cache_shards(Shards([artifact]), tmp_path / "cache", False)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert cache_shards(Shards([artifact]), tmp_path / "cache", False) == [folder]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before

    def fail(*_):
        raise RuntimeError("killed")

    monkeypatch.setattr("train.data.Path.rename", fail)
    with pytest.raises(RuntimeError, match="killed"):
        cache_shards(Shards([artifact]), tmp_path / "other", False)
    assert list((tmp_path / "other").iterdir()) == []


def test_shards_carry_their_tokenizer(opened):
    artifact, *_ = opened
    assert load_tokenizer(Shards([artifact]))("rose tulip")["input_ids"][0] == 2


@pytest.mark.parametrize("special", [{"eos_token": "[SEP]"}, {}])
def test_a_tokenizer_without_padding_pads_with_its_end_of_text(
    make_shards, tokenizer_folder, tmp_path, special
):
    bare = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_folder / "tokenizer.json"), padding_side="left", **special
    )
    assert bare.pad_token_id is None
    bare.save_pretrained(tmp_path / "bare")
    artifact, _ = make_shards(tmp_path / "root", tokenizer=tmp_path / "bare")
    if not special:
        with pytest.raises(StrataError, match="neither a padding nor an end-of-text token"):
            load_tokenizer(Shards([artifact]))
        return
    tokenizer = load_tokenizer(Shards([artifact]))
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.padding_side) == (
        "[SEP]",
        3,
        "right",
    )


def test_padding_stays_within_what_the_student_takes(opened):
    artifact, _, index, _ = opened
    store = open_store(artifact, Path(artifact.path), max_tokens=21)
    side = store.read(np.arange(240), 0, 1, 8).passage
    lengths = [ids.shape[1] for ids, _ in side.micro_batches]
    assert max(lengths) == 21 and {length for length in lengths if length < 21} <= {8, 16}


def test_teacher_vectors_are_read_with_their_rows(make_shards, tmp_path):
    artifact, table = make_shards(tmp_path / "root", teacher_width=6)
    check_teacher(Shards([artifact]), "a.setting")
    expected = leaf_order(table)
    for teacher in (True, False):  # both caches of the same shards, side by side
        store = open_store(artifact, tmp_path / "cache", teacher)
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
    with pytest.raises(
        StrataError,
        match="a.setting: .* carries no teacher vectors; set shard.teacher_vectors=true",
    ):
        check_teacher(Shards([artifact]), "a.setting")
