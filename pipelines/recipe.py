"""A recipe: the settings of a whole run, read from YAML with dotted overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from clusterlib.artifacts.config import Config, override, read_yaml, runtime, validate
from clusterlib.batches.plan import BatchingConfig
from clusterlib.errors import StrataError
from pipelines.cluster import ClusterConfig
from pipelines.embed import EmbedConfig
from pipelines.evaluate import EvaluateConfig
from pipelines.files import absolute
from pipelines.ingest import IngestConfig
from pipelines.shard import ShardConfig
from train.config import TrainConfig, teacher_settings
from tune.space import TuneConfig

_RECIPES = Path(__file__).parent / "recipes"
_BY_SOURCE = ("embed", "cluster", "shard")
# One model learns from all sources: their tokens and vectors must be of one kind.
_SHARED = ("embed.teacher", "embed.precision", "shard.tokenizer", "shard.teacher_vectors")


class RunConfig(Config):
    """A recipe: every setting of a run."""

    name: str = Field(..., pattern=r"^[\w.-]+$", description="what the run is called in its report")
    description: str = Field("", description="what it is, for people")
    data: str = runtime(
        ".", description="folder or URI where relative paths of inputs and tests start"
    )
    ingest: IngestConfig
    embed: EmbedConfig
    cluster: ClusterConfig
    shard: ShardConfig
    sources: dict[str, dict[str, JsonValue]] = Field(
        {},
        description="source -> dotted settings of embed, cluster and shard that differ for it, "
        "such as embed.query_prompt, cluster.num_leaves or shard.passage_max_tokens",
    )
    batching: BatchingConfig
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    tune: TuneConfig = TuneConfig()
    arms: dict[str, dict[str, JsonValue]] = Field(
        {},
        description="runs to compare: name -> dotted settings that differ; artifacts they share "
        "are made once",
    )

    @field_validator("sources")
    @classmethod
    def _may_differ(
        cls, sources: dict[str, dict[str, JsonValue]]
    ) -> dict[str, dict[str, JsonValue]]:
        for source, changes in sources.items():
            for name in changes:
                shared = any(f"{name}.".startswith(f"{other}.") for other in _SHARED)
                if name.partition(".")[0] not in _BY_SOURCE or shared:
                    raise ValueError(
                        f"{source}: {name} cannot differ by source; what can are other settings of "
                        f"{', '.join(_BY_SOURCE)}"
                    )
        return sources

    @model_validator(mode="after")
    def _names_runs_apart(self) -> Self:
        arms = self.arms or {self.name: {}}
        if "" in arms:
            raise ValueError("an arm has an empty name; name it")
        for arm in arms:
            if arm in self.evaluate.references:
                raise ValueError(
                    f"arm {arm} is named like evaluate.references.{arm}, and its scores would take "
                    "the other's place; rename one"
                )
        return self

    @model_validator(mode="after")
    def _has_sources(self) -> Self:
        known = {item.source for item in self.ingest.inputs}
        for source in sorted(set(self.sources) - known):
            there = ", ".join(sorted(known))
            raise ValueError(f"sources.{source}: no input is of that source; there are {there}")
        return self

    @model_validator(mode="after")
    def _has_tests(self) -> Self:
        if self.train.test_every_steps and not (self.evaluate.tests or self.evaluate.tasks):
            raise ValueError(
                f"train.test_every_steps={self.train.test_every_steps} has nothing to test on; "
                "name some in evaluate.tests or evaluate.tasks"
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

    def content(self) -> dict[str, Any]:
        """What a report says of the recipe itself; the rest is in what it was made from."""
        return {"name": self.name, "description": self.description}

    def source_names(self) -> list[str]:
        """Sorted."""
        return sorted({item.source for item in self.ingest.inputs})

    def of_source(self, source: str) -> RunConfig:
        """The settings of one source."""
        changes = self.sources.get(source)
        return self.with_overrides(changes, f"sources.{source}") if changes else self

    def arm_configs(self) -> dict[str, RunConfig]:
        """The configuration of each arm; the recipe itself, by its own name, when it has none."""
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
    for arm in config.arm_configs().values():  # faults there show now, not after hours
        for source in arm.source_names():
            arm.of_source(source)
    return config
