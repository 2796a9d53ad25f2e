"""A stage: which artifacts an arm of a run wants of it, and making those that are missing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from clusterlib.artifacts.artifact import Artifact, Root, Spec
from clusterlib.artifacts.draft import Draft

if TYPE_CHECKING:
    from pipelines.run import Arm


class Stage(ABC):
    """Makes artifacts of one kind. A file that `pipelines.STAGES` names has an object, STAGE.

    Attributes:
        kind: of what it makes.
    """

    kind: ClassVar[str]

    @abstractmethod
    def specs(self, arm: Arm) -> Mapping[str, Spec]:
        """What an arm wants of this stage: by source, or by model, or one alone.

        What several arms want alike has one name, so it is made once.
        """

    def check(self, specs: Sequence[Spec], root: Root) -> None:
        """Refuse what does not fit any of the artifacts that are wanted, those that are there
        included; asked before others are made.

        Raises:
            StrataError: there is such a setting.
        """
        return

    @abstractmethod
    def make(self, specs: Sequence[Spec], root: Root) -> None:
        """Make artifacts, none of which is there, from finished inputs.

        Raises:
            StrataError: an input is not finished, or cannot be used.
        """


def find_or_make(stage: Stage, specs: Iterable[Spec], root: Root) -> list[Artifact]:
    """The artifacts of the specs, each once; what is not there is made."""
    wanted = {spec.name: spec for spec in specs}
    missing = [spec for spec in wanted.values() if Draft(root, spec).find() is None]
    if missing:
        stage.check(list(wanted.values()), root)
        stage.make(missing, root)
    return [root.open(spec) for spec in wanted.values()]
