"""Texts that have words in common: runs of words as hashes, and texts looked up by them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipelines.held_out import places

# Of a run that two texts share. GPT-3 took the 5th percentile of the lengths of a benchmark's
# texts, at least 8, since shorter runs meet by chance, and at most 13 (arXiv 2005.14165, C.2);
# lm-evaluation-harness takes 13 (docs/decontamination.md).
MIN_WORDS = 8
MAX_WORDS = 13

# All odd, so that no word's hash loses bits to its place in the run.
_FACTORS = np.random.SeedSequence(MAX_WORDS).generate_state(MAX_WORDS, np.uint64) | np.uint64(1)
_SPARE_BITS = 4  # of up to a million keys, one in 16 values that are none passes the first look
_MOST_BITS = 24


@dataclass(frozen=True)
class Words:
    """The words of texts, one after another: runs of letters, marks and digits in lower case.

    Attributes:
        words: [W], dictionary-encoded.
        rows: int64 [W], the number of the text that each is of.
    """

    words: pa.DictionaryArray
    rows: np.ndarray

    def run(self, start: int, length: int) -> str:
        """The words from one on."""
        return " ".join(self.words.slice(start, length).to_pylist())

    def runs(self, lengths: Sequence[int]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(length, hashes uint64 [n], places of the first words int64 [n]) of all runs of words of
        one text, for each of `lengths`.
        """
        names = self.words.dictionary.cast(pa.binary()).to_pylist()
        distinct = np.fromiter(map(xxhash.xxh3_64_intdigest, names), np.uint64, len(names))
        hashes = distinct[self.words.indices.to_numpy()]
        sums = np.zeros(len(hashes), np.uint64)
        for length in range(1, max(lengths, default=0) + 1):
            last = hashes[length - 1 :]
            sums = sums[: len(last)] + last * _FACTORS[length - 1]
            if length in lengths:
                starts = np.flatnonzero(self.rows[: len(last)] == self.rows[length - 1 :])
                yield length, sums[starts], starts


def words(texts: pa.Array) -> Words:
    """Cut texts into words, whatever their case, punctuation and Unicode composition."""
    normal = pc.utf8_lower(pc.utf8_normalize(texts, form="NFC"))
    spaced = pc.ascii_trim_whitespace(
        pc.replace_substring_regex(normal, r"[^\p{L}\p{M}\p{N}]+", " ")
    )
    lists = pc.ascii_split_whitespace(pc.if_else(pc.equal(spaced, ""), None, spaced))
    rows = pc.list_parent_indices(lists).to_numpy()
    return Words(pc.list_flatten(lists).dictionary_encode(), rows)


class Lookup:
    """Numbers of texts by keys, such as hashes of their runs of words."""

    def __init__(self, keys: np.ndarray, numbers: np.ndarray) -> None:
        """
        Args:
            keys: uint64 [n], spread evenly over all values; a key may have several numbers.
            numbers: int64 [n].
        """
        order = np.argsort(keys, kind="stable")
        self._numbers = numbers[order]
        self._keys, starts = np.unique(keys[order], return_index=True)
        self._starts = np.append(starts, len(keys))
        # Nearly all values are none of the keys: a look at their first bits sorts most of them out.
        bits = min(len(keys).bit_length() + _SPARE_BITS, _MOST_BITS)
        self._shift = np.uint64(64 - bits)
        self._begins = np.zeros(1 << bits, bool)
        self._begins[keys >> self._shift] = True

    def first(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The numbers, distinct and sorted, of which a key is among `values`, and where the first
        of these stands there; int64 [n] both.
        """
        candidates = np.flatnonzero(self._begins[values >> self._shift])
        keys, first = np.unique(places(values[candidates], self._keys), return_index=True)
        keys, first = keys[keys >= 0], first[keys >= 0]
        counts = self._starts[keys + 1] - self._starts[keys]
        skipped = np.repeat(self._starts[keys] - np.cumsum(counts) + counts, counts)
        numbers = self._numbers[skipped + np.arange(len(skipped))]
        at = np.repeat(candidates[first], counts)
        order = np.lexsort((at, numbers))
        distinct, first = np.unique(numbers[order], return_index=True)
        return distinct, at[order][first]
