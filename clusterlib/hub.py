"""The Hugging Face hub: a name there is a moving target, a commit is not."""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path
from typing import Literal

from clusterlib.errors import StrataError

_COMMIT = re.compile("[0-9a-f]{40}")
_TIMEOUT_SECONDS = 10


def is_commit(revision: str | None) -> bool:
    """Whether a revision names one state for ever, as branches and tags do not."""
    return bool(revision and _COMMIT.fullmatch(revision))


@functools.cache
def commit(name: str, revision: str | None, kind: Literal["model", "dataset"] = "model") -> str | None:
    """The commit that a name (or a branch or tag of it) stands for now; asked for once in a process.

    Where the hub does not answer it is the one in this machine's cache of the hub, or None. A line says so.

    Raises:
        StrataError: the hub answers that there is no such thing, and the cache has none.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    if is_commit(revision):
        return revision
    try:
        return str(HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=_TIMEOUT_SECONDS).sha)
    except HFValidationError as error:
        raise StrataError(f"{name}: no name of a {kind} on the hub ({error})") from error
    except RevisionNotFoundError as error:
        raise StrataError(f"{name}: the hub has it, but no revision {revision!r}") from error
    except (OSError, HTTPError) as error:  # private ones look absent without a token, yet may be in the cache
        refused = error
    found = _cached(name, revision or "main", kind)
    if found is None and isinstance(refused, RepositoryNotFoundError):
        raise StrataError(
            f"{name}: no such {kind} on the hub, or none for you; check the name, or set HF_TOKEN"
        ) from refused
    asked = f"{name} at {revision}" if revision else name
    taken = (
        f"{found}, the one in this machine's cache, is taken"
        if found
        else "its name alone stands for it, and a change there goes unseen; set its revision"
    )
    reason = (str(refused).splitlines() or [""])[0]
    print(
        f"{asked}: the hub does not say which commit it is at ({type(refused).__name__}: {reason}); {taken}",
        file=sys.stderr,
    )
    return found


def _cached(name: str, revision: str, kind: str) -> str | None:
    """As laid out in https://huggingface.co/docs/huggingface_hub/guides/manage-cache."""
    from huggingface_hub import constants

    folder = "--".join((f"{kind}s", *name.split("/")))
    try:
        return Path(constants.HF_HUB_CACHE, folder, "refs", revision).read_text(encoding="ascii").strip()
    except OSError:
        return None
