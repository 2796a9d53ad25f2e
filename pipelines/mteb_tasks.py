"""mteb's own tasks: which of them can be scored here."""

from __future__ import annotations

import difflib
from typing import Any


def check_task(name: str) -> str:
    """The name of a task of mteb that ranks texts; a validator.

    Raises:
        ValueError: mteb has no such task, or it is no retrieval of texts.
    """
    import mteb  # which takes seconds, and only recipes that name tasks need it

    try:
        task = mteb.get_task(name)
    except KeyError:
        near = _near(name, [task.metadata.name for task in mteb.get_tasks() if _ranks_texts(task)])
        hint = f"did you mean {' or '.join(near)}?" if near else "see mteb.get_tasks()"
        raise ValueError(f"mteb has no task {name!r}; {hint}") from None
    if task.is_aggregate and task.metadata.type == "Retrieval":
        parts = ", ".join(part.metadata.name for part in task.metadata.tasks)
        raise ValueError(f"{name} is the mean of several tasks; name those of them: {parts}")
    if not _ranks_texts(task):
        raise ValueError(
            f"{name} is a task of type {task.metadata.type} for {', '.join(task.modalities)}; only "
            "retrieval of texts is scored here"
        )
    return name


def _ranks_texts(task: Any) -> bool:
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    return isinstance(task, AbsTaskRetrieval) and task.modalities == ["text"]


def _near(name: str, known: list[str]) -> list[str]:
    """Up to three known names like `name`, whatever their case."""
    by_key = {other.lower(): other for other in known}
    return [by_key[key] for key in difflib.get_close_matches(name.lower(), by_key)]
