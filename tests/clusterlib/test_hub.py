from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from clusterlib import hub
from clusterlib.errors import StrataError

COMMIT, OTHER = "c" * 40, "d" * 40


def refusal(kind, text="refused"):
    """One of the hub's own errors, without the answer it would carry."""
    error = kind.__new__(kind)
    error.args = (text,)
    return error


@pytest.fixture
def answers(monkeypatch):
    """What a stand-in for the hub answers: (name, revision) -> commit or error; and what it was asked."""
    hub.commit.cache_clear()
    found, asked = {}, []

    def repo_info(self, name, *, revision=None, repo_type=None, timeout=None):
        asked.append((name, revision, repo_type))
        answer = found[name, revision]
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(sha=answer)

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    yield found, asked
    hub.commit.cache_clear()


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A cache of the hub on this machine that holds owner/model at OTHER, as `main`."""
    folder = tmp_path / "models--owner--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(OTHER)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))


def test_a_name_or_a_branch_is_its_commit_asked_for_once(answers):
    found, asked = answers
    found.update({("owner/model", None): COMMIT, ("owner/model", "dev"): OTHER})
    for _ in range(2):
        assert hub.commit("owner/model", None) == COMMIT
        assert hub.commit("owner/model", "dev") == OTHER
    assert asked == [("owner/model", None, "model"), ("owner/model", "dev", "model")]


def test_a_commit_needs_no_hub(answers):
    assert hub.commit("owner/model", COMMIT) == COMMIT and answers[1] == []


@pytest.mark.parametrize("error", [refusal(OfflineModeIsEnabled, "offline"), OSError("no route"), TimeoutError("late")])
def test_without_a_hub_the_machines_own_cache_says_it_and_a_line_tells_so(answers, cached, capsys, error):
    answers[0].update({("owner/model", None): error, ("owner/model", "dev"): error})
    for _ in range(2):
        assert hub.commit("owner/model", None) == OTHER
        assert hub.commit("owner/model", "dev") is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("owner/model: the hub does not say which commit it is at") and OTHER in lines[0]
    assert lines[1].startswith("owner/model at dev: the hub does not say") and "a change there goes unseen" in lines[1]


def test_a_private_model_is_found_in_the_cache(answers, cached):
    answers[0]["owner/model", None] = refusal(RepositoryNotFoundError)
    assert hub.commit("owner/model", None) == OTHER


@pytest.mark.parametrize(
    "error, message",
    [
        (refusal(RepositoryNotFoundError), "no/such: no such model on the hub, or none for you"),
        (refusal(RevisionNotFoundError), "no/such: the hub has it, but no revision 'v2'"),
        (refusal(HFValidationError, "Repo id must use"), "no/such: no name of a model on the hub"),
    ],
)
def test_what_is_not_there_is_told_at_once(answers, cached, error, message):
    answers[0]["no/such", "v2"] = error
    with pytest.raises(StrataError, match=message):
        hub.commit("no/such", "v2")


def test_data_sets_are_asked_for_as_such(answers):
    answers[0]["owner/data", None] = COMMIT
    assert hub.commit("owner/data", None, "dataset") == COMMIT
    assert answers[1] == [("owner/data", None, "dataset")]
