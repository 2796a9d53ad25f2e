"""What of tests occurs in what is trained on, against sets of texts and scikit-learn's n-grams."""

import json
from unicodedata import normalize

import pyarrow as pa
import pytest
import ray
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import CountVectorizer

from clusterlib.artifacts.artifact import Root, Spec
from clusterlib.artifacts.draft import Draft, Receipt
from clusterlib.artifacts.tables import PAIRS, pair_ids, rejects, text_ids
from clusterlib.errors import StrataError
from pipelines import contamination as stage
from pipelines.cli import main
from pipelines.contamination import (
    STAGE,
    Source,
    _gathered,
    _Worker,
    collect,
    contamination_spec,
    rejected_rows,
    summary,
)
from pipelines.retrieval_tests import RetrievalTestConfig, TaskConfig
from pipelines.stage import find_or_make

RUN = "the quick brown fox jumps over the lazy dog while seven grey cats look on in silence"


def as_test(folder, passages, queries, **changes):
    """A BEIR test of (title, text, whether judged) and queries."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    passages = [*passages, ("", "judged for each", True)]
    corpus = [
        {"_id": f"p{number}", "title": title, "text": text}
        for number, (title, text, _) in enumerate(passages)
    ]
    asked = [{"_id": f"q{number}", "text": text} for number, text in enumerate(queries)]
    for name, rows in (("corpus", corpus), ("queries", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = [number for number, (*_, found) in enumerate(passages) if found]
    lines = [f"q{q}\tp{p}\t1\n" for q in range(len(queries)) for p in judged]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    settings = {"name": "t", "format": "beir", "path": str(folder), "hold_out": "none", **changes}
    return RetrievalTestConfig(**settings)


def trained_on(root, pairs, left_out=()):
    """What the stage reads, in two parts: pairs as embeddings without vectors, and shards that hold
    all of them but the rows `left_out`; the spec of the latter.
    """
    of_pairs = Spec("embeddings", 1, {"pairs": pairs})
    embeddings = Draft(root, of_pairs)
    spec = Spec("shards", 1, {"left_out": list(left_out)}, {"embeddings": of_pairs}, label="s")
    shards = Draft(root, spec)
    made, kept, refused = [], [], []
    middle = len(pairs) // 2
    for first, rows in ((0, pairs[:middle]), (middle, pairs[middle:])):
        query, passage = (pa.array(side, pa.string()) for side in zip(*rows, strict=True))
        query_ids, passage_ids = text_ids(query), text_ids(passage)
        columns = [
            pair_ids(["s"] * len(rows), query_ids, passage_ids), ["s"] * len(rows),
            query_ids, query, passage_ids, passage, pa.nulls(len(rows), pa.string()),
        ]  # fmt: skip
        table = pa.Table.from_arrays([pa.array(column) for column in columns], schema=PAIRS)
        part = embeddings.write("embeddings", f"{first}", PAIRS, [table])
        made.append(part)
        inside = [row - first for row in left_out if first <= row < first + len(rows)]
        left = table.filter(pa.array([row not in inside for row in range(len(rows))]))
        kept.append(shards.write("shards", f"{first}", PAIRS, [left]))
        table = rejects("s", [part.path] * len(inside), inside, ["why"] * len(inside))
        refused.append(shards.write("rejects", f"{first}", table.schema, [table]))
    num_rows = len(pairs)
    embeddings.publish([Receipt(made, num_rows)])
    shards.publish([Receipt([*kept, *refused], num_rows, {"why": len(left_out)})])
    return spec


def make(root, tests, shards):
    return find_or_make(STAGE, [contamination_spec(tests, {"s": shards}, "arm")], root)[0]


def look(root, tests, pairs, left_out=(), block_rows=3):
    """The stage in this process: its counts and matches as dicts."""
    shards = trained_on(root, pairs, left_out)
    wanted = collect(tests)
    draft = Draft(root, contamination_spec(tests, {"s": shards}, "arm"))
    embeddings = root.open(shards.inputs["embeddings"])
    source = Source(embeddings, rejected_rows(root.open(shards)))
    worker = _Worker(draft, ray.put((wanted.index, [source])))
    blocks = enumerate(embeddings.blocks(block_rows))
    receipts = [worker((0, number, block)) for number, block in blocks]
    found, others = _gathered(draft, receipts, wanted)
    return wanted.table(found, others).to_pylist(), wanted.matches(found).to_pylist()


def normal(text):
    return " ".join(normalize("NFC", text).lower().split())


def ngrams(text, length):
    analyzer = CountVectorizer(ngram_range=(length, length), token_pattern=r"(?u)\w+")
    return set(analyzer.build_analyzer()(normal(text)))


def match(forms, pairs):
    """How a text with these forms occurs in pairs."""
    sides = [side for pair in pairs for side in pair]
    if {normal(form) for form in forms} & {normal(side) for side in sides}:
        return "exact"
    for form in forms:
        length = min(13, len(ngrams_of_one(form)))
        if length >= 8 and any(ngrams(form, length) & ngrams(side, length) for side in sides):
            return "near"
    return None


def ngrams_of_one(text):
    return CountVectorizer(token_pattern=r"(?u)\w+").build_analyzer()(normal(text))


WORDS = RUN.split()
PIECE = st.builds(
    lambda start, length, mark, upper, prefix: (
        (prefix + (mark + " ").join(WORDS[start : start + length])).swapcase()
        if upper
        else prefix + (mark + " ").join(WORDS[start : start + length])
    ),
    st.integers(0, 9),
    st.integers(1, 17),
    st.sampled_from(["", ",", " -"]),
    st.booleans(),
    st.sampled_from(["", "", "é ", "e\u0301 another start, ", "  "]),
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.tuples(PIECE, PIECE), min_size=2, max_size=8),
    st.lists(st.tuples(st.sampled_from(["", "Title", RUN[:30]]), PIECE, st.booleans()), max_size=5),
    st.lists(PIECE, min_size=1, max_size=4),
    st.sets(st.integers(0, 7)),
)
def test_exact_and_near_are_those_of_sets(
    ray_running, tmp_path_factory, pairs, passages, queries, left_out
):
    folder = tmp_path_factory.mktemp("case")
    left_out = sorted(row for row in left_out if row < len(pairs))
    tests = [as_test(folder / "test", passages, queries)]
    counts, matches = look(Root(str(folder / "root")), tests, pairs, left_out)

    trained = [pair for row, pair in enumerate(pairs) if row not in left_out]
    texts = {
        "queries": [[query] for query in queries],
        "judged passages": [[f"{t} {x}".strip(), x] for t, x, judged in passages if judged],
    }
    texts["judged passages"].append(["judged for each"])
    expected = {name: [match(forms, trained) for forms in found] for name, found in texts.items()}
    for row in counts[:2]:
        found = expected[row["texts"]]
        assert row["num_texts"] == len(found)
        assert (row["num_exact"], row["num_near"]) == (found.count("exact"), found.count("near"))
        short = [forms for forms in texts[row["texts"]] if len(ngrams_of_one(forms[0])) < 8]
        assert row["num_short"] == len(short)
    everything = [[f"{t} {x}".strip(), x] for t, x, _ in passages] + [["judged for each"]]
    exact = sum(match(forms, trained) == "exact" for forms in everything)
    assert (counts[2]["num_texts"], counts[2]["num_exact"]) == (len(everything), exact)
    assert counts[2]["num_near"] is counts[2]["num_short"] is None

    assert [row["match"] for row in matches] == [
        found for name in texts for found in expected[name] if found
    ]
    for row in matches:
        side = row["training_text"]
        assert side in {pair[row["side"] == "passage"] for pair in trained}
        if row["match"] == "near":
            assert f" {row['shared']} " in f" {' '.join(ngrams_of_one(side))} "


@pytest.mark.parametrize("block_rows", [1, 2, 100])
def test_it_is_the_same_however_pairs_are_cut_into_blocks(ray_running, tmp_path, block_rows):
    pairs = [("q", RUN), (RUN.upper(), "p"), ("q", f"other words and {RUN}"), ("z", "alone")]
    passages = [("A title", "alone", False), ("", RUN, True), ("", f"{RUN}, they say.", True)]
    tests = [as_test(tmp_path / "test", passages, [RUN, "Z", "q?"])]
    counts, matches = look(Root(str(tmp_path / "root")), tests, pairs, block_rows=block_rows)
    assert [[row[name] for name in ("num_texts", "num_exact", "num_near", "num_short")]
            for row in counts] == [[3, 2, 0, 2], [3, 1, 1, 1], [4, 2, None, None]]  # fmt: skip
    assert [(row["text"], row["match"]) for row in matches] == [
        (RUN, "exact"),
        ("Z", "exact"),
        (RUN, "exact"),
        (f"{RUN}, they say.", "near"),
    ]


def test_what_is_held_out_is_not_counted(ray_running, tmp_path):
    tests = [as_test(tmp_path / "test", [("", RUN, True)], ["asked"])]
    pairs = [("asked", RUN), ("other", "words"), ("asked", "again"), ("more", RUN)]
    counts, matches = look(Root(str(tmp_path / "all")), tests, pairs)
    assert [row["num_exact"] for row in counts] == [1, 1, 1] and len(matches) == 2
    counts, matches = look(Root(str(tmp_path / "left")), tests, pairs, left_out=[0, 2, 3])
    assert [row["num_exact"] for row in counts] == [0, 0, 0] and not matches


def test_the_artifact_is_found_again_and_names_every_match(ray_running, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "_BLOCK_ROWS", 2)
    root = Root(str(tmp_path / "root"))
    pairs = [("a", f"{RUN} {'x' * 2000}"), ("Asked", "b"), ("c", "d"), ("e", "f"), ("g", RUN)]
    shards = trained_on(root, pairs, left_out=[4])
    tests = [as_test(tmp_path / "test", [("", RUN, True), ("T", "f", False)], ["asked"])]
    made = make(root, tests, shards)
    made.verify()
    assert made.read().to_pylist() == [
        {"test": "t", "hold_out": "none"} | dict(zip(list(row)[2:], values, strict=True))
        for row, values in zip(
            made.read().to_pylist(),
            [
                ("queries", 1, 1, 0, 1),
                ("judged passages", 2, 0, 1, 1),
                ("all passages", 3, 1, None, None),
            ],
            strict=True,
        )
    ]
    query, passage = made.read("matches").to_pylist()
    assert (query["text"], query["match"], query["side"]) == ("asked", "exact", "query")
    assert (query["training_text"], query["source"], query["shared"]) == ("Asked", "s", None)
    assert passage["shared"] == " ".join(RUN.split()[:13]) and passage["row"] == 0
    assert len(passage["training_text"]) == 1000
    assert made.stats == {"num_training_rows": 4}
    assert {part["table"] for part in made.manifest["parts"]} == {"contamination", "matches"}
    assert make(root, tests, shards) == made
    assert make(root, [tests[0].replace(name="u")], shards) != made

    for word in ("--json", "contamination"):
        shown = CliRunner().invoke(main, ["inspect", word, "--root", root.uri]).output
        assert "judged passages" in shown and f"{RUN} xxx" in shown and "Asked" in shown
    assert f"shares '{passage['shared']}' with the passage of a pair of s" in shown
    assert "t, queries: 'asked'\n  is the same as the query of a pair of s: 'Asked'" in shown
    assert summary(made.read().to_pylist()) == (
        "Found in training: of 1 queries 1 exactly and 0 nearly, "
        "of 2 judged passages 0 exactly and 1 nearly."
    )


def test_without_tests_there_is_nothing_to_look_for(ray_running, tmp_path):
    root = Root(str(tmp_path))
    made = make(root, [], trained_on(root, [("a", "b"), ("c", "d")]))
    assert made.num_rows == 0 and made.read("matches").num_rows == 0


def test_a_task_of_mteb_is_looked_for(ray_running, local_task, tmp_path):
    pairs = [("first answer", "FIRST question"), ("q", "nobody asks")]
    counts, matches = look(Root(str(tmp_path)), [TaskConfig(name=local_task)], pairs)
    assert [(row["num_texts"], row["num_exact"]) for row in counts] == [(2, 1), (1, 1), (3, 2)]
    assert [(row["text"], row["side"]) for row in matches] == [
        ("first question", "passage"),
        ("Title first answer", "query"),
    ]


def test_a_task_whose_data_cannot_be_had_is_not_counted_where_it_holds_nothing_out(
    ray_running, tmp_path, capsys
):
    task = TaskConfig(name="MSMARCO")
    pairs = [("a", "judged for each"), ("c", "d")]
    with pytest.raises(StrataError, match="hold_out: none"):
        look(Root(str(tmp_path / "one")), [task], pairs)
    tests = [task.replace(hold_out="none"), as_test(tmp_path / "test", [], ["a"])]
    counts, _ = look(Root(str(tmp_path / "two")), tests, pairs)
    assert [row["num_texts"] for row in counts] == [None, None, None, 1, 1, 1]
    assert [row["num_exact"] for row in counts] == [None, None, None, 1, 1, 1]
    assert "MSMARCO is not looked for" in capsys.readouterr().out
    assert "of 1 queries 1 exactly" in summary(counts)
