"""Credentials inside URIs: told apart, and taken out of whatever is kept or shown."""

from __future__ import annotations

import re

_HIDDEN = "***"
_ADDRESS = r"(?P<scheme>[A-Za-z][\w+.-]*)://"
# A slash may stand in a secret that nobody escaped: then the host seems to have a port that is no
# number, and the rest of the secret runs to the last @.
_USER = re.compile(
    rf"{_ADDRESS}(?:(?P<user>[^/?#\s'\"\[]*)"
    r"|[^/?#\s'\":\[]*:[^\s'\"/?#]*[^\d\s'\"/?#][^\s'\"]*)@"
)
_PARAMETER = re.compile(
    r"(?P<name>[?&;](?:[\w.%-]*(?:secret|token|passw(?:or)?d|signature|credential|access_?key"
    r"|account_?key|api_?key)[\w.%-]*|sig|key)=)[^&;#\s'\"]+",
    re.IGNORECASE,
)
# What stands before the @ there is a container or a user, and no secret unless a colon follows it.
_NAMED = frozenset({"abfs", "abfss", "wasb", "wasbs", "hdfs", "viewfs", "ssh", "sftp", "ftp"})
_VARIABLES = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET",
    "hf": "HF_TOKEN",
}
_KIN = {"s3a": "s3", "s3n": "s3", "gcs": "gs", **dict.fromkeys(("abfs", "abfss", "adl"), "az")}


def redacted(text: str) -> str:
    """`text` with `***` for the credentials of every URI in it: before the host, or in parameters.

    >>> redacted("s3://key:secret@bucket/in?session_token=abc is not there")
    's3://***@bucket/in?session_token=*** is not there'
    """
    return _PARAMETER.sub(rf"\g<name>{_HIDDEN}", _USER.sub(_hide, text))


def _hide(match: re.Match[str]) -> str:
    user = match["user"]
    if user == "" or (user and ":" not in user and match["scheme"].lower() in _NAMED):
        return match[0]
    return f"{match['scheme']}://{_HIDDEN}@"


def remedy(text: str) -> str:
    """What to do about the credentials of the first URI in a text."""
    found = re.search(_ADDRESS, text)
    scheme = found["scheme"].lower() if found else ""
    variables = _VARIABLES.get(_KIN.get(scheme, scheme), "its file system's own variables")
    return (
        f"what is in a URI is kept in manifests and reports: leave them out, and set {variables} "
        "in the environment, here and on every node"
    )
