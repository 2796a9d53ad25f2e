import logging
from types import SimpleNamespace

import httpx2
import huggingface_hub
import pytest
from huggingface_hub.errors import (
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from clusterlib.artifacts import hub
from clusterlib.errors import StrataError

COMMIT, OTHER = "c" * 40, "d" * 40


@pytest.fixture
def answers(monkeypatch, tmp_path):
    """What a stand-in for the hub answers: (name, revision) -> commit or error; and what it was
    asked. The cache of this machine knows owner/model alone, as it was at OTHER."""
    hub.commit.cache_clear()
    found, asked = {}, []

    def repo_info(self, repo_id, *, revision=None, repo_type=None, token=None):
        asked.append((repo_id, revision, repo_type))
        answer = found[repo_id, revision]
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(sha=answer)

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    refs = tmp_path / "models--owner--model" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(OTHER)
    yield found, asked
    hub.commit.cache_clear()


def refused(kind, status):
    return kind(
        "refused", response=httpx2.Response(status, request=httpx2.Request("GET", "https://hub"))
    )


def test_a_name_or_a_branch_is_its_commit_asked_for_once(answers):
    found, asked = answers
    found.update({("owner/model", None): COMMIT, ("owner/model", "dev"): OTHER})
    for _ in range(2):
        assert hub.commit("owner/model", None) == COMMIT
        assert hub.commit("owner/model", "dev") == OTHER
    assert asked == [("owner/model", None, "model"), ("owner/model", "dev", "model")]


def test_a_commit_needs_no_hub(answers):
    assert hub.commit("owner/model", COMMIT) == COMMIT and answers[1] == []


@pytest.mark.parametrize(
    "error", [OfflineModeIsEnabled("offline"), httpx2.ConnectError("no"), httpx2.ReadTimeout("")]
)
def test_without_a_hub_the_machines_own_cache_says_it_and_a_line_tells_so(
    answers, capsys, caplog, monkeypatch, error
):
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    answers[0].update({("owner/model", None): error, ("owner/model", "dev"): error})
    for _ in range(2):
        assert hub.commit("owner/model", None) == OTHER
        assert hub.commit("owner/model", "dev") is None
    (record,) = caplog.records
    assert "Using cached commit hash for 'owner/model'" in record.getMessage()
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line.startswith("owner/model at dev: the hub does not say")
        and "a change there goes unseen" in line
    )


@pytest.mark.parametrize(
    "kind, status", [(RepositoryNotFoundError, 401), (RevisionNotFoundError, 404)]
)
def test_what_the_hub_does_not_give_is_told_at_once(answers, kind, status):
    answers[0]["no/such", "v2"] = refused(kind, status)
    with pytest.raises(
        StrataError, match=r"no/such at v2: the hub does not give this model \(refused.*HF_TOKEN"
    ):
        hub.commit("no/such", "v2")


@pytest.mark.parametrize("name", ["no such name", "a..b", "-"])
def test_what_is_no_name_is_told_at_once(answers, name):
    with pytest.raises(
        StrataError, match=f"{name}: neither a local folder nor the name of a model on the hub"
    ):
        hub.commit(name, None)


def test_data_sets_are_asked_for_as_such(answers):
    answers[0]["owner/data", None] = COMMIT
    assert hub.commit("owner/data", None, "dataset") == COMMIT
    assert answers[1] == [("owner/data", None, "dataset")]
