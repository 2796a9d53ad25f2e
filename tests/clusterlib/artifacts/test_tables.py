import numpy as np
import pyarrow as pa
import pytest

from clusterlib.artifacts.tables import (
    PAIRS,
    REJECTS,
    embeddings_schema,
    fixed_size_list,
    pair_ids,
    text_ids,
    token_type,
    validate_pairs,
    vectors,
)


def raw(query, passage, topic=None):
    count = len(query)
    return pa.table(
        {
            "file": pa.array(["file.parquet"] * count, pa.string()),
            "row": pa.array(range(10, 10 + count), pa.int64()),
            "query": query,
            "passage": passage,
            "topic": pa.array(topic or [None] * count, pa.string()),
        }
    )


def test_equal_texts_have_equal_ids_whatever_their_case_space_and_composition():
    ids = text_ids(pa.array(["Café  au\tlait", "cafe\u0301 AU lait ", "cafe au lait"]))
    assert ids[0] == ids[1] != ids[2]
    assert ids.dtype == np.uint64


def test_ids_are_stable_across_versions():
    # Artifacts outlive a process: these are xxh3_64 of the normalised text and must never change.
    assert text_ids(pa.array(["hello world"])).tolist() == [0xD447B1EA40E6988B]


def test_pair_ids_tell_sources_and_sides_apart():
    a, b = np.array([1], np.uint64), np.array([2], np.uint64)
    assert (
        len(
            {
                int(pair_ids([source], q, p)[0])
                for source, q, p in (("s", a, b), ("s", b, a), ("t", a, b))
            }
        )
        == 3
    )


def test_unusable_rows_are_refused_with_row_and_reason_and_none_is_lost():
    table = raw(["q1", "", None, "q4", "  ", "q6"], ["p1", "p2", "p3", "", None, "x" * 21])
    pairs, rejects = validate_pairs(table, "src", max_chars=20)
    assert pairs.schema == PAIRS and rejects.schema == REJECTS
    assert pairs["query"].to_pylist() == ["q1"] and pairs["source"].to_pylist() == ["src"]
    assert list(zip(rejects["row"].to_pylist(), rejects["reason"].to_pylist(), strict=True)) == [
        (11, "query is empty"),
        (12, "query is missing"),
        (13, "passage is empty"),
        (14, "query is empty"),
        (15, "passage is over 20 characters"),
    ]
    assert pairs.num_rows + rejects.num_rows == table.num_rows


def test_a_column_of_numbers_is_refused_by_its_type():
    pairs, rejects = validate_pairs(raw(["q", "r"], pa.array([1, 2])), "src", 100)
    assert pairs.num_rows == 0
    assert rejects["reason"].to_pylist() == ["passage is int64, not text"] * 2


def test_text_that_is_not_utf8_is_refused_row_by_row():
    binary = pa.array([b"fine", b"\xff\xfe", None], pa.binary())
    column = pa.Array.from_buffers(pa.string(), 3, binary.buffers())
    pairs, rejects = validate_pairs(raw(column, ["p", "p", "p"]), "src", 100)
    assert pairs["query"].to_pylist() == ["fine"]
    assert rejects["reason"].to_pylist() == ["query is not UTF-8", "query is missing"]


def test_vectors_round_trip_through_a_column_and_its_chunks():
    matrix = np.arange(24, dtype=np.float16).reshape(6, 4)
    chunked = pa.chunked_array([fixed_size_list(matrix[:2]), fixed_size_list(matrix[2:])])
    np.testing.assert_array_equal(vectors(chunked), matrix)
    np.testing.assert_array_equal(vectors(chunked.slice(1, 3)), matrix[1:4])
    assert vectors(chunked.slice(0, 0)).shape == (0, matrix.shape[1])
    assert chunked.type == embeddings_schema(4).field("query_embedding").type


@pytest.mark.parametrize(
    ("size", "dtype"), [(30522, pa.uint16()), (65536, pa.uint16()), (65537, pa.int32())]
)
def test_token_type_holds_the_largest_id(size, dtype):
    assert token_type(size) == dtype
    pa.array([size - 1], token_type(size))
