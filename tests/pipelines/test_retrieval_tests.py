from pipelines.retrieval_tests import RetrievalTestConfig, passage_ids, read_test


def test_beir_folders(judged_folder):
    test = read_test(
        RetrievalTestConfig(name="t", format="beir", path=str(judged_folder), split="train")
    )
    assert test.judgements == {"x": {"a": 2, "b": 1}}
    assert dict(test.queries) == {"x": "q x"} and set(test.corpus) == {"a", "b"}
    assert len(passage_ids(test)) == 2


def test_docstrings_of_the_test_split_are_a_retrieval_test():
    test = read_test(RetrievalTestConfig(name="numpy", format="docstrings", path="numpy"))
    assert len(test.queries) == len(test.judgements) > 50
    assert all(set(found) <= set(test.corpus) for found in test.judgements.values())
