"""The space a sweep searches: dotted settings and the values each may take."""

from __future__ import annotations

import itertools
from typing import Any, Literal

from pydantic import Field, JsonValue, field_validator

from clusterlib.artifacts.config import Config, runtime


class TuneConfig(Config):
    """A sweep: every combination of the listed values is a trial."""

    space: dict[str, list[JsonValue]] = Field(
        {"batching.strategy": ["random", "cluster"]},
        description="dotted setting -> values to try, such as batching.k: [5, 10, 20]",
    )
    metric: Literal["ndcg_at_10", "recall_at_100", "mrr_at_10"] = Field(
        "ndcg_at_10", description="mean over the tests, that trials are ranked by"
    )

    max_concurrent: int = runtime(
        1, ge=1, description="trials at once; each takes train.num_workers ranks"
    )

    @field_validator("space")
    @classmethod
    def _not_empty(cls, space: dict[str, list[JsonValue]]) -> dict[str, list[JsonValue]]:
        for name, values in space.items():
            if not values:
                raise ValueError(f"{name}: list at least one value to try")
        return space


def combinations(space: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Every trial's overrides, in the order of the lists; the last setting changes fastest."""
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
