"""run: the chain of artifacts that a recipe stands for, and making what is missing."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc

from clusterlib.artifacts.artifact import Artifact, Root, Spec
from clusterlib.artifacts.storage import bare
from clusterlib.batches.plan import Batch, Plan
from clusterlib.batches.visits import PhaseSummary, summarize
from clusterlib.clusters.shards import Shards, read_range
from clusterlib.errors import StrataError
from pipelines import ENVIRONMENT, STAGES
from pipelines.evaluate import METRICS, mean_score, scores_spec
from pipelines.files import absolute
from pipelines.recipe import RunConfig, load_recipe
from pipelines.session import ray_session
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

    def tables(self, kind: str, table: str | None = None) -> dict[str, pa.Table]:
        """What it has of a kind: `pairs` to `shards` by source, `model` and `scores` by model.

        Args:
            table: another than the kind's own, such as `rejects` of pairs or `steps` of a model;
                it has no entry where there is none of it.

        Raises:
            StrataError: there is no such kind, or its stage has not finished.
        """
        if kind not in _BY_KIND:
            raise StrataError(f"{kind}: no such kind; there are {', '.join(_BY_KIND)}")
        found = {name: self.run.root.open(spec) for name, spec in self.specs(kind).items()}
        return {
            name: artifact.read(table) for name, artifact in found.items() if artifact.parts(table)
        }

    @functools.cached_property
    def shards(self) -> Shards:
        """What it learns from; its shards have finished."""
        return Shards([self.run.root.open(spec) for spec in self.specs("shards").values()])

    @functools.cached_property
    def plan(self) -> Plan:
        """Its batches; its shards have finished."""
        return Plan(self.shards.index, self.config.batching)

    @property
    def num_steps(self) -> int:
        """Of its run."""
        return self.config.train.num_steps(self.plan)

    def batches(self) -> Iterator[Batch]:
        """The batch of every step, in order, as training sees it; its shards have finished.

        Raises:
            StrataError: a batch has neighbors, which are mined while the student learns.
        """
        for step in range(self.num_steps):
            if self.plan.mining(step, self.num_steps) is not None:
                raise StrataError(
                    f"{self.name}: step {step} has mined neighbors, which training alone finds; "
                    "choose an arm of another strategy"
                )
            yield self.plan.step(step, self.num_steps)

    def texts(self, batch: Batch) -> pa.Table:
        """The pairs of one of its batches, source, query and passage, in the batch's order.

        Read are the pair ids between its first and last row in leaf order, and all pairs of its
        sources, a row group at a time.
        """
        first, last = int(batch.rows.min()), int(batch.rows.max())
        rows = read_range(self.shards, first, last + 1, ["source", "pair_id"])
        rows = rows.take(batch.rows - first).append_column(
            "place", pa.array(range(len(batch.rows)))
        )
        pieces = []
        for source in pc.unique(rows["source"]).to_pylist():
            of_source = rows.filter(pc.equal(rows["source"], source))
            pairs = self._pairs(source, of_source["pair_id"])
            pieces.append(pairs.append_column("place", of_source["place"]))
        return pa.concat_tables(pieces).sort_by("place").drop_columns("place")

    def _pairs(self, source: str, ids: pa.ChunkedArray) -> pa.Table:
        """Pairs of a source by id, in that order."""
        artifact = self.run.root.open(self.specs("pairs")[source])
        groups = artifact.row_groups(["pair_id", "source", "query", "passage"])
        found = pa.concat_tables(
            [group.filter(pc.is_in(group["pair_id"], value_set=ids)) for group in groups]
        )
        places = pc.index_in(ids, value_set=found["pair_id"])
        return found.take(places).drop_columns("pair_id")


class Run:
    """A recipe at work under a root. Each stage makes what all arms want of it, or finds it made.

    Names on a hub mean the same from here on, in every process: the commit they are at now.

    What the commands do, from Python:

    >>> run = Run.open("demo", {"train.steps": 400}, root="runs")
    >>> shards = run.run_to("shard")
    >>> arm = run.arms["cluster"]
    >>> numpy = arm.tables("pairs")["numpy"].to_pandas()
    >>> labels = [batch.label for batch in arm.batches()]
    >>> first = arm.texts(next(arm.batches()))
    >>> scores = run.run_to("evaluate")
    >>> ndcg = run.score_frame("ndcg_at_10")
    >>> losses = arm.tables("model", "steps")["cluster"]["loss"]

    Attributes:
        config: the recipe, with names on a hub pinned.
        root: where its artifacts are.
        arms: by name; one of the recipe's name where it compares none.
    """

    def __init__(self, config: RunConfig, root: Root) -> None:
        self._recipe = config  # arms and trials that name another model do not want its commit
        self.config = config.pinned()
        self.root = root
        self.arms = {
            name: Arm(name, arm_config.pinned(), self)
            for name, arm_config in config.arm_configs().items()
        }

    @classmethod
    def open(
        cls, recipe: str, overrides: Mapping[str, Any] | None = None, root: str = "runs"
    ) -> Self:
        """A recipe's run; nothing is made yet.

        Args:
            recipe: the name of a packaged recipe, or the path of a .yaml file.
            overrides: settings by dotted name, such as {"batching.k": 20}.
            root: folder or URI of its artifacts.

        Raises:
            StrataError: there is no such recipe, or a setting is wrong.
        """
        os.environ.update({**ENVIRONMENT, **os.environ})
        return cls(load_recipe(recipe, dict(overrides or {})), Root(absolute(root)))

    def run_to(self, stage: str, address: str | None = None) -> list[Artifact]:
        """Make what the stages up to this one make, or find it made; what the last of them made.

        Args:
            stage: a name in `pipelines.STAGES`.
            address: of a running Ray cluster; by default RAY_ADDRESS, else a Ray is started on this
                machine and stopped at the end.

        Raises:
            StrataError: there is no such stage, or one cannot do its work.
        """
        names = list(_STAGES)
        if stage not in names:
            raise StrataError(f"{stage}: no such stage; there are {', '.join(names)}")
        self.all_specs()  # inputs and models that are not there show now, not after hours
        self.root.check_writable()
        with ray_session(address):
            return [self.make(name) for name in names[: names.index(stage) + 1]][-1]

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
        return {name: summarize(arm.plan, arm.num_steps) for name, arm in self.arms.items()}

    def scores(self) -> dict[str, Artifact]:
        """The finished scores of every reference and arm."""
        return {spec.label: self.root.open(spec) for spec in self.specs("scores")}

    def score_frame(self, metric: str = "ndcg_at_10") -> Any:
        """A pandas DataFrame of one metric: a row for each reference and arm, a column for each
        test and split; scores have finished.

        Raises:
            StrataError: there is no such metric, or scores have not finished.
        """
        if metric not in METRICS:
            raise StrataError(f"{metric}: no such metric; there are {', '.join(METRICS)}")
        scores = self.scores()
        rows = pa.concat_tables([artifact.read() for artifact in scores.values()])
        frame = rows.filter(pc.equal(rows["metric"], metric)).to_pandas()
        frame = frame.pivot(index="run", columns=["task", "split"], values="value")
        return frame.reindex(list(scores))

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
        trials = [self._trial(arm) for arm in self._trial_arms()]
        folder = f"{self.root.path}/{self._tune_spec.name}"
        return search(trials, tune.metric, tune.max_concurrent, folder, bare(self.root.fs))

    def needs(self) -> set[str]:
        """Names of all artifacts that the recipe and its trials make, and of what these are made
        from.
        """
        wanted = [*self.all_specs(), self._tune_spec]
        wanted += [scores for arm in self._trial_arms() for scores in self._scored(arm)]
        names: set[str] = set()
        while wanted:
            spec = wanted.pop()
            if spec.name not in names:
                names.add(spec.name)
                wanted += spec.inputs.values()
        return names

    @property
    def _tune_spec(self) -> Spec:
        first = next(iter(self.arms.values()))
        return Spec("tune", 2, {"tune": self.config.tune}, first.specs("shards"))

    def _trial_arms(self) -> Iterator[Arm]:
        """An arm of every combination of `tune.space`, called by its overrides."""
        for changes in combinations(self.config.tune.space):
            name = " ".join(f"{setting}={value}" for setting, value in changes.items())
            yield Arm(name, self._recipe.with_overrides(changes, "tune.space").pinned(), self)

    def _scored(self, arm: Arm) -> list[Spec]:
        """The scores of a trial."""
        config = self.config.evaluate
        return [scores_spec(config, arm.name, model) for model in arm.specs("model").values()]

    def _trial(self, arm: Arm) -> Trial:
        (scores,) = self._scored(arm)
        model = scores.inputs["model"]
        for shards in model.inputs.values():
            self.root.open(shards)  # one message now, rather than one from each trial
        metric = self.config.tune.metric
        return Trial(arm.name, functools.partial(_score, model, scores, metric, self.root))


def _score(model: Spec, scores: Spec, metric: str, root: Root) -> float:
    """A model's mean over the tests of one metric; it is trained and scored if it is not yet."""
    find_or_make(_BY_KIND["model"], [model], root)
    (found,) = find_or_make(_BY_KIND["scores"], [scores], root)
    return mean_score(found, metric)
