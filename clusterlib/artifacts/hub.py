"""The Hugging Face hub: a name there is a moving target, a commit is not."""

from __future__ import annotations

import functools
import re
import sys
from typing import Literal

from clusterlib.errors import StrataError

_COMMIT = re.compile("[0-9a-f]{40}")


def is_commit(revision: str | None) -> bool:
    """Whether a revision names one state for ever, as branches and tags do not."""
    return bool(revision and _COMMIT.fullmatch(revision))


@functools.cache
def commit(
    name: str, revision: str | None, kind: Literal["model", "dataset"] = "model"
) -> str | None:
    """The commit that a name (or a branch or tag of it) stands for now; asked for once in a
    process.

    Where the hub does not answer it is the one that this machine's cache has seen last, or None;
    either is said on stderr.

    Raises:
        StrataError: the hub answers that there is no such thing, or does not show it to this user.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, RevisionResolutionError

    asked = f"{name} at {revision}" if revision else name
    try:
        # Where the cache stands in for the hub, this logs a warning of its own. `resolved` is the
        # commit; the answer itself, a str, is the revision that was asked for.
        return HfApi().resolve_revision(name, repo_type=kind, revision=revision).resolved
    except RevisionResolutionError:
        print(
            f"{asked}: the hub does not say which commit this {kind} is at; its name alone stands "
            "for it, and a change there goes unseen (set its revision to a commit)",
            file=sys.stderr,
        )
        return None
    except HFValidationError as error:
        raise StrataError(
            f"{name}: neither a local folder nor the name of a {kind} on the hub"
        ) from error
    except (HTTPError, OSError) as error:
        raise StrataError(
            f"{asked}: the hub does not give this {kind} ({str(error).partition(chr(10))[0]}); "
            "check its name and revision, and HF_TOKEN where it is private"
        ) from error
