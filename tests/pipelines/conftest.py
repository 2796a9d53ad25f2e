"""A small chain of artifacts made once, for the tests of single stages."""

import json
import sys
import tempfile
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from clusterlib.artifacts.artifact import Root, Spec
from clusterlib.artifacts.draft import Draft
from clusterlib.artifacts.tables import PAIRS, REJECTS
from pipelines import cluster, embed, ingest, shard
from pipelines.cluster import ClusterConfig, centroids_spec
from pipelines.embed import EmbedConfig, embeddings_spec
from pipelines.ingest import IngestConfig, pairs_spec
from pipelines.shard import ShardConfig, shards_spec
from pipelines.sources import InputConfig, splits
from pipelines.stage import find_or_make
from train.model import ModelRef, TokenizerRef


@pytest.fixture(scope="session")
def chain(tmp_path_factory, ray_running, pairs_file, teacher_folder, tokenizer_folder):
    """Two sources, embedded, clustered and sharded in several blocks: of each kind, and of the
    specs of each kind, a dict by source.
    """
    root = Root(str(tmp_path_factory.mktemp("chain")))
    inputs = {
        "big": InputConfig(source="big", format="jsonl", path=str(pairs_file)),
        "half": InputConfig(source="half", format="jsonl", path=str(pairs_file), fraction=0.5),
    }
    configs = SimpleNamespace(
        ingest=IngestConfig(inputs=list(inputs.values())),
        embed=EmbedConfig(
            teacher=ModelRef(name=str(teacher_folder)), task_rows=50, batch_tokens=200
        ),
        cluster=ClusterConfig(num_leaves=6, min_pairs_per_leaf=20, num_iterations=5),
        shard=ShardConfig(
            tokenizer=TokenizerRef(name=str(tokenizer_folder)),
            query_prompt="query: ",
            passage_prompt="passage: ",
            query_max_tokens=8,
            passage_max_tokens=12,
            block_rows=70,
        ),
    )
    pairs = {name: pairs_spec(configs.ingest, [item]) for name, item in inputs.items()}
    embeddings = {name: embeddings_spec(configs.embed, spec) for name, spec in pairs.items()}
    centroids = {name: centroids_spec(configs.cluster, spec) for name, spec in embeddings.items()}
    shards = {name: shards_spec(configs.shard, [], spec) for name, spec in centroids.items()}
    specs = {"pairs": pairs, "embeddings": embeddings, "centroids": centroids, "shards": shards}
    stages = (ingest.STAGE, embed.STAGE, cluster.STAGE, shard.STAGE)
    made = {
        kind: dict(zip(wanted, find_or_make(stage, wanted.values(), root), strict=True))
        for stage, (kind, wanted) in zip(stages, specs.items(), strict=True)
    }
    return SimpleNamespace(root=root, configs=configs, specs=SimpleNamespace(**specs), **made)


@pytest.fixture(scope="session")
def read_here():
    """What `ingest` makes of one input, in this process: the pairs artifact and its rejects as
    dicts.
    """

    def read(settings, folder, max_chars=100):
        source = InputConfig(**{"source": "s", **settings}).located(str(folder))
        with tempfile.TemporaryDirectory() as root:
            draft = Draft(Root(root), Spec("pairs", 1, {}))
            worker = ingest._Worker(draft, max_chars)
            receipts = [worker((split.id, split)) for split in splits(source)]
            made = draft.publish(receipts)  # which checks that no row is lost
            table = made.read("rejects") if made.parts("rejects") else REJECTS.empty_table()
            assert made.read().schema == PAIRS and table.schema == REJECTS
            return made.read().to_pylist(), table.to_pylist(), made.manifest

    return read


