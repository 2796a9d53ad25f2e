"""A rank's rows of each planned batch, read from a memory-mapped cache of the shards on its
node.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from clusterlib.artifacts.artifact import Artifact
from clusterlib.artifacts.tables import vectors
from clusterlib.clusters.shards import ShardIndex, Shards
from clusterlib.errors import StrataError
from train.cache import building
from train.loss import Pairs

TOKENIZER = "tokenizer"  # folder of the tokenizer inside a `shards` artifact
_IDS = ["query_id", "passage_id"]
_TOKENS = ["query_tokens", "passage_tokens"]
_TEACHER = ["teacher_query", "teacher_passage"]
# Sequence lengths are multiples of this, which suits tensor cores (NVIDIA, "Matrix Multiplication
# Background").
_PAD_MULTIPLE = 8


class _Ragged:
    """A list<integer> column as flat values and offsets, both mapped from the file."""

    def __init__(self, column: pa.ListArray) -> None:
        self.offsets = column.offsets.to_numpy()
        self.values = column.values.to_numpy()

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """int64 [n]; values are not touched."""
        return self.offsets[rows + 1].astype(np.int64) - self.offsets[rows]

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values of the rows, one after the other, and the length of each."""
        starts, lengths = self.offsets[rows].astype(np.int64), self.lengths(rows)
        ends = np.cumsum(lengths)
        positions = np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
        return self.values[positions], lengths


