import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import CountVectorizer

from pipelines.overlap import Lookup, words

TEXTS = st.lists(
    st.lists(st.sampled_from(["a", "B,", "(c", "Été", "x_y", "?!", "7.5"]), max_size=12).map(
        " ".join
    ),
    max_size=8,
)


def ngrams(text, length):
    """What scikit-learn cuts a text into; as here, an underscore ends a word."""
    vectorizer = CountVectorizer(ngram_range=(length, length), token_pattern=r"(?u)[^\W_]+")
    return vectorizer.build_analyzer()(text)


@given(TEXTS)
def test_words_and_runs_are_scikit_learns(texts):
    cut = words(pa.array(texts, pa.string()))
    for length, hashes, starts in cut.runs([1, 3, 5]):
        expected = [(row, gram) for row, text in enumerate(texts) for gram in ngrams(text, length)]
        found = [(cut.rows[start], cut.run(start, length)) for start in starts.tolist()]
        assert found == expected
        assert len(set(hashes.tolist())) == len({gram for _, gram in expected})
        by_hash = dict(zip(hashes.tolist(), (gram for _, gram in expected), strict=True))
        assert [by_hash[each] for each in hashes.tolist()] == [gram for _, gram in expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't stop-me NOW!", ["don", "t", "stop", "me", "now"]),
        ("e\u0301te\u0301 d’hiver", ["été", "d", "hiver"]),
        ("हिन्दी में", ["हिन्दी", "में"]),  # its vowels are marks
        (" - … ", []),
        ("", []),
    ],
)
def test_words_are_runs_of_letters_marks_and_digits(text, expected):
    cut = words(pa.array(["before", text, "after"]))
    assert cut.words.to_pylist() == ["before", *expected, "after"]
    assert cut.rows.tolist() == [0, *[1] * len(expected), 2]


# As hashes are, these are spread over all values.
KEYS = st.integers(0, 30).map(lambda number: number * 0x084210842108421)


@given(st.lists(st.tuples(KEYS, st.integers(0, 5))), st.lists(KEYS))
def test_a_lookup_finds_each_number_where_its_first_key_stands(pairs, values):
    lookup = Lookup(
        np.array([key for key, _ in pairs], np.uint64), np.array([n for _, n in pairs], np.int64)
    )
    numbers, places = lookup.first(np.array(values, np.uint64))
    expected = {
        number: min(values.index(key) for key, other in pairs if other == number and key in values)
        for number in {number for key, number in pairs if key in values}
    }
    assert dict(zip(numbers.tolist(), places.tolist(), strict=True)) == expected
    assert numbers.tolist() == sorted(expected)
