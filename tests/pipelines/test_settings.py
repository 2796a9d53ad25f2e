"""The settings as people read them, held against the models."""

from pathlib import Path

import pytest
from click.testing import CliRunner

import pipelines.settings
from clusterlib.errors import StrataError
from pipelines.cli import main
from pipelines.recipe import RunConfig
from pipelines.settings import as_markdown, settings

PAGE = Path(pipelines.settings.__file__).with_suffix(".md")


def test_the_page_says_what_the_models_say():
    assert PAGE.read_text() == as_markdown(settings(RunConfig)), (
        "make it anew: strata settings --markdown > pipelines/settings.md"
    )


def test_every_setting_is_described():
    bare = [setting.name for setting in settings(RunConfig) if len(setting.description) < 10]
    assert not bare


def test_a_section_is_what_is_below_its_name():
    names = [setting.name for setting in settings(RunConfig, "train.optimizer")]
    assert "train.optimizer.learning_rate" in names
    assert all(f"{name}.".startswith("train.optimizer.") for name in names)
    (one,) = settings(RunConfig, "cluster.num_fits")
    assert (one.type, one.default) == ("int >= 1", "2")
    assert settings(RunConfig, "cluster.num_leaves")[0].default is None


def test_an_unknown_section_is_named_with_those_there_are():
    with pytest.raises(StrataError, match=r"trian: no such section or setting; .*train"):
        settings(RunConfig, "trian")
    result = CliRunner().invoke(main, ["settings", "trian"])
    assert result.exit_code == 1 and "trian" in result.output
