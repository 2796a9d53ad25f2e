"""What a clustering looks like: sizes, agreement, terms."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np


def imbalance(sizes: Sequence[int] | np.ndarray) -> float:
    """k times the sum of squared shares: 1 when all clusters are equal, k when one holds
    everything.

    As reported by FAISS (`imbalance_factor` in faiss/utils/utils.cpp).
    """
    shares = np.asarray(sizes, float) / np.sum(sizes)
    return float(len(shares) * (shares**2).sum())


def agreement(labelings: Sequence[np.ndarray]) -> float | None:
    """Mean adjusted Rand index over pairs of clusterings of the same points; None of fewer than
    two.

    1 when they are the same up to names, about 0 when they are independent (Hubert & Arabie 1985,
    doi:10.1007/BF01908075).
    """
    from sklearn.metrics import adjusted_rand_score

    scores = [
        adjusted_rand_score(first, second) for first, second in itertools.combinations(labelings, 2)
    ]
    return float(np.mean(scores)) if scores else None


def top_terms(
    texts: Sequence[str], clusters: np.ndarray, k: int, num_terms: int
) -> list[list[str]]:
    """The words that tell each cluster from the others, by class-based TF-IDF.

    A word's weight in a cluster is its share of the cluster's words times log(1 + A / f), A the
    mean number of words of a cluster and f the word's count over all (Grootendorst 2022, arXiv
    2203.05794, eq. 2).

    Args:
        clusters: int [rows], the cluster of each text.

    Returns:
        For each of k clusters, up to `num_terms` words, strongest first.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    vectorizer = CountVectorizer(
        stop_words="english", token_pattern=r"(?u)\b[^\W\d_]\w+\b", min_df=2
    )
    try:
        words = vectorizer.fit_transform(texts)
    except ValueError:  # no word occurs twice
        return [[] for _ in range(k)]
    counts = np.stack(
        [np.asarray(words[clusters == cluster].sum(axis=0)).ravel() for cluster in range(k)]
    )
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    weights = counts / totals * np.log1p(counts.sum() / k / np.maximum(counts.sum(axis=0), 1))
    names = vectorizer.get_feature_names_out()
    return [
        [str(names[word]) for word in np.argsort(-row, kind="stable")[:num_terms] if row[word] > 0]
        for row in weights
    ]
