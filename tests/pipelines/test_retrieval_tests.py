import pytest

from clusterlib.artifacts.config import validate
from clusterlib.errors import StrataError
from pipelines.evaluate import EvaluateConfig, StudentTests
from pipelines.retrieval_tests import (
    RetrievalTestConfig,
    TaskConfig,
    UnavailableError,
    forms,
    mteb_task,
    read_test,
    task_content,
    texts,
)


def by_role(config):
    """Role -> (title, text) of its texts."""
    found = {"query": [], "judged passage": [], "other passage": []}
    for role, table in texts(config):
        found[role] += [(row["title"], row["text"]) for row in table.to_pylist()]
    return found


def test_beir_folders(judged_folder):
    config = RetrievalTestConfig(name="t", format="beir", path=str(judged_folder), split="train")
    test = read_test(config)
    assert test.judgements == {"x": {"a": 2, "b": 1}}
    assert dict(test.queries) == {"x": "q x"} and set(test.corpus) == {"a", "b"}
    assert by_role(config) == {
        "query": [("", "q x")],
        "judged passage": [("T", "body"), ("", "other")],
        "other passage": [],
    }


def test_a_passage_has_two_forms_where_it_has_a_title(judged_folder):
    config = RetrievalTestConfig(name="t", format="beir", path=str(judged_folder), split="train")
    (table,) = (table for role, table in texts(config) if role == "judged passage")
    found, rows = forms(table)
    assert list(zip(found.to_pylist(), rows.to_pylist(), strict=True)) == [
        ("T body", 0),
        ("other", 1),
        ("body", 0),
    ]


def test_docstrings_of_the_test_split_are_a_retrieval_test():
    config = RetrievalTestConfig(name="numpy", format="docstrings", path="numpy")
    test = read_test(config)
    assert len(test.queries) == len(test.judgements) > 50
    assert all(set(found) <= set(test.corpus) for found in test.judgements.values())
    found = by_role(config)
    assert len(found["query"]) == len(test.queries) and not found["other passage"]
    assert len(found["judged passage"]) == len(test.corpus)


def test_the_texts_of_a_task_come_through_mteb(local_task):
    assert by_role(TaskConfig(name=local_task)) == {
        "query": [("", "first question"), ("", "second question")],
        "judged passage": [("Title", "first answer")],
        "other passage": [("", "second answer"), ("", "nobody asks")],
    }
    content = task_content(TaskConfig(name=local_task))
    assert content["dataset"]["revision"] == "1" and content["splits"] == ["test"]


def test_a_task_may_be_its_name_alone_and_its_policy_is_no_part_of_what_is_measured():
    config = validate(
        EvaluateConfig, {"tasks": ["MSMARCO", {"name": "NQ", "hold_out": "none"}]}, "here"
    )
    assert [(task.name, task.hold_out) for task in config.tasks] == [
        ("MSMARCO", "judged"),
        ("NQ", "none"),
    ]
    assert StudentTests(config.tests, config.task_names).content()["tasks"] == ["MSMARCO", "NQ"]
    with pytest.raises(StrataError, match=r"tasks.0.hold_out: .*'all'"):
        validate(EvaluateConfig, {"tasks": [{"name": "NQ", "hold_out": "all"}]}, "here")
    test = RetrievalTestConfig(name="t", format="docstrings", path="numpy")
    assert test.hold_out == "corpus"
    assert test.content() == test.replace(hold_out="none").content()


def test_a_task_whose_data_cannot_be_had_is_told_with_the_remedy():
    with pytest.raises(UnavailableError, match=r"data of MSMARCO cannot be had .*hold_out: none"):
        list(texts(TaskConfig(name="MSMARCO")))


def test_a_task_that_is_no_text_is_refused(local_task, monkeypatch):
    from datasets import Dataset

    task = type(mteb_task(local_task))
    load = task.load_data

    def load_turns(self, *arguments, **options):
        load(self, *arguments, **options)
        turns = Dataset.from_dict({"id": ["q1"], "text": [["one turn", "another"]]})
        self.dataset["default"]["test"]["queries"] = turns

    monkeypatch.setattr(task, "load_data", load_turns)
    with pytest.raises(StrataError, match="something else than plain text"):
        list(texts(TaskConfig(name=local_task)))