@pytest.fixture(scope="session")
def recipe(
    tmp_path_factory, pairs_file, beir_folder, teacher_folder, tokenizer_folder, architecture
):
    """A whole recipe, small enough to run in a test, as a file."""
    settings = {
        "name": "tiny",
        "description": "a recipe for tests",
        "ingest": {"inputs": [{"source": "jsonl", "format": "jsonl", "path": str(pairs_file)}]},
        "embed": {"teacher": {"name": str(teacher_folder)}, "task_rows": 16},
        "cluster": {"num_leaves": 4, "min_pairs_per_leaf": 10, "num_iterations": 5},
        "shard": {
            "tokenizer": {"name": str(tokenizer_folder)},
            "query_max_tokens": 12,
            "passage_max_tokens": 16,
            "block_rows": 40,
        },
        "batching": {"strategy": "cluster", "k": 2, "global_batch_size": 16},
        "train": {
            "student": {"architecture": architecture},
            "optimizer": {"learning_rate": 1.0e-3},
            "steps": 12,
            "num_workers": 2,
            "micro_batch_size": 4,
            "checkpoint_every_steps": 4,
            "cache_dir": str(tmp_path_factory.mktemp("cache")),
            "tensorboard_dir": str(tmp_path_factory.mktemp("tensorboard")),
        },
        "evaluate": {
            "tests": [{"name": "local", "format": "beir", "path": str(beir_folder)}],
            "references": {"teacher": {"name": str(teacher_folder)}},
        },
        "arms": {
            "random": {
                "batching.strategy": "random",
                "train.test_every_steps": 3,
                "train.keep": "best",
                "train.trackers": ["tensorboard"],
            },
            "cluster": {},
        },
    }
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


@pytest.fixture(params=["jsonl", "parquet"])
def judged_folder(request, tmp_path):
    """A small BEIR folder in either layout: one query with two relevant passages, one without, one
    not judged.
    """
    corpus = [
        {"_id": "a", "title": "T", "text": "body"},
        {"_id": "b", "title": "", "text": "other"},
    ]
    queries = [
        {"_id": "x", "text": "q x"},
        {"_id": "y", "text": "q y"},
        {"_id": "z", "text": "unjudged"},
    ]
    judgements = [("x", "a", 2), ("x", "b", 1), ("y", "b", 0)]
    if request.param == "jsonl":
        (tmp_path / "qrels").mkdir()
        for name, rows in (("corpus", corpus), ("queries", queries)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines = "".join(f"{q}\t{p}\t{r}\n" for q, p, r in judgements)
        (tmp_path / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    else:
        pq.write_table(pa.Table.from_pylist(corpus), tmp_path / "corpus.parquet")
        pq.write_table(pa.Table.from_pylist(queries), tmp_path / "queries.parquet")
        names = ("query-id", "corpus-id", "score")
        pq.write_table(
            pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in judgements]),
            tmp_path / "qrels.parquet",
        )
    return tmp_path


@pytest.fixture
def local_task(monkeypatch):
    """The name of a task that mteb has in this process alone and that needs no download: two
    queries, one without a relevant passage, and three passages, the judged one with a title.
    """
    import mteb
    from datasets import Dataset

    from pipelines.evaluate import _local_task
    from pipelines.retrieval_tests import RetrievalTest

    base = type(_local_task(RetrievalTest("LocalTask", "test", {}, {}, {})))

    class LocalTask(base):
        def load_data(self, num_proc=None, **options):
            corpus = {
                "id": ["a", "b", "c"],
                "title": ["Title", "", None],
                "text": ["first answer", "second answer", "nobody asks"],
            }
            queries = {"id": ["q1", "q2", "q3"], "text": ["first question", "second question", "-"]}
            data = {
                "corpus": Dataset.from_dict(corpus),
                "queries": Dataset.from_dict(queries),
                "relevant_docs": {"q1": {"a": 1, "b": 0}, "q2": {"b": 0}},
                "top_ranked": None,
            }
            self.dataset = {"default": {"test": data}}
            self.data_loaded = True

    registry = sys.modules[mteb.get_task.__module__]._TASKS_REGISTRY
    monkeypatch.setitem(registry, "LocalTask", LocalTask)
    return "LocalTask"
