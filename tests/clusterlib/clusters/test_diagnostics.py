import numpy as np
import pytest

from clusterlib.clusters.diagnostics import imbalance, top_terms


def test_imbalance_is_1_when_equal_and_k_when_one_holds_all():
    assert imbalance([5, 5, 5, 5]) == pytest.approx(1)
    assert imbalance([20, 0, 0, 0]) == pytest.approx(4)
    assert imbalance(np.array([3, 1])) == pytest.approx(2 * (9 + 1) / 16)


def test_top_terms_set_clusters_apart():
    texts = ["apple fruit common"] * 5 + ["engine motor common"] * 5
    terms = top_terms(texts, np.array([0] * 5 + [1] * 5), 3, 2)
    assert sorted(terms[0]) == ["apple", "fruit"] and sorted(terms[1]) == ["engine", "motor"]
    assert terms[2] == []


def test_texts_without_repeated_words_have_no_terms():
    assert top_terms(["one", "two"], np.array([0, 1]), 2, 3) == [[], []]
