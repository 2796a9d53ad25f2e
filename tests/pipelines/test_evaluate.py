import json
import math
import shutil
from pathlib import Path

import pytest

from clusterlib.artifacts.artifact import Root
from clusterlib.errors import StrataError
from pipelines.evaluate import (
    BASELINES,
    STAGE,
    EvaluateConfig,
    _load,
    _local_task,
    scores_spec,
)
from pipelines.retrieval_tests import RetrievalTestConfig, read_test
from pipelines.stage import find_or_make
from train.model import ModelRef


def trec_ndcg(run, judgements, depth=10):
    """NDCG as trec_eval defines it (Jarvelin & Kekalainen 2002): gains by rank, discounted by
    log2(rank + 1).
    """
    values = []
    for query, relevant in judgements.items():
        ranked = sorted(run[query].items(), key=lambda item: (-item[1], item[0]))[:depth]
        gain = sum(
            relevant.get(passage, 0) / math.log2(rank + 2)
            for rank, (passage, _) in enumerate(ranked)
        )
        ideal = sum(
            value / math.log2(rank + 2)
            for rank, value in enumerate(sorted(relevant.values(), reverse=True)[:depth])
        )
        values.append(gain / ideal)
    return sum(values) / len(values)


@pytest.fixture(scope="module")
def config(beir_folder, teacher_folder):
    test = RetrievalTestConfig(name="local", format="beir", path=str(beir_folder))
    return EvaluateConfig(tests=[test], references={"teacher": ModelRef(name=str(teacher_folder))})


def test_scores_equal_a_second_implementation_on_the_same_run(
    ray_running, config, teacher_folder, tmp_path
):
    from sentence_transformers import SentenceTransformer

    root = Root(str(tmp_path))
    spec = scores_spec(config, "teacher", config.references["teacher"])
    (made,) = find_or_make(STAGE, [spec], root)
    scores = {(row["task"], row["metric"]): row["value"] for row in made.read().to_pylist()}

    test = read_test(config.tests[0])
    model = SentenceTransformer(str(teacher_folder), device="cpu")
    similarity = (
        model.encode_query(list(test.queries.values()))
        @ model.encode_document([passage.whole for passage in test.corpus.values()]).T
    )
    run = {
        query: dict(zip(test.corpus, similarity[row].tolist(), strict=True))
        for row, query in enumerate(test.queries)
    }
    assert scores["local", "ndcg_at_10"] == pytest.approx(trec_ndcg(run, test.judgements), abs=1e-4)
    ranks = {
        query: 1 + sum(value > run[query][next(iter(relevant))] for value in run[query].values())
        for query, relevant in test.judgements.items()
    }
    assert scores["local", "mrr_at_10"] == pytest.approx(
        sum(1 / r for r in ranks.values() if r <= 10) / len(ranks), abs=1e-4
    )
    assert scores["local", "recall_at_100"] == 1.0  # 24 passages in all
    assert scores["mean", "ndcg_at_10"] == scores["local", "ndcg_at_10"]

    (result,) = made.parts("mteb")
    stored = json.loads(Path(made.path, result.path).read_text())
    assert stored["scores"]["test"][0]["ndcg_at_10"] == scores["local", "ndcg_at_10"]
    (again,) = find_or_make(STAGE, [spec], root)
    assert again.manifest == made.manifest


def test_mteb_runs_a_local_test_with_graded_judgements(tmp_path):
    """A hand-made ranking: mteb's number is the definition's."""
    import mteb
    import numpy as np
    from mteb.models.model_meta import ModelMeta

    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": f"d{n}", "text": f"d{n}"}) + "\n" for n in range(5))
    )
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "q"}) + "\n")
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td4\t2\nq\td2\t1\n")
    test = read_test(RetrievalTestConfig(name="hand", format="beir", path=str(folder)))

    class Ranker:
        """Ranks d0 first, d4 last."""

        mteb_model_meta = ModelMeta.create_empty(
            overwrites={"name": "test/ranker", "revision": "1"}
        )

        def encode(self, inputs, **_):
            texts = [text for batch in inputs for text in batch["text"]]
            return np.array(
                [[1.0, 0.0] if text == "q" else [1.0 - int(text[1]) / 10, 0.1] for text in texts]
            )

        def similarity(self, left, right):
            return left @ right.T

        def similarity_pairwise(self, left, right):
            return (left * right).sum(axis=1)

    result = mteb.evaluate(
        Ranker(), [_local_task(test)], cache=None, co2_tracker=False, show_progress_bar=False
    )
    found = result.task_results[0].scores["test"][0]["ndcg_at_10"]
    expected = (1 / math.log2(4) + 2 / math.log2(6)) / (2 / math.log2(2) + 1 / math.log2(3))
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_name_that_begins_as_mtebs_do_is_no_way_around_safetensors(monkeypatch, tmp_path):
    """mteb.get_model would fetch any other name from the hub, pickled weights and all."""
    import mteb

    monkeypatch.setattr(mteb, "get_model", lambda name: name)
    assert _load(ModelRef(name="mteb/baseline-bm25s"), tmp_path) == "mteb/baseline-bm25s"
    for name in (
        "mteb/somebodys-model",
        "mteb/baseline-hybrid-rrf-baseline-bm25s-multilingual-e5-small",
    ):
        with pytest.raises(
            StrataError, match=f"{name}: neither a local folder nor a model that could be fetched"
        ):
            _load(ModelRef(name=name), tmp_path)


def test_mteb_registers_every_baseline_and_none_has_weights():
    import mteb

    for name in BASELINES:
        meta = mteb.get_model_meta(name)
        assert meta.name == name and not meta.n_parameters and not meta.loader_kwargs


def test_an_edit_of_a_models_pooling_makes_other_scores(config, teacher_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(teacher_folder, folder)
    before = scores_spec(config, "run", ModelRef(name=str(folder))).name
    assert scores_spec(config, "run", ModelRef(name=str(teacher_folder))).name == before
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(pooling.read_text().replace('"cls"', '"mean"'))
    assert scores_spec(config, "run", ModelRef(name=str(folder))).name != before
