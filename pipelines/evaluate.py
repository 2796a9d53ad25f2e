"""evaluate: a model -> `scores`, on mteb tasks by name and on local retrieval tests, all through
mteb.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import pyarrow as pa
import ray
from pydantic import AfterValidator, Field, model_validator

from clusterlib.artifacts.artifact import Artifact, Root, Spec
from clusterlib.artifacts.config import Config, runtime
from clusterlib.artifacts.draft import Draft, Receipt
from clusterlib.artifacts.tables import MEAN, SCORES
from pipelines.mteb_tasks import check_task
from pipelines.retrieval_tests import RetrievalTest, RetrievalTestConfig, read_test
from pipelines.sources import origin
from pipelines.stage import fetch, told
from train.launch import EXPORT
from train.model import ModelRef, load_embedder

# What mteb registers as its own, ranks a corpus and has neither weights nor a tokenizer to fetch.
BASELINES = frozenset(
    f"mteb/baseline-{name}"
    for name in ("bm25s", "bb25", "random-encoder", "random-sparse-encoder", "random-colbert")
)
METRICS = {"ndcg_at_10": "NDCG@10", "recall_at_100": "recall@100", "mrr_at_10": "MRR@10"}


class EvaluateConfig(Config):
    """What models are measured on, and what they are compared with."""

    tests: list[RetrievalTestConfig] = Field(
        [], description="local retrieval tests, kept out of training"
    )
    tasks: list[Annotated[str, AfterValidator(check_task)]] = Field(
        [], description="mteb's retrieval tasks by name, such as MSMARCO or NanoMSMARCORetrieval"
    )
    references: dict[str, ModelRef] = Field(
        {}, description="models to measure beside the trained ones; mteb/baseline-bm25s is BM25"
    )

    cpus_per_worker: float = runtime(1, gt=0)
    gpus_per_worker: float = runtime(0, ge=0)

    @model_validator(mode="after")
    def _names_tests_apart(self) -> Self:
        names = [*(test.name for test in self.tests), *self.tasks]
        if name := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(
                f"{names.count(name)} of tests and tasks are called {name}, and one's scores would "
                "take the other's place; rename or remove all but one"
            )
        if MEAN in names:
            raise ValueError(f"a test is called {MEAN}, as the mean over all is; rename it")
        return self

    def pinned(self) -> Self:
        references = {
            name: model if _is_baseline(model) else model.pinned()
            for name, model in self.references.items()
        }
        return self.model_copy(update={"references": references})


def scores_spec(config: EvaluateConfig, run: str, model: str | ModelRef) -> Spec:
    """What a model's scores are made from.

    Args:
        model: fingerprint of a trained model, or where another one comes from.
    """
    tests = StudentTests(config)
    settings = {
        "run": run,
        **tests.content(),
        # mteb's own baselines have no folder to take a digest of; their name says all.
        "model": model.name if isinstance(model, ModelRef) and _is_baseline(model) else model,
    }
    return Spec(
        "scores", 1, settings, {"model": model} if isinstance(model, str) else {}, tests.origin()
    )


@dataclass(frozen=True)
class StudentTests:
    """The tests of `evaluate`, to score students with while they learn: a train.launch.Tests."""

    config: EvaluateConfig

    def content(self) -> dict[str, Any]:
        return {"tests": self.config.tests, "tasks": self.config.tasks}

    def origin(self) -> dict[str, Any]:
        return {"tests": [origin(test) for test in self.config.tests]}

    @functools.cached_property
    def _tests(self) -> list[RetrievalTest]:
        return [read_test(test) for test in self.config.tests]

    def __call__(self, model: Path, device: str) -> list[dict[str, Any]]:
        rows, _ = _measure(load_embedder(model, device), self._tests, self.config.tasks)
        return rows


def _is_baseline(model: ModelRef) -> bool:
    return model.name in BASELINES


def evaluate(
    config: EvaluateConfig, models: dict[str, Artifact | ModelRef], root: Root
) -> dict[str, Artifact]:
    """Score models side by side, each into a `scores` artifact with mteb's own JSON beside the
    table.

    Args:
        models: name of the run -> trained model, or reference.

    Raises:
        StrataError: a test or a model cannot be read.
    """
    made: dict[str, Artifact] = {}
    pending: dict[str, tuple[Draft, ray.ObjectRef]] = {}
    tests = None
    for run, model in models.items():
        spec = scores_spec(config, run, model.fingerprint if isinstance(model, Artifact) else model)
        found = root.find(spec)
        if found is not None:
            made[run] = found
            continue
        if tests is None:
            tests = ray.put([read_test(test) for test in config.tests])
        # By default a task would be held inside the small placement group of the trial that calls
        # it.
        task = ray.remote(
            num_cpus=config.cpus_per_worker,
            num_gpus=config.gpus_per_worker,
            scheduling_strategy="DEFAULT",
        )(_score)
        draft = Draft(root, spec)
        pending[run] = draft, task.remote(draft, run, model, tests, config.tasks)
    for run, (draft, reference) in pending.items():
        made[run] = fetch(draft, f"evaluate: {run}", reference)
        print(f"evaluate: {run} done")
    return {run: made[run] for run in models}


def _score(
    draft: Draft,
    run: str,
    model: Artifact | ModelRef,
    tests: Sequence[RetrievalTest],
    tasks: Sequence[str],
) -> Artifact:
    """Evaluate one model; runs as a Ray task."""
    return told(draft, f"evaluate: {run}", "task", lambda: _scores(draft, run, model, tests, tasks))


def _scores(
    draft: Draft,
    run: str,
    model: Artifact | ModelRef,
    tests: Sequence[RetrievalTest],
    tasks: Sequence[str],
) -> Artifact:
    with tempfile.TemporaryDirectory() as scratch:
        rows, results = _measure(_load(model, Path(scratch)), tests, tasks)
    parts = [
        draft.write_bytes(
            "mteb", f"mteb/{task}.json", json.dumps(data, indent=1, default=str).encode()
        )
        for task, data in results.items()
    ]
    step = int(model.stats["kept_step"]) if isinstance(model, Artifact) else 0
    table = pa.Table.from_pylist([{"run": run, "step": step, **row} for row in rows], schema=SCORES)
    parts.append(draft.write("scores", "scores", SCORES, [table]))
    return draft.publish([Receipt(parts, table.num_rows)])


def _measure(
    encoder: Any, tests: Sequence[RetrievalTest], tasks: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What mteb finds.

    Returns:
        Rows of task, split, metric and value, and mteb's own result of each task.
    """
    import mteb

    wanted = [_local_task(test) for test in tests] + (
        list(mteb.get_tasks(tasks=list(tasks))) if tasks else []
    )
    # BM25's library draws progress bars that no setting turns off.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # noqa: PTH123
        result = mteb.evaluate(
            encoder,
            wanted,
            cache=None,
            co2_tracker=False,
            show_progress_bar=False,
            encode_kwargs={"batch_size": 64, "show_progress_bar": False},
        )
    results = {task.task_name: task.to_dict() for task in result.task_results}
    rows = [
        {
            "task": task,
            "split": split,
            "metric": metric,
            "value": sum(subset[metric] for subset in subsets) / len(subsets),
        }
        for task, data in results.items()
        for split, subsets in data["scores"].items()
        for metric in METRICS
    ]
    for metric in METRICS:
        values = [row["value"] for row in rows if row["metric"] == metric]
        rows.append(
            {"task": MEAN, "split": "", "metric": metric, "value": sum(values) / len(values)}
        )
    return rows, results


