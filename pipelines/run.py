"""run: the settings of a whole run, the chain of artifacts they stand for, and making what is
missing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from clusterlib.artifacts.artifact import Artifact, Root, Spec
from clusterlib.artifacts.config import Config, override, read_yaml, runtime, validate
from clusterlib.artifacts.tables import MEAN
from clusterlib.batches.plan import BatchingConfig, Plan
from clusterlib.batches.visits import PhaseSummary, summarize
from clusterlib.errors import StrataError
from pipelines.cluster import ClusterConfig, centroids_spec, cluster
from pipelines.contamination import contamination, contamination_spec
from pipelines.embed import EmbedConfig, embed, embeddings_spec
from pipelines.evaluate import EvaluateConfig, StudentTests, evaluate, scores_spec
from pipelines.files import absolute
from pipelines.ingest import IngestConfig, ingest, pairs_spec
from pipelines.report import report, report_spec
from pipelines.shard import ShardConfig, shard, shards_spec
from train.data import shard_index
from train.launch import model_spec, teacher_settings, train
from train.loop import TrainConfig
from train.model import ModelRef
from tune.search import Outcome, search
from tune.space import TuneConfig, combinations
from tune.trial import Trial

_RECIPES = Path(__file__).parent / "recipes"


class RunConfig(Config):
    """A recipe: every setting of a run."""

    name: str = Field(..., pattern=r"^[\w.-]+$")
    description: str = ""
    data: str = runtime(
        ".", description="folder or URI where relative paths of inputs and tests start"
    )
    ingest: IngestConfig
    embed: EmbedConfig
    cluster: ClusterConfig
    shard: ShardConfig
    batching: BatchingConfig
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    tune: TuneConfig = TuneConfig()
    arms: dict[str, dict[str, Any]] = Field(
        {},
        description="runs to compare: name -> dotted settings that differ; artifacts they share "
        "are made once",
    )

    @model_validator(mode="after")
    def _has_tests(self) -> Self:
        if self.train.test_every_steps and not (self.evaluate.tests or self.evaluate.tasks):
            raise ValueError(
                f"train.test_every_steps={self.train.test_every_steps} has nothing to test on; "
                "name some in "
                "evaluate.tests or evaluate.tasks"
            )
        return self

    @model_validator(mode="after")
    def _has_teacher(self) -> Self:
        for setting in teacher_settings(self.train, self.batching):
            if not self.shard.teacher_vectors:
                raise ValueError(
                    f"{setting} needs the teacher's vectors; set shard.teacher_vectors=true"
                )
        return self

    def arm_configs(self) -> dict[str, RunConfig]:
        """The configuration of each arm; the recipe itself, under its own name, when it has
        none.
        """
        if not self.arms:
            return {self.name: self}
        return {
            arm: self.with_overrides(changes, f"arms.{arm}") for arm, changes in self.arms.items()
        }

    def with_overrides(self, overrides: dict[str, Any], origin: str) -> RunConfig:
        return _validate(override(self.model_dump(mode="json"), overrides), origin)


def _validate(settings: dict[str, Any], origin: str) -> RunConfig:
    """A recipe whose paths mean the same wherever its stages run."""
    config = validate(RunConfig, settings, origin)
    folder = absolute(config.data)
    return config.located(folder).model_copy(update={"data": folder})


def load_recipe(name: str, overrides: dict[str, Any]) -> RunConfig:
    """A recipe by name or by path, with dotted overrides.

    Raises:
        StrataError: there is no such recipe, or a setting is wrong.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else _RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(recipe.stem for recipe in _RECIPES.glob("*.yaml")))
        raise StrataError(
            f"{name}: no such recipe; name one of {known}, or the path of a .yaml file"
        )
    config = _validate(override(read_yaml(path), overrides), str(path))
    config.arm_configs()  # faults in an arm show now, not after hours
    return config


@dataclass(frozen=True)
class Chain:
    """The specs of an arm's artifacts, each made from the ones before; inputs and models are only
    told apart.
    """

    config: RunConfig

    @functools.cached_property
    def pairs(self) -> Spec:
        return pairs_spec(self.config.ingest)

    @functools.cached_property
    def embeddings(self) -> Spec:
        return embeddings_spec(self.config.embed, self.pairs.fingerprint)

    @functools.cached_property
    def centroids(self) -> Spec:
        return centroids_spec(self.config.cluster, self.embeddings.fingerprint)

    @functools.cached_property
    def shards(self) -> Spec:
        return shards_spec(
            self.config.shard,
            self.config.evaluate.all_tests,
            self.embeddings.fingerprint,
            self.centroids.fingerprint,
        )

    @functools.cached_property
    def contamination(self) -> Spec:
        return contamination_spec(
            self.config.evaluate.all_tests, self.embeddings.fingerprint, self.shards.fingerprint
        )

    @property
    def tests(self) -> StudentTests:
        return StudentTests(self.config.evaluate)

    @functools.cached_property
    def model(self) -> Spec:
        return model_spec(
            self.config.train, self.config.batching, self.shards.fingerprint, self.tests
        )

    def specs(self) -> list[Spec]:
        return [
            self.pairs,
            self.embeddings,
            self.centroids,
            self.shards,
            self.contamination,
            self.model,
        ]


