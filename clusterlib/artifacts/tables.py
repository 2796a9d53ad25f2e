"""The tables that flow between stages: one pyarrow schema each, ids, and row-level validation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

PAIRS = pa.schema(
    [
        ("pair_id", pa.uint64()),
        ("source", pa.string()),
        ("query_id", pa.uint64()),
        ("query", pa.string()),
        ("passage_id", pa.uint64()),
        ("passage", pa.string()),
        ("topic", pa.string()),
    ]
)

REJECTS = pa.schema(
    [("source", pa.string()), ("file", pa.string()), ("row", pa.int64()), ("reason", pa.string())]
)

# Nodes of every source's merge tree, leaves first: see clusterlib.clusters.tree.
TREE = pa.schema(
    [
        ("source", pa.string()),
        ("node", pa.int32()),
        ("left", pa.int32()),
        ("right", pa.int32()),
        ("first_leaf", pa.int32()),
        ("num_leaves", pa.int32()),
        ("num_pairs", pa.int64()),
    ]
)

# Where the rows of each leaf lie: `num_rows` rows of `file` from `first_row`, inside `row_group`.
INDEX = pa.schema(
    [
        ("source", pa.string()),
        ("leaf", pa.int32()),
        ("file", pa.int32()),
        ("row_group", pa.int32()),
        ("first_row", pa.int64()),
        ("num_rows", pa.int64()),
    ]
)

MEAN = "mean"  # stands for a task, in SCORES and TESTS, where a value is the mean over the tasks

SCORES = pa.schema(
    [
        ("run", pa.string()),
        ("step", pa.int64()),
        ("task", pa.string()),
        ("split", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
    ]
)

# What the student scored while it was trained: a row for every test in the loop, task, split and
# metric.
TESTS = pa.schema(
    [
        ("step", pa.int64()),  # optimizer steps taken before the test
        ("task", pa.string()),
        ("split", pa.string()),  # the task's; empty for MEAN
        ("metric", pa.string()),  # mteb's name of it, such as ndcg_at_10
        ("value", pa.float64()),
    ]
)


# How many texts of each test occur in what is trained on: a row for its queries, its judged
# passages and all its passages. Null is what was not counted.
CONTAMINATION = pa.schema(
    [
        ("test", pa.string()),
        ("hold_out", pa.string()),
        ("texts", pa.string()),
        ("num_texts", pa.int64()),
        ("num_exact", pa.int64()),  # a query or passage of a pair is the text, once normalised
        ("num_near", pa.int64()),  # of the others, those that share a long run of words with one
        ("num_short", pa.int64()),  # too short to share one, so not compared
    ]
)

# The queries and judged passages of tests that occur, with one of the pairs that each occurs in.
MATCHES = pa.schema(
    [
        ("test", pa.string()),
        ("texts", pa.string()),
        ("text", pa.string()),
        ("match", pa.string()),  # exact or near
        ("shared", pa.string()),  # the run of words, where it is near
        ("source", pa.string()),  # of the pair, as the columns below are
        ("side", pa.string()),  # query or passage
        ("training_text", pa.string()),
        ("file", pa.string()),  # part of the embeddings
        ("row", pa.int64()),
    ]
)


def neighbors_schema(width: int) -> pa.Schema:
    """For every row, in leaf order, the numbers of `width` others, nearest first: see
    clusterlib.batches.neighbors.
    """
    return pa.schema([("neighbors", pa.list_(pa.int64(), width))])


def embeddings_schema(width: int) -> pa.Schema:
    """`pairs` and the teacher's unit vectors, float16 of `width` dimensions."""
    vector = pa.list_(pa.float16(), width)
    return pa.schema([*PAIRS, ("query_embedding", vector), ("passage_embedding", vector)])


def centroids_schema(width: int) -> pa.Schema:
    """The merge tree, with the unit mean of each node's sampled pairs, float32 of `width`
    dimensions.
    """
    return pa.schema([*TREE, ("centroid", pa.list_(pa.float32(), width))])


def token_type(vocabulary_size: int) -> pa.DataType:
    """The narrowest type that holds every token id of a vocabulary."""
    return pa.uint16() if vocabulary_size <= 2**16 else pa.int32()


def shards_schema(token: pa.DataType, teacher_width: int | None = None) -> pa.Schema:
    """Rows ready to train on: ids, cluster and unpadded token ids, prompts and special tokens
    included.

    Args:
        teacher_width: dimensions of the teacher's vectors, float16, where they are carried along.
    """
    fields = [
        ("pair_id", pa.uint64()),
        ("source", pa.string()),
        ("leaf", pa.int32()),
        ("query_id", pa.uint64()),
        ("passage_id", pa.uint64()),
        ("query_tokens", pa.list_(token)),
        ("passage_tokens", pa.list_(token)),
    ]
    if teacher_width:
        vector = pa.list_(pa.float16(), teacher_width)
        fields += [("teacher_query", vector), ("teacher_passage", vector)]
    return pa.schema(fields)


def vectors(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A fixed_size_list column as an array [rows, width] of its own dtype, without Python
    objects.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)


def fixed_size_list(matrix: np.ndarray) -> pa.FixedSizeListArray:
    """An array [rows, width] as a fixed_size_list column."""
    return pa.FixedSizeListArray.from_arrays(
        pa.array(np.ascontiguousarray(matrix).reshape(-1)), matrix.shape[1]
    )


