"""train: the `shards` of all sources -> `model`, a student trained on their planned batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from clusterlib.artifacts.artifact import Root, Spec
from pipelines.evaluate import StudentTests
from pipelines.stage import Stage
from train.launch import model_spec, train

if TYPE_CHECKING:
    from pipelines.run import Arm


class Train(Stage):
    """An arm's student."""

    kind = "model"

    def specs(self, arm: Arm) -> dict[str, Spec]:
        config = arm.config
        tests = StudentTests(config.evaluate.tests, config.evaluate.task_names)
        prompts = {"query": config.shard.query_prompt, "document": config.shard.passage_prompt}
        shards = arm.specs("shards")
        return {
            arm.name: model_spec(config.train, config.batching, shards, prompts, arm.name, tests)
        }

    def make(self, specs: Sequence[Spec], root: Root) -> None:
        """Train one after the other: each takes all its ranks."""
        for spec in specs:
            tests = StudentTests(spec.config.get("tests", ()), spec.config.get("tasks", ()))
            train(spec, root, tests)


STAGE = Train()