class Run:
    """A recipe at work under a root; each method makes one artifact kind for all arms, or finds it
    made.

    Names on a hub mean the same from here on, in every process: the commit they are at now.
    """

    def __init__(self, config: RunConfig, root: Root) -> None:
        self._recipe = (
            config  # arms and trials that name another model do not want the commit of this one
        )
        self.config = config.pinned()
        self.root = root
        self.arms = {
            arm: Chain(arm_config.pinned()) for arm, arm_config in config.arm_configs().items()
        }

    def specs(self) -> list[tuple[str, Spec]]:
        """(arm or reference, spec) of all that the run makes, each once, in order."""
        found: dict[str, tuple[str, Spec]] = {}
        for arm, chain in self.arms.items():
            for spec in chain.specs():
                found.setdefault(spec.name, (arm, spec))
        scored = self._scores_specs()
        for name, spec in scored.items():
            found.setdefault(spec.name, (name, spec))
        spec = report_spec(
            self.config.name,
            self._report_inputs({name: spec.name for name, spec in scored.items()}),
        )
        found[spec.name] = ("", spec)
        return list(found.values())

    def ingest(self) -> dict[str, Artifact]:
        return {arm: ingest(chain.config.ingest, self.root) for arm, chain in self.arms.items()}

    def embed(self) -> dict[str, Artifact]:
        return {
            arm: embed(chain.config.embed, self._open(chain.pairs, "ingest"), self.root)
            for arm, chain in self.arms.items()
        }

    def cluster(self) -> dict[str, Artifact]:
        return {
            arm: cluster(chain.config.cluster, self._open(chain.embeddings, "embed"), self.root)
            for arm, chain in self.arms.items()
        }

    def shard(self) -> dict[str, Artifact]:
        return {
            arm: shard(
                chain.config.shard,
                chain.config.evaluate.all_tests,
                self._open(chain.embeddings, "embed"),
                self._open(chain.centroids, "cluster"),
                self.root,
            )
            for arm, chain in self.arms.items()
        }

    def contamination(self) -> dict[str, Artifact]:
        """What of the tests occurs in the shards of each arm."""
        return {
            arm: contamination(
                chain.config.evaluate.all_tests,
                self._open(chain.embeddings, "embed"),
                self._open(chain.shards, "shard"),
                self.root,
            )
            for arm, chain in self.arms.items()
        }

    def plan(self) -> dict[str, list[PhaseSummary]]:
        """What the phases of each arm will see."""
        summaries = {}
        for arm, chain in self.arms.items():
            plan = Plan(shard_index(self._open(chain.shards, "shard")), chain.config.batching)
            summaries[arm] = summarize(plan, chain.config.train.num_steps(plan))
        return summaries

    def train(self) -> dict[str, Artifact]:
        return {
            arm: train(
                chain.config.train,
                chain.config.batching,
                self._open(chain.shards, "shard"),
                self.root,
                arm,
                chain.tests,
            )
            for arm, chain in self.arms.items()
        }

    def evaluate(self) -> dict[str, Artifact]:
        """Scores of every reference and arm."""
        models: dict[str, Artifact | ModelRef] = dict(self.config.evaluate.references)
        models |= {arm: self._open(chain.model, "train") for arm, chain in self.arms.items()}
        return evaluate(self.config.evaluate, models, self.root)

    def score(self, names: Sequence[str]) -> dict[str, Artifact]:
        """Scores of models from elsewhere, by folder or hub name, on the recipe's tests."""
        references = {name: {"name": name} for name in names}
        config = (
            self.config.evaluate.replace(references=references).located(self.config.data).pinned()
        )
        return evaluate(config, dict(config.references), self.root)

    def scores(self) -> dict[str, Artifact]:
        """The finished scores of every reference and arm."""
        return {name: self._open(spec, "evaluate") for name, spec in self._scores_specs().items()}

    def report(self) -> Artifact:
        """One HTML file about all of the above."""
        scores = self.scores()
        return report(
            self.config.name,
            self.config.model_dump(mode="json"),
            self._report_inputs({name: artifact.name for name, artifact in scores.items()}),
            self.root,
        )

    def tune(self) -> list[Outcome]:
        """Train and score every combination of `tune.space` on the shards that are there."""
        overrides = combinations(self.config.tune.space)
        chains = [
            Chain(self._recipe.with_overrides(changes, "tune.space").pinned())
            for changes in overrides
        ]
        score = functools.partial(_score, self.config.evaluate, self.config.tune.metric, self.root)
        trials = [
            Trial(
                " ".join(f"{name}={value}" for name, value in changes.items()),
                chain.config.train,
                chain.config.batching,
                self._open(chain.shards, "shard"),
                self.root,
                chain.tests,
                score,
            )
            for changes, chain in zip(overrides, chains, strict=True)
        ]
        spec = Spec(
            "tune",
            1,
            {"tune": self.config.tune},
            {"shards": next(iter(self.arms.values())).shards.fingerprint},
        )
        return search(
            trials,
            self.config.tune.metric,
            self.config.tune.max_concurrent,
            f"{self.root.path}/{spec.name}",
            self.root.fs,
        )

    def _scores_specs(self) -> dict[str, Spec]:
        models: dict[str, str | ModelRef] = dict(self.config.evaluate.references)
        models |= {arm: chain.model.fingerprint for arm, chain in self.arms.items()}
        return {
            name: scores_spec(self.config.evaluate, name, model) for name, model in models.items()
        }

    def _report_inputs(self, scores: dict[str, str]) -> dict[str, dict[str, str]]:
        """Names of the artifacts a report reads: of each arm by kind, and of all scores by run."""
        inputs = {
            arm: {spec.kind: spec.name for spec in chain.specs()}
            for arm, chain in self.arms.items()
        }
        return {**inputs, "": scores}

    def _open(self, spec: Spec, stage: str) -> Artifact:
        return self.root.open(
            spec.name, f"run `strata {stage}` with the same recipe and settings first"
        )


def _score(config: EvaluateConfig, metric: str, root: Root, name: str, model: Artifact) -> float:
    """A model's mean over the tests of one metric."""
    scores = evaluate(config, {name: model}, root)[name].read().to_pylist()
    return next(
        float(row["value"]) for row in scores if row["task"] == MEAN and row["metric"] == metric
    )
