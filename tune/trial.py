"""A trial: train the student of one whole configuration and measure it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from clusterlib.artifacts.artifact import Artifact, Root
from clusterlib.batches.plan import BatchingConfig
from train.config import TrainConfig
from train.launch import train
from train.learner import Tests


@dataclasses.dataclass(frozen=True)
class Trial:
    """One point of the space, with all it needs; it travels to the trial's process.

    Attributes:
        name: its overrides, for people.
        tests: of the training loop.
        score: the metric's value of a trained model.
    """

    name: str
    train: TrainConfig
    batching: BatchingConfig
    shards: Artifact
    root: Root
    tests: Tests
    score: Callable[[str, Artifact], float]

    def run(self) -> float:
        """Train, or find the model already trained with these settings, and score it."""
        model = train(self.train, self.batching, self.shards, self.root, self.name, self.tests)
        return self.score(self.name, model)
