from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from clusterlib.artifacts.config import (
    Config,
    fingerprint,
    override,
    parse_overrides,
    read_yaml,
    runtime,
    validate,
)
from clusterlib.errors import StrataError


class Inner(Config):
    k: int = Field(3, ge=1)
    workers: int = runtime(1)


class Outer(Config):
    cluster: Inner = Inner()
    items: list[Inner] = []
    name: str = "x"


def test_unknown_setting_names_the_nearest_known_one():
    with pytest.raises(
        StrataError, match=r"cluster\.kk: unknown setting; did you mean cluster\.k\?"
    ):
        validate(Outer, {"cluster": {"kk": 5}}, "recipe")


def test_unknown_setting_inside_a_list_and_unlike_anything():
    with pytest.raises(
        StrataError, match=r"items\.0\.workerz: unknown setting; did you mean items\.\*\.workers\?"
    ):
        validate(Outer, {"items": [{"workerz": 5}]}, "recipe")
    with pytest.raises(StrataError, match=r"zzzzqqq: unknown setting$"):
        validate(Outer, {"zzzzqqq": 1}, "recipe")


def test_every_fault_is_told_with_its_value():
    with pytest.raises(StrataError) as caught:
        validate(Outer, {"cluster": {"k": 0}, "name": 7}, "recipe.yaml")
    message = str(caught.value)
    assert message.startswith("recipe.yaml: ")
    assert (
        "cluster.k" in message
        and "(got 0)" in message
        and "name" in message
        and "(got 7)" in message
    )


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Inner().k = 4  # type: ignore[misc]


def test_overrides_reach_nested_and_listed_settings_without_touching_the_original():
    data = {"cluster": {"k": 1}, "items": [{"k": 2}]}
    changed = override(
        data, parse_overrides(["cluster.k=7", "items.0.k=8", "name=null", "new.deep.x=[1, 2]"])
    )
    assert changed == {
        "cluster": {"k": 7},
        "items": [{"k": 8}],
        "name": None,
        "new": {"deep": {"x": [1, 2]}},
    }
    assert data == {"cluster": {"k": 1}, "items": [{"k": 2}]}


@pytest.mark.parametrize("word", ["cluster.k", "=3", "a=[1", "items.5.k=1", "cluster.k.deep=1"])
def test_bad_overrides_are_refused_by_name(word):
    with pytest.raises(StrataError):
        override({"cluster": {"k": 1}, "items": [{}]}, parse_overrides([word]))


def test_fingerprint_covers_content_and_not_where_it_runs():
    assert fingerprint(Inner(k=3)) == fingerprint(Inner(k=3, workers=9))
    assert fingerprint(Inner(k=3)) != fingerprint(Inner(k=4))
    assert fingerprint({"a": 1, "b": [1.5, None]}) == fingerprint({"b": [1.5, None], "a": 1})


@pytest.mark.parametrize(
    "value", [{1: 2}, {"a": object()}, float("nan"), {"a": {1, 2}}, Path("x"), b"x"]
)
def test_fingerprint_refuses_what_has_no_stable_serialisation(value):
    with pytest.raises(TypeError, match="no stable serialisation"):
        fingerprint(value)


def test_yaml_faults_name_the_file(tmp_path):
    with pytest.raises(StrataError, match="absent.yaml: cannot be read"):
        read_yaml(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(StrataError, match="must hold a mapping"):
        read_yaml(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(StrataError, match="not valid YAML"):
        read_yaml(tmp_path / "bad.yaml")
    (tmp_path / "code.yaml").write_text("a: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(StrataError, match="not valid YAML"):
        read_yaml(tmp_path / "code.yaml")


def test_a_key_given_twice_is_refused_with_its_line(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("cluster:\n  k: 1\n  field: both\n  k: 2\n")
    with pytest.raises(StrataError, match=r"twice\.yaml: .* line 4 gives 'k' a second time, after"):
        read_yaml(path)
    path.write_text("a: 1\nb: {c: [{x: 1, x: 1}]}\n")
    with pytest.raises(StrataError, match="line 2 gives 'x' a second time"):
        read_yaml(path)
    with pytest.raises(StrataError, match="line 1 gives 'a' a second time"):
        parse_overrides(["cluster={a: 1, a: 2}"])
    path.write_text("one: &one {k: 1, j: 1}\ntwo: {deep: &two {<<: *one, k: 2}}\nsix: {<<: *two}\n")
    assert read_yaml(path) == yaml.safe_load(path.read_text())  # what is merged in may be set again


YAML_TEXT = st.one_of(
    st.text(st.sampled_from("ab0:1- \n[]{},&*!|>'\"?%#~.")),
    st.sampled_from(["1", "2001-01-01", "2001-13-01", "0b1", "1e3", "190:20:30", "<<", ".inf"]).map(
        "a: {}".format
    ),
    st.sampled_from(["int", "float", "bool", "timestamp", "binary", "set", "omap"]).flatmap(
        lambda tag: st.sampled_from(["x", "", "''", "[1]", "{a: 1}"]).map(f"!!{tag} {{}}".format)
    ),
    st.binary(max_size=8).map(lambda data: data.decode(errors="surrogateescape")),
    st.just("a: &a [*a]"),
    st.sampled_from([3, 2000]).map(lambda depth: "[" * depth + "]" * depth),
    st.sampled_from([19, 20, 21, 6000]).map(lambda digits: "9" * digits),
)


@settings(max_examples=200, deadline=None)
@given(YAML_TEXT)
def test_any_text_is_what_safe_load_makes_of_it_or_one_message(text):
    try:
        found = parse_overrides([f"x={text}"])["x"]
    except StrataError:
        return
    assert repr(found) == repr(yaml.safe_load(text))  # nan is not equal to itself


def test_credentials_are_refused_and_never_quoted():
    for text in ("s3://key:secret@bucket/in", "see s3://b/x?secret_key=secret&region=r"):
        for data in ({"name": text}, {"items": [{"k": text}]}, {text: 1}):
            with pytest.raises(StrataError, match="AWS_SECRET_ACCESS_KEY") as caught:
                validate(Outer, data, "recipe.yaml")
            assert "recipe.yaml: " in str(caught.value) and "***" in str(caught.value)
            assert "secret" not in str(caught.value).replace("secret_key", "")
    with pytest.raises(StrataError, match="not valid YAML") as caught:
        parse_overrides(["data='s3://key:secret@bucket"])
    assert "secret" not in str(caught.value)
