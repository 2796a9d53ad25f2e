import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterlib.artifacts.credentials import redacted, remedy

SECRET = st.text(string.ascii_letters + string.digits + "+/=_-.%", min_size=4).filter(
    lambda secret: any(letter.isalpha() for letter in secret) and not begins_as_a_port(secret)
)


def begins_as_a_port(secret):
    """`key:80/...@host` cannot be told from a path on a host with a port."""
    number, slash, _ = secret.partition("/")
    return bool(slash) and (not number or number.isdigit())


@given(SECRET, st.sampled_from(["s3", "gs", "abfs", "https", "simplecache::s3"]), st.booleans())
def test_a_secret_is_in_no_redacted_text(secret, scheme, in_query):
    template = "{}://host/in?region=here&SECRET_KEY={}&x=1" if in_query else "{}://{}@host/in"
    text = f"'{template.format(scheme, secret if in_query else f'KEY:{secret}')}': not there"
    assert redacted(text) == f"'{template.format(scheme, '***')}': not there"
    assert redacted(redacted(text)) == redacted(text)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://token@bucket/x",
        "https://user:pass@host:8265",
        "https://host/x?sig=abc%3D&sv=1",
        "https://host/x?X-Amz-Credential=abc",
        "https://host/x?X-Amz-Security-Token=abc",
        "s3://bucket/x?access_key=abc",
        "s3://bucket/x?region=r&session_token=abc",
        "abfs://container:key@account.dfs.core.windows.net/x",
    ],
)
def test_what_is_a_credential(uri):
    assert "***" in redacted(uri)


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a@b/c:d.jsonl",
        "s3://bucket/a?.jsonl",
        "s3://bucket/x?region=here&endpoint_override=http://127.0.0.1:9000",
        "http://host:8265/a@b",
        "http://[::1]:8265/a@b",
        "abfs://container@account.dfs.core.windows.net/x",
        "hdfs://user@host:8020/x",
        "hf://datasets/owner/set@main/x.parquet",
        "mail someone@example.org, or see https://example.org",
        "a: key=3, token=4",
    ],
)
def test_what_is_none(text):
    assert redacted(text) == text


def test_the_remedy_names_the_variables_of_the_store():
    assert "AWS_SECRET_ACCESS_KEY" in remedy("s3a://k:s@b")
    assert "GOOGLE_APPLICATION_CREDENTIALS" in remedy("gs://t@b")
    assert "AZURE_CLIENT_SECRET" in remedy("abfss://c:s@a")
    assert "its file system's own variables" in remedy("ftp://u:p@h")
