"""The one exception a user is meant to read."""

from clusterlib.artifacts.credentials import redacted


class StrataError(Exception):
    """Bad input or configuration.

    The message names the file, row or field, the bad value and the remedy. The command line prints
    it alone, without a traceback, and exits with status 1. Credentials in URIs are left out of it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))
