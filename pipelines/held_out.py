"""Which pairs retrieval tests keep out of training, told by the ids of their texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clusterlib.artifacts.config import Config
from clusterlib.artifacts.tables import text_ids
from pipelines.retrieval_tests import HoldOut, Role, TestConfig, forms, texts
from pipelines.sources import origin

_ROLES: Mapping[HoldOut, Sequence[Role]] = {
    "corpus": ("query", "judged passage", "other passage"),
    "judged": ("query", "judged passage"),
    "none": (),
}


def held_out_content(tests: Sequence[TestConfig]) -> list[Any]:
    """What identifies the texts that tests hold out, whatever the tests are called and in whatever
    order.
    """
    found = [
        {"hold_out": test.hold_out, "content": origin(test)}
        for test in tests
        if _ROLES[test.hold_out]
    ]
    distinct = {json.dumps(item, sort_keys=True): item for item in found}
    return [item for _, item in sorted(distinct.items())]


class HoldOutConfig(Config):
    """The tests that hold texts out of a spec's artifact; what they hold out is in its origin."""

    tests: list[TestConfig]

    def content(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class HeldOut:
    """The ids of the texts that are held out.

    Attributes:
        ids: uint64 [n], distinct, sorted.
        owners: int32 [n], the number of the reason for each.
        reasons: what a pair with such a text is refused for.
    """

    ids: np.ndarray
    owners: np.ndarray
    reasons: list[str]

    def find(self, *ids: np.ndarray) -> np.ndarray:
        """The number of the reason to leave a row out, for the first of its ids that is held out;
        -1 for none. int32 [rows].

        Args:
            ids: of each text of the rows, uint64 [rows] each.
        """
        owners = np.append(self.owners, np.int32(-1))
        found = np.full(len(ids[0]), -1, np.int32)
        for column in reversed(ids):
            owner = owners[places(column, self.ids)]
            found = np.where(owner >= 0, owner, found)
        return found


def held_out(tests: Sequence[TestConfig]) -> HeldOut:
    """The ids of what tests hold out: a text that several do is the first one's.

    A passage with a title has two: of title and text as one, and of the text alone.

    Raises:
        StrataError: the files or data of a test that holds something out cannot be had.
    """
    ids: list[np.ndarray] = [np.empty(0, np.uint64)]
    owners: list[np.ndarray] = [np.empty(0, np.int32)]
    reasons: list[str] = []
    for test in tests:
        wanted = _ROLES[test.hold_out]
        for role, table in texts(test) if wanted else ():
            if role in wanted:
                reason = f"equals a {role.split()[-1]} of the test {test.name}"
                if reason not in reasons:
                    reasons.append(reason)
                ids.append(text_ids(forms(table)[0]))
                owners.append(np.full(len(ids[-1]), reasons.index(reason), np.int32))
    distinct, first = np.unique(np.concatenate(ids), return_index=True)
    return HeldOut(distinct, np.concatenate(owners)[first], reasons)


def places(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where values stand among distinct sorted keys, int64 [n]; -1 for those that do not.

    Searching in order is some four times as fast as at random, sorting included.
    """
    distinct, back = np.unique(values, return_inverse=True)
    at = np.searchsorted(keys, distinct)
    inside = np.minimum(at, max(len(keys) - 1, 0))
    found = keys[inside] == distinct if len(keys) else np.zeros(len(distinct), bool)
    return np.where(found, inside, -1)[back]
