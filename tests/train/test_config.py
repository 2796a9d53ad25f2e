"""The settings of training: what they refuse, and that each says what it is."""

from typing import get_args

import pytest
from annotated_types import Ge, Gt

from clusterlib.artifacts.config import Config
from train.config import TrainConfig
from train.model import POOLINGS, ModelRef, TokenizerRef
from train.trackers import TRACKERS


def train_config(architecture, **settings):
    student = {"architecture": architecture}
    return TrainConfig.model_validate(
        {"student": student, "optimizer": {"learning_rate": 1}, **settings}
    )


def test_the_best_cannot_be_kept_without_tests(architecture):
    with pytest.raises(
        ValueError,
        match="keep=best needs tests in the loop to tell the best by; set test_every_steps",
    ):
        train_config(architecture, steps=1, keep="best")


def settings_of(model, prefix=""):
    """(dotted name, field) of every setting of a model and of those inside it."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, Config):
                yield from settings_of(inner, f"{prefix}{name}.")


SETTINGS = {
    **dict(settings_of(TrainConfig, "train.")),
    **dict(settings_of(ModelRef, "model.")),
    **dict(settings_of(TokenizerRef, "tokenizer.")),
}


def test_every_setting_is_found_here():
    assert {"train.student.model.sha256", "train.loss.temperature", "tokenizer.name"} <= set(
        SETTINGS
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_says_what_it_is_and_a_number_has_a_bound(name):
    field = SETTINGS[name]
    words = (field.description or "").split()
    assert len(words) >= 4, "a description is a full clause"
    kinds = {field.annotation, *get_args(field.annotation)}
    if kinds & {int, float}:
        assert any(isinstance(bound, (Ge, Gt)) for bound in field.metadata)


@pytest.mark.parametrize(
    ("annotation", "table"),
    [
        (SETTINGS["train.student.pooling"].annotation, POOLINGS),
        (get_args(SETTINGS["train.trackers"].annotation)[0], TRACKERS),
    ],
)
def test_a_choice_is_among_the_entries_of_its_table(annotation, table):
    assert get_args(annotation) == tuple(table)
