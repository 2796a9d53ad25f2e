"""Whatever a setting is set to, a command ends well or in one message."""

import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clusterlib.artifacts.config import read_yaml
from pipelines.cli import main
from pipelines.recipe import load_recipe

ODD = [
    *("", "null", "true", "0", "-1", "1", "3", "1e-320", "1e308", "-0.0", ".inf", ".nan"),
    *("2147483648", "18446744073709551615", "'9'", "0.5", "1e-20"),
    *("' '", "x", "a/b", "a/b/c", "..", "../..", "/", "/dev/null", "/etc/passwd", "~nobody", "*"),
    *("a[", "[[]", '"\\0"', '"\\ud83d"', "é", '"a\\nb"', "'{0}'", "'%s'", "9" * 300),
    *("s3://", "s3:///x", "nope://x", "file://", "file://x/y", "memory://x", "'s3://b/%zz'"),
    *("s3://k:s@b", "http://127.0.0.1:9/x", "hdfs://", "package:nope.sub/x", "'package:'"),
    *("package:pipelines/recipes", "package:os/x", "package:../x", "mteb/baseline-bm25s"),
    *("[]", "[1]", "[[]]", "{}", "{a: 1}", "{a: {}}", "{a: [1]}", "{1: 2}", "{'': {}}"),
    *("2020-01-01", "!!binary aGk=", "!!set {a}", "&a [*a]", "!!int x"),
    *("random", "neighbors", "topic", "bf16", "best", "wsd", "cosine", "cls", "huggingface"),
]


def names(value, prefix=""):
    """Dotted names of all settings inside a value, sections among them."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield f"{prefix}{key}"
        if isinstance(item, (dict, list)):
            yield from names(item, f"{prefix}{key}.")


def ends_well_or_in_one_message(*words):
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), words
    assert result.exit_code in (0, 1) and "Traceback" not in result.output, result.output
    told = [line for line in result.stderr.splitlines() if line.startswith("strata: ")]
    assert len(told) == result.exit_code, result.output


@settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_setting_of_a_dry_run(recipe, tmp_path, data):
    known = sorted(names(load_recipe(str(recipe), {}).model_dump(mode="json")))
    words = st.one_of(st.sampled_from(ODD), st.text(max_size=6))
    changes = data.draw(
        st.dictionaries(st.sampled_from(known), words, min_size=1, max_size=2), label="changes"
    )
    ends_well_or_in_one_message(
        "run",
        recipe,
        *(f"{name}={value}" for name, value in changes.items()),
        "--dry-run",
        "--root",
        tmp_path,
    )


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_setting_of_a_plan(recipe, shards, tmp_path, monkeypatch, data):
    monkeypatch.setattr("clusterlib.artifacts.artifact.Root.open", lambda *_: shards[0])
    config = load_recipe(str(recipe), {}).model_dump(mode="json")
    known = sorted(f"batching.{name}" for name in names(config["batching"]))
    known += ["train.steps", "train.epochs", "batching.source_weights.a"]
    changes = data.draw(
        st.dictionaries(st.sampled_from(known), st.sampled_from(ODD), min_size=1, max_size=3),
        label="changes",
    )
    words = (f"{name}={value}" for name, value in changes.items())
    ends_well_or_in_one_message("plan", recipe, "arms={}", *words, "--root", tmp_path)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
def test_any_bytes_in_a_recipe(tmp_path, content):
    (tmp_path / "odd.yaml").write_bytes(content)
    ends_well_or_in_one_message("run", tmp_path / "odd.yaml", "--dry-run", "--root", tmp_path)


def test_a_recipe_that_lacks_any_setting(recipe, tmp_path):
    whole = read_yaml(recipe)
    for section in whole:
        path = tmp_path / "part.yaml"
        path.write_text(yaml.safe_dump({**whole, section: None}))
        ends_well_or_in_one_message("run", path, "--dry-run", "--root", tmp_path)
        path.write_text(yaml.safe_dump({key: whole[key] for key in whole if key != section}))
        ends_well_or_in_one_message("run", path, "--dry-run", "--root", tmp_path)