class _File:
    """The columns of one cached shard."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        # Ids are only compared, so int64 of the same bits stand for uint64, which torch lacks.
        self.pairs = {name: batch[name].to_numpy().view(np.int64) for name in _IDS}
        self.pairs |= {
            name: vectors(batch[name]) for name in _TEACHER if name in batch.schema.names
        }
        self.query_tokens = _Ragged(batch["query_tokens"])
        self.passage_tokens = _Ragged(batch["passage_tokens"])


@dataclass(frozen=True)
class Side:
    """The queries or the passages of a rank's batch, in micro-batches of similar length.

    Attributes:
        micro_batches: (token ids int64 [m, T], attention mask int64 [m, T]) each.
        places: int64 [b]; row i of the batch is row places[i] of the concatenated micro-batches.
    """

    micro_batches: list[tuple[Tensor, Tensor]]
    places: Tensor


@dataclass(frozen=True)
class RankBatch:
    """One rank's b pairs of a global batch.

    Attributes:
        rows: int64 [b], their numbers in leaf order.
        num_tokens: of the global batch, over all ranks.
    """

    rows: np.ndarray
    query: Side
    passage: Side
    pairs: Pairs
    num_tokens: int

    def to(self, device: torch.device) -> RankBatch:
        def move(side: Side) -> Side:
            moved = [(ids.to(device), mask.to(device)) for ids, mask in side.micro_batches]
            return Side(moved, side.places.to(device))

        return dataclasses.replace(
            self,
            query=move(self.query),
            passage=move(self.passage),
            pairs=self.pairs.map(lambda tensor: tensor.to(device)),
        )


def load_tokenizer(shards: Shards) -> Any:
    """The tokenizer that made the shards, which each carries, as the student shall have it: it pads
    on the right, as training does, with its end-of-text token where it has none to pad with, as
    decoders' tokenizers have.

    Raises:
        StrataError: it has neither.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(
            shards.artifacts[0].download(TOKENIZER, Path(folder)), trust_remote_code=False
        )
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise StrataError(
                f"{shards.artifacts[0].name}: its tokenizer has neither a padding nor an "
                "end-of-text token, so texts of different length cannot be batched; give "
                "shard.tokenizer's tokenizer_config.json a pad_token that it knows"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_teacher(shards: Shards, setting: str) -> None:
    """Refuse a setting that needs the teacher's vectors where there are none.

    Raises:
        StrataError: the shards carry none.
    """
    for artifact in shards.artifacts:
        if not artifact.config["shard"]["teacher_vectors"]:
            raise StrataError(
                f"{setting}: {artifact.name} carries no teacher vectors; set "
                "shard.teacher_vectors=true"
            )


def cache_shards(shards: Shards, cache_dir: Path, teacher: bool) -> list[Path]:
    """Copy ids and tokens of all shards to Arrow IPC files on this node, once; later calls find
    them, those of other runs too.

    Call it from one process a node. A folder appears whole or not at all.

    Args:
        teacher: copy the teacher's vectors too; see `check_teacher`.

    Returns:
        A folder for each artifact.
    """
    return [_cache(artifact, cache_dir.expanduser(), teacher) for artifact in shards.artifacts]


def _cache(artifact: Artifact, cache_dir: Path, teacher: bool) -> Path:
    columns = [*_IDS, *_TOKENS, *(_TEACHER if teacher else [])]
    suffix = "-teacher" if teacher else ""
    final = cache_dir / f"{artifact.fingerprint}-{artifact.manifest['digest']}{suffix}"
    if final.is_dir():
        os.utime(final)  # `strata clean` asks when it was used last
        return final
    with building(final.parent) as folder:
        for number, part in enumerate(artifact.parts()):
            table = artifact.read_part(part, columns).combine_chunks()
            with pa.ipc.new_file(folder / f"{number:06d}.arrow", table.schema) as writer:
                writer.write_table(table)
        try:
            folder.rename(final)
        except OSError:
            if not final.is_dir():  # another process of this node may have been first
                raise
    return final


def _pairs(pieces: Sequence[tuple[_File, np.ndarray]], columns: Sequence[str]) -> Pairs:
    return Pairs(
        **{
            name: torch.from_numpy(
                np.concatenate([file.pairs[name][rows] for file, rows in pieces])
            )
            for name in columns
        }
    )


def deal(lengths: np.ndarray, num_ranks: int) -> np.ndarray:
    """The rank of each row, so that ranks have as many rows as each other, or one more, and about
    as many tokens.

    Longest first, W rows at a time for W ranks, the longer the row the fewer tokens its rank has so
    far: so two ranks never differ by more tokens than the longest and the shortest row do. ("RLPT"
    in Tsai 1992, Asymptotic analysis of an algorithm for balanced parallel processor scheduling,
    SIAM J. Comput. 21.)

    Args:
        lengths: int64 [B], tokens of each row.

    Returns:
        int64 [B].
    """
    ranks = np.empty(len(lengths), np.int64)
    num_tokens = np.zeros(num_ranks, np.int64)
    by_length = np.argsort(-lengths, kind="stable")
    for first in range(0, len(lengths), num_ranks):
        taken = by_length[first : first + num_ranks]
        takers = np.argsort(num_tokens, kind="stable")[: len(taken)]
        ranks[taken] = takers
        num_tokens[takers] += lengths[taken]
    return ranks


class TokenStore:
    """Reads planned rows from the folders that `cache_shards` made.

    Args:
        teacher: batches carry the teacher's vectors.
        max_tokens: rows are padded to no more, where the student takes no more; no row has more.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        index: ShardIndex,
        pad_token_id: int,
        teacher: bool = False,
        max_tokens: int | None = None,
    ) -> None:
        self._index = index
        self._pad_token_id = pad_token_id
        self._max_tokens = max_tokens
        self._columns = [*_IDS, *(_TEACHER if teacher else [])]
        self._files: dict[int, _File] = {}
        paths = [path for folder in folders for path in sorted(folder.glob("*.arrow"))]
        for number, path in enumerate(paths):
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            if reader.num_record_batches:
                self._files[number] = _File(reader.get_batch(0))

    def read(self, rows: np.ndarray, rank: int, num_ranks: int, micro_batch_size: int) -> RankBatch:
        """The share of a global batch that `rank` works on: as many pairs as any other's, with
        about as many tokens.

        Every rank deals the whole batch by the lengths alone, so all come to the same shares
        without a word. The order of a batch does not matter to the loss, so a share is in file
        order, which reads best.

        Args:
            rows: int64 [B], numbers in leaf order.

        Raises:
            StrataError: B is no multiple of `num_ranks`.
        """
        if len(rows) % num_ranks:
            raise StrataError(
                f"a batch of {len(rows)} pairs cannot be shared out evenly over {num_ranks} ranks; "
                "set train.num_workers to a divisor of batching.global_batch_size"
            )
        order, files, file_rows = self._in_file_order(rows)
        lengths = np.concatenate(
            [
                file.query_tokens.lengths(rows) + file.passage_tokens.lengths(rows)
                for file, rows in self._pieces(files, file_rows)
            ]
        )
        mine = np.flatnonzero(deal(lengths, num_ranks) == rank)
        pieces = self._pieces(files[mine], file_rows[mine])
        query = self._side([(file.query_tokens, rows) for file, rows in pieces], micro_batch_size)
        passage = self._side(
            [(file.passage_tokens, rows) for file, rows in pieces], micro_batch_size
        )
        return RankBatch(
            rows[order[mine]], query, passage, _pairs(pieces, self._columns), int(lengths.sum())
        )

    def pairs(self, rows: np.ndarray) -> Pairs:
        """Ids and the teacher's vectors of rows given by their numbers in leaf order, in the order
        given.
        """
        order, files, file_rows = self._in_file_order(rows)
        places = torch.from_numpy(np.argsort(order))
        return _pairs(self._pieces(files, file_rows), [*_IDS, *_TEACHER]).map(
            lambda tensor: tensor[places]
        )

    def _in_file_order(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The order, and in it the file and the row there of each row, all int64 [n]."""
        files, file_rows = self._index.locate(rows)
        order = np.lexsort((file_rows, files))
        return order, files[order], file_rows[order]

    def _pieces(self, files: np.ndarray, file_rows: np.ndarray) -> list[tuple[_File, np.ndarray]]:
        """Rows in file order as a list of (file, rows there)."""
        edges = [0, *(np.flatnonzero(np.diff(files)) + 1).tolist(), len(files)]
        return [
            (self._files[int(files[start])], file_rows[start:stop])
            for start, stop in itertools.pairwise(edges)
        ]

    def _side(self, pieces: Sequence[tuple[_Ragged, np.ndarray]], size: int) -> Side:
        """Micro-batches of `size` rows, longest rows first."""
        taken = [column.take(rows) for column, rows in pieces]
        values = np.concatenate([values for values, _ in taken])
        lengths = np.concatenate([lengths for _, lengths in taken])
        starts = np.cumsum(lengths) - lengths
        by_length = np.argsort(-lengths, kind="stable")
        micro_batches = []
        for first in range(0, len(lengths), size):
            rows = by_length[first : first + size]
            longest = -(-int(lengths[rows].max()) // _PAD_MULTIPLE) * _PAD_MULTIPLE
            longest = min(longest, self._max_tokens or longest)
            columns = np.arange(longest)
            mask = columns < lengths[rows, None]
            positions = np.where(mask, starts[rows, None] + columns, 0)
            ids = np.where(mask, values[positions].astype(np.int64), self._pad_token_id)
            micro_batches.append((torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))))
        places = np.empty(len(lengths), np.int64)
        places[by_length] = np.arange(len(lengths))
        return Side(micro_batches, torch.from_numpy(places))
