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
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa
import ray
from pydantic import Field, model_validator

from clusterlib.artifacts.artifact import Artifact, Root, Spec
from clusterlib.artifacts.config import Config, fingerprint, plain, runtime
from clusterlib.artifacts.draft import Draft, Receipt
from clusterlib.artifacts.tables import MEAN, SCORES
from pipelines.retrieval_tests import (
    RetrievalTest,
    RetrievalTestConfig,
    TaskConfig,
    TestConfig,
    mteb_task,
    read_test,
)
from pipelines.sources import origin
from pipelines.stage import Stage
from pipelines.tasks import fetch, told
from train.export import EXPORT
from train.model import ModelRef, load_embedder

if TYPE_CHECKING:
    from pipelines.run import Arm

# What mteb registers as its own, ranks a corpus and has neither weights nor a tokenizer to fetch.
BASELINES = frozenset(
    f"mteb/baseline-{name}"
    for name in ("bm25s", "bb25", "random-encoder", "random-sparse-encoder", "random-colbert")
)
METRICS = {"ndcg_at_10": "NDCG@10", "recall_at_100": "recall@100", "mrr_at_10": "MRR@10"}


class EvaluateConfig(Config):
    """What models are measured on, and what they are compared with."""

    tests: list[RetrievalTestConfig] = Field([], description="local retrieval tests")
    tasks: list[TaskConfig] = Field(
        [], description="retrieval tasks of mteb; a name alone stands for a task with the defaults"
    )
    references: dict[str, ModelRef] = Field(
        {}, description="models to measure beside the trained ones; mteb/baseline-bm25s is BM25"
    )

    cpus_per_worker: float = runtime(
        1, gt=0, description="logical CPUs that a model that is scored takes"
    )
    gpus_per_worker: float = runtime(
        0, ge=0, description="GPUs, or a share of one, that a model that is scored takes"
    )

    @property
    def all_tests(self) -> list[TestConfig]:
        """Local tests and tasks."""
        return [*self.tests, *self.tasks]

    @property
    def task_names(self) -> list[str]:
        return [task.name for task in self.tasks]

    def content(self) -> dict[str, Any]:
        """What shapes a model's scores; with what others they are compared does not, nor what is
        held out.
        """
        return {"tests": plain(self.tests), "tasks": self.task_names}

    @model_validator(mode="after")
    def _names_tests_apart(self) -> Self:
        names = [test.name for test in self.all_tests]
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


class Evaluate(Stage):
    """A model's scores on mteb tasks and local retrieval tests."""

    kind = "scores"

    def specs(self, arm: Arm) -> dict[str, Spec]:
        config = arm.run.config.evaluate
        models: dict[str, Spec | ModelRef] = {**config.references, **arm.specs("model")}
        return {name: scores_spec(config, name, model) for name, model in models.items()}

    def make(self, specs: Sequence[Spec], root: Root) -> None:
        """Score models side by side, with mteb's own JSON beside each table.

        Raises:
            StrataError: a test or a model cannot be read.
        """
        tests: dict[str, ray.ObjectRef] = {}
        pending: list[tuple[Draft, ray.ObjectRef]] = []
        for spec in specs:
            config: EvaluateConfig = spec.config["evaluate"]
            key = fingerprint(config)
            if key not in tests:
                tests[key] = ray.put([read_test(test) for test in config.tests])
            model = root.open(spec.inputs["model"]) if spec.inputs else spec.config["model"]
            # By default a task would be held inside the small placement group of the trial that
            # calls it.
            task = ray.remote(
                num_cpus=config.cpus_per_worker,
                num_gpus=config.gpus_per_worker,
                scheduling_strategy="DEFAULT",
            )(_score)
            draft = Draft(root, spec)
            pending.append((draft, task.remote(draft, model, tests[key])))
        for draft, reference in pending:
            fetch(draft, f"evaluate: {draft.spec.label}", reference)
            print(f"evaluate: {draft.spec.label} done")


STAGE = Evaluate()


def scores_spec(config: EvaluateConfig, run: str, model: Spec | ModelRef) -> Spec:
    """What a model's scores are made from.

    Args:
        run: what people call it.
        model: a trained model, or where another one comes from.
    """
    settings: dict[str, Any] = {"run": run, "evaluate": config}
    inputs = {}
    if isinstance(model, Spec):
        inputs["model"] = model
    else:
        settings["model"] = model
    origin = StudentTests(config.tests, config.task_names).origin()
    return Spec("scores", 2, settings, inputs, origin, label=run)


def mean_score(scores: Artifact, metric: str) -> float:
    """A model's mean over the tests of one metric, by mteb's name."""
    rows = scores.read().to_pylist()
    return next(
        float(row["value"]) for row in rows if row["task"] == MEAN and row["metric"] == metric
    )


@dataclass(frozen=True)
class StudentTests:
    """Tests to score students with while they learn: a train.learner.Tests."""

    tests: Sequence[RetrievalTestConfig]
    tasks: Sequence[str]

    def content(self) -> dict[str, Any]:
        return {"tests": list(self.tests), "tasks": list(self.tasks)}

    def origin(self) -> dict[str, Any]:
        return {"tests": [origin(test) for test in self.tests]}

    @functools.cached_property
    def _tests(self) -> list[RetrievalTest]:
        return [read_test(test) for test in self.tests]

    def __call__(self, model: Path, device: str) -> list[dict[str, Any]]:
        rows, _ = _measure(load_embedder(model, device), self._tests, self.tasks)
        return rows


def _is_baseline(model: ModelRef) -> bool:
    return model.name in BASELINES


def _score(draft: Draft, model: Artifact | ModelRef, tests: Sequence[RetrievalTest]) -> None:
    """Evaluate one model; runs as a Ray task."""
    told(draft, f"evaluate: {draft.spec.label}", "task", lambda: _scores(draft, model, tests))


def _scores(draft: Draft, model: Artifact | ModelRef, tests: Sequence[RetrievalTest]) -> None:
    config: EvaluateConfig = draft.spec.config["evaluate"]
    with draft.signed_in(), tempfile.TemporaryDirectory() as scratch:
        rows, results = _measure(_load(model, Path(scratch)), tests, config.task_names)
    step = int(model.stats["kept_step"]) if isinstance(model, Artifact) else 0
    run = draft.spec.config["run"]
    table = pa.Table.from_pylist([{"run": run, "step": step, **row} for row in rows], schema=SCORES)

    def publish() -> Artifact:
        parts = [
            draft.write_bytes(
                "mteb", f"mteb/{task}.json", json.dumps(data, indent=1, default=str).encode()
            )
            for task, data in results.items()
        ]
        parts.append(draft.write("scores", "scores", SCORES, [table]))
        return draft.publish([Receipt(parts, table.num_rows)])

    draft.unless_made(publish)


def _measure(
    encoder: Any, tests: Sequence[RetrievalTest], tasks: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What mteb finds.

    Returns:
        Rows of task, split, metric and value, and mteb's own result of each task.
    """
    import mteb

    wanted = [*map(_local_task, tests), *map(mteb_task, tasks)]
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
                            {
                                "id": list(test.corpus),
                                "text": [passage.whole for passage in test.corpus.values()],
                            }
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
