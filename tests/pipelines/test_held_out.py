"""What tests hold out: against a set of normalised texts, for every policy."""

import json
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterlib.artifacts.tables import text_ids
from pipelines.held_out import held_out, held_out_content, places
from pipelines.retrieval_tests import RetrievalTestConfig, TaskConfig

POLICIES = ("corpus", "judged", "none")
# Few words, so that texts meet; case, spaces and an accent composed and not, so that they must be
# normalised to.
TEXT = st.sampled_from(["a", "B", "b  ", "a b", "A\tB", "é", "e\u0301", "a é", "c", "a b c", "b c"])
PASSAGE = st.tuples(st.sampled_from(["", "a", "a b", " "]), TEXT, st.booleans())


def normal(text):
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def write_beir(folder, passages, queries):
    """A BEIR folder of (title, text, whether judged) and queries, all of which judge the same."""
    (folder / "qrels").mkdir(parents=True)
    corpus = [
        {"_id": f"p{number}", "title": title, "text": text}
        for number, (title, text, _) in enumerate(passages)
    ]
    asked = [{"_id": f"q{number}", "text": text} for number, text in enumerate(queries)]
    asked.append({"_id": "unasked", "text": "c"})
    for name, rows in (("corpus", corpus), ("queries", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = [
        f"q{query}\tp{passage}\t{int(found)}\n"
        for query in range(len(queries))
        for passage, (_, _, found) in enumerate(passages)
    ]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged))


def expected(policy, passages, queries):
    """Every normalised text that a policy holds out."""
    if policy == "none":
        return set()
    held = {normal(query) for query in queries}
    for title, text, judged in passages:
        if judged or policy == "corpus":
            held |= {normal(text), normal(f"{title} {text}")}
    return held


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(POLICIES),
    st.lists(PASSAGE, min_size=1, max_size=5),
    st.lists(TEXT, min_size=1, max_size=3),
    st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=20),
)
def test_rows_left_never_hold_a_held_out_text(policy, passages, queries, rows):
    passages = [*passages, ("", "judged for all", True)]
    with tempfile.TemporaryDirectory() as folder:
        write_beir(Path(folder), passages, queries)
        test = RetrievalTestConfig(name="t", format="beir", path=folder, hold_out=policy)
        held = held_out([test])
    sides = [text_ids(pa.array(side)) for side in zip(*rows, strict=True)]
    found = held.find(*sides) >= 0
    texts = expected(policy, passages, queries)
    assert found.tolist() == [normal(q) in texts or normal(p) in texts for q, p in rows]
    assert set(held.ids.tolist()) == set(text_ids(pa.array(sorted(texts), pa.string())).tolist())


@given(st.lists(st.integers(0, 50)), st.lists(st.integers(0, 50), unique=True))
def test_places_are_those_of_a_list(values, keys):
    keys.sort()
    found = places(np.array(values, np.uint64), np.array(keys, np.uint64))
    assert found.tolist() == [keys.index(value) if value in keys else -1 for value in values]


def test_the_reason_names_the_test_and_the_text(tmp_path):
    write_beir(tmp_path / "one", [("", "judged", True), ("", "other", False)], ["asked"])
    write_beir(tmp_path / "two", [("T", "other", True)], ["asked"])
    one, two = (
        RetrievalTestConfig(name=name, format="beir", path=str(tmp_path / name), hold_out=policy)
        for name, policy in (("one", "judged"), ("two", "corpus"))
    )

    def reasons(tests, *texts):
        held = held_out(tests)
        numbers = held.find(*(text_ids(pa.array([text])) for text in texts))
        return [held.reasons[number] for number in numbers if number >= 0]

    assert reasons([one, two], "judged") == ["equals a passage of the test one"]
    assert reasons([one, two], "asked") == ["equals a query of the test one"]
    assert reasons([two, one], "asked") == ["equals a query of the test two"]
    assert reasons([one, two], "t OTHER") == ["equals a passage of the test two"]
    assert reasons([one], "other") == reasons([one, two], "else") == reasons([], "asked") == []
    assert reasons([one, two], "else", "other") == ["equals a passage of the test two"]
    assert reasons([one, two], "asked", "other") == ["equals a query of the test one"]


def test_what_is_held_out_has_neither_name_nor_place_nor_order(tmp_path):
    for name in ("one", "two", "copy"):
        write_beir(tmp_path / name, [("", name.replace("copy", "one"), True)], ["q"])

    def content(*names, **changes):
        return held_out_content(
            [
                RetrievalTestConfig(
                    **{"name": name, "format": "beir", "path": str(tmp_path / name)} | changes
                )
                for name in names
            ]
        )

    assert content("one") == content("copy") == content("one", "copy") == content("one", name="x")
    assert content("one", "two") == content("two", "one") != content("one")
    assert content("one", hold_out="judged") != content("one")
    assert content("one", hold_out="none") == content() == []


@pytest.mark.parametrize(
    ("policy", "texts"),
    [
        ("none", []),
        ("judged", ["first question", "second question", "title first answer", "first answer"]),
        (
            "corpus",
            [
                "first question", "second question", "title first answer", "first answer",
                "second answer", "nobody asks",
            ],
        ),
    ],
)  # fmt: skip
def test_a_task_of_mteb_goes_by_its_policy(local_task, policy, texts):
    held = held_out([TaskConfig(name=local_task, hold_out=policy)])
    assert set(held.ids.tolist()) == set(text_ids(pa.array(texts, pa.string())).tolist())


def test_docstrings_are_held_out_as_other_tests_are():
    test = RetrievalTestConfig(name="t", format="docstrings", path="sklearn.cluster")
    corpus, judged, none = (len(held_out([test.replace(hold_out=p)]).ids) for p in POLICIES)
    assert corpus == judged > 0 == none