def _load(model: Artifact | ModelRef, scratch: Path) -> Any:
    """What mteb evaluates: a sentence-transformers model, or one of mteb's own baselines."""
    if isinstance(model, ModelRef) and _is_baseline(model):
        import mteb

        return mteb.get_model(model.name)
    return load_embedder(
        model.download(EXPORT, scratch) if isinstance(model, Artifact) else model.folder()
    )


def _local_task(test: RetrievalTest) -> Any:
    """A test as an mteb retrieval task that needs no download."""
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class LocalRetrieval(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=test.name,
            description=f"{test.name}, a local retrieval test",
            reference=None,
            dataset={"path": "local", "revision": "1"},
            type="Retrieval",
            category="t2t",
            modalities=["text"],
            eval_splits=[test.split],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            date=None,
            domains=None,
            task_subtypes=None,
            license=None,
            annotations_creators=None,
            dialect=None,
            sample_creation=None,
            bibtex_citation=None,
        )

        def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
            self.dataset = {
                "default": {
                    test.split: {
                        "corpus": Dataset.from_dict(
                            {"id": list(test.corpus), "text": list(test.corpus.values())}
                        ),
                        "queries": Dataset.from_dict(
                            {"id": list(test.queries), "text": list(test.queries.values())}
                        ),
                        "relevant_docs": {
                            query: dict(found) for query, found in test.judgements.items()
                        },
                        "top_ranked": None,
                    }
                }
            }
            self.data_loaded = True

    return LocalRetrieval()
