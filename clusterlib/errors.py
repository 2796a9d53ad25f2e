"""The one exception a user is meant to read."""


class StrataError(Exception):
    """Bad input or configuration.

    The message names the file, row or field, the bad value and the remedy. The command line prints
    it alone, without a traceback, and exits with status 1.
    """
