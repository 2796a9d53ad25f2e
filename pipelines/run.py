"""run: the chain of artifacts that a recipe stands for, and making what is missing."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from clusterlib.artifacts.artifact import Artifact, Root, Spec
from clusterlib.batches.plan import Plan
from clusterlib.batches.visits import PhaseSummary, summarize
from clusterlib.clusters.shards import Shards
from pipelines import STAGES
from pipelines.evaluate import mean_score, scores_spec
from pipelines.recipe import RunConfig
from pipelines.stage import Stage, find_or_make
from tune.search import Outcome, Trial, search
from tune.space import combinations

_STAGES: dict[str, Stage] = {
    name: importlib.import_module(f"pipelines.{name}").STAGE for name in STAGES
}
_BY_KIND = {stage.kind: stage for stage in _STAGES.values()}


class Arm:
    """One configuration of a run, and the specs of all it wants, each made from the ones before.

    Attributes:
        config: its settings, with names on a hub pinned to what they stand for now.
        run: that it is an arm of.
    """

    def __init__(self, name: str, config: RunConfig, run: Run) -> None:
        self.name = name
        self.config = config
        self.run = run
        self._specs: dict[str, Mapping[str, Spec]] = {}

    @functools.cached_property
    def sources(self) -> dict[str, RunConfig]:
        """The settings of each source, in the order of their names."""
        return {source: self.config.of_source(source) for source in self.config.source_names()}

    def specs(self, kind: str) -> Mapping[str, Spec]:
        """What it wants of the stage that makes `kind`; files and models are told apart once."""
        if kind not in self._specs:
            self._specs[kind] = _BY_KIND[kind].specs(self)
        return self._specs[kind]


class Run:
    """A recipe at work under a root. Each stage makes what all arms want of it, or finds it made.

    Names on a hub mean the same from here on, in every process: the commit they are at now.
    """

    def __init__(self, config: RunConfig, root: Root) -> None:
        self._recipe = config  # arms and trials that name another model do not want its commit
        self.config = config.pinned()
        self.root = root
        self.arms = {
            name: Arm(name, arm_config.pinned(), self)
            for name, arm_config in config.arm_configs().items()
        }

    def specs(self, kind: str) -> list[Spec]:
        """What the run wants of the stage that makes `kind`, each once."""
        return list(
            {
                spec.name: spec for arm in self.arms.values() for spec in arm.specs(kind).values()
            }.values()
        )

    def all_specs(self) -> list[Spec]:
        """All that the run wants, in order."""
        return [spec for kind in _BY_KIND for spec in self.specs(kind)]

    def make(self, stage: str) -> list[Artifact]:
        """What a stage makes for the run; those before it have finished."""
        return find_or_make(_STAGES[stage], self.specs(_STAGES[stage].kind), self.root)

    def plan(self) -> dict[str, list[PhaseSummary]]:
        """What the phases of each arm will see; needs its shards."""
        return {name: self._plan(arm) for name, arm in self.arms.items()}

    def _plan(self, arm: Arm) -> list[PhaseSummary]:
        shards = Shards([self.root.open(spec) for spec in arm.specs("shards").values()])
        plan = Plan(shards.index, arm.config.batching)
        return summarize(plan, arm.config.train.num_steps(plan))

    def scores(self) -> dict[str, Artifact]:
        """The finished scores of every reference and arm."""
        return {spec.label: self.root.open(spec) for spec in self.specs("scores")}

    def score(self, names: Sequence[str]) -> dict[str, Artifact]:
        """Scores of models from elsewhere, by folder or hub name, on the recipe's tests."""
        references = {name: {"name": name} for name in names}
        config = self.config.evaluate.replace(references=references)
        config = config.located(self.config.data).pinned()
        specs = [scores_spec(config, name, model) for name, model in config.references.items()]
        return dict(zip(names, find_or_make(_BY_KIND["scores"], specs, self.root), strict=True))

    def tune(self) -> list[Outcome]:
        """Train and score every combination of `tune.space` on the shards that are there."""
        tune = self.config.tune
        trials = [self._trial(changes) for changes in combinations(tune.space)]
        spec = Spec("tune", 2, {"tune": tune}, self._first_arm.specs("shards"))
        folder = f"{self.root.path}/{spec.name}"
        return search(trials, tune.metric, tune.max_concurrent, folder, self.root.fs)

    @property
    def _first_arm(self) -> Arm:
        return next(iter(self.arms.values()))

    def _trial(self, changes: dict[str, Any]) -> Trial:
        name = " ".join(f"{setting}={value}" for setting, value in changes.items())
        config = self._recipe.with_overrides(changes, "tune.space").pinned()
        arm = Arm(name, config, self)
        (model,) = arm.specs("model").values()
        scores = scores_spec(self.config.evaluate, name, model)
        for shards in model.inputs.values():
            self.root.open(shards)  # one message now, rather than one from each trial
        return Trial(
            name, functools.partial(_score, model, scores, self.config.tune.metric, self.root)
        )


def _score(model: Spec, scores: Spec, metric: str, root: Root) -> float:
    """A model's mean over the tests of one metric; it is trained and scored if it is not yet."""
    find_or_make(_BY_KIND["model"], [model], root)
    (found,) = find_or_make(_BY_KIND["scores"], [scores], root)
    return mean_score(found, metric)