def text_ids(texts: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """64-bit ids of texts: equal text, equal id, whatever source or file it was read from.

    Texts that differ only in Unicode composition, case or white space are equal. A billion distinct
    texts collide with probability n^2 / 2^65 = 3%, and a collision only masks one negative.

    Returns:
        uint64 [rows], the xxh3_64 of the normalised UTF-8.
    """
    normal = pc.utf8_normalize(texts, form="NFC")
    normal = pc.utf8_trim_whitespace(pc.replace_substring_regex(pc.utf8_lower(normal), r"\s+", " "))
    values = normal.cast(pa.binary()).to_pylist()
    return np.fromiter(map(xxhash.xxh3_64_intdigest, values), dtype=np.uint64, count=len(values))


def pair_ids(sources: Sequence[str], query_ids: np.ndarray, passage_ids: np.ndarray) -> np.ndarray:
    """64-bit ids of pairs [rows]: of the source and both texts' ids."""
    rows = np.stack([query_ids, passage_ids], axis=1).tobytes()
    return np.fromiter(
        (
            xxhash.xxh3_64_intdigest(source.encode() + rows[16 * row : 16 * row + 16])
            for row, source in enumerate(sources)
        ),
        dtype=np.uint64,
        count=len(query_ids),
    )


def validate_pairs(raw: pa.Table, source: str, max_chars: int) -> tuple[pa.Table, pa.Table]:
    """Rows as read, split into usable pairs and rejects with reasons.

    Args:
        raw: columns file (string) and row (int64, the row's number in its file), query, passage and
            topic, these of any type; topic may be null.
        max_chars: a longer query or passage is refused: it is no text, or needs splitting first.

    Returns:
        A table of schema PAIRS and one of schema REJECTS; together as many rows as `raw`.
    """
    reasons: list[str | None] = [None] * raw.num_rows

    def refuse(rows: np.ndarray, reason: str) -> None:
        for row in np.flatnonzero(rows).tolist():
            reasons[row] = reasons[row] or reason

    texts = {}
    for name in ("query", "passage", "topic"):
        column = raw[name]
        if pa.types.is_null(column.type):
            column = column.cast(pa.string())
        elif not is_text(column.type):
            refuse(np.ones(raw.num_rows, bool), f"{name} is {column.type}, not text")
            column = pa.chunked_array([pa.nulls(raw.num_rows, pa.string())])
        column, undecodable = decode(column)
        refuse(undecodable, f"{name} is not UTF-8")
        texts[name] = column
    for name in ("query", "passage"):
        texts[name] = pc.utf8_trim_whitespace(texts[name])
        length = pc.fill_null(pc.utf8_length(texts[name]), -1).to_numpy()
        refuse(length == -1, f"{name} is missing")
        refuse(length == 0, f"{name} is empty")
        refuse(length > max_chars, f"{name} is over {max_chars} characters")
        # A NUL is one half of UTF-16 read as UTF-8, or binary data.
        nul = pc.match_substring(texts[name], "\0")
        refuse(pc.fill_null(nul, False).to_numpy(), f"{name} holds a NUL character")
    keep = pa.array([reason is None for reason in reasons], pa.bool_())
    # Kept texts are short enough, at max_chars each, for the 32-bit offsets of a string column.
    query, passage, topic = (
        texts[name].filter(keep).cast(pa.string()).combine_chunks() for name in texts
    )
    query_id, passage_id = text_ids(query), text_ids(passage)
    sources = [source] * len(query)
    pairs = pa.Table.from_arrays(
        [
            pa.array(pair_ids(sources, query_id, passage_id)),
            pa.array(sources, pa.string()),
            pa.array(query_id),
            query,
            pa.array(passage_id),
            passage,
            topic,
        ],
        schema=PAIRS,
    )
    bad = raw.select(["file", "row"]).filter(pc.invert(keep))
    refused = [reason for reason in reasons if reason is not None]
    return pairs, rejects(source, bad["file"].to_pylist(), bad["row"].to_pylist(), refused)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text, however it is laid out."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(
        test(kind)
        for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    )


def is_bytes(kind: pa.DataType) -> bool:
    """Whether a column of this type holds bytes, however it is laid out."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(
        test(kind)
        for test in (
            pa.types.is_binary,
            pa.types.is_large_binary,
            pa.types.is_binary_view,
            pa.types.is_fixed_size_binary,
        )
    )


def decode(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, np.ndarray]:
    """A text column as large_string, with null for what is not UTF-8 (Parquet writers do not all
    check).

    Returns:
        The column, and which rows are not UTF-8, bool [rows].
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    undecodable = np.zeros(len(column), bool)
    try:
        column.validate(full=True)
        return column.cast(pa.large_string()), undecodable
    except pa.ArrowInvalid:
        texts: list[str | None] = []
        for row, value in enumerate(column.cast(pa.large_binary()).to_pylist()):
            try:
                texts.append(None if value is None else value.decode())
            except UnicodeDecodeError:
                texts.append(None)
                undecodable[row] = True
        return pa.chunked_array([pa.array(texts, pa.large_string())]), undecodable


def rejects(
    source: str, files: Sequence[str], rows: Sequence[int], reasons: Sequence[str]
) -> pa.Table:
    """A table of schema REJECTS."""
    columns = ([source] * len(rows), files, rows, reasons)
    return pa.Table.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, REJECTS, strict=True)],
        schema=REJECTS,
    )
