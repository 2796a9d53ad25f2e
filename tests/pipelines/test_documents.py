"""What the documents tell a user to write is understood: commands, settings, parts of recipes,
targets, paths.
"""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import yaml

from clusterlib.artifacts.config import Config, override, parse_overrides, validate
from clusterlib.errors import StrataError
from pipelines import PACKAGES
from pipelines.cli import main
from pipelines.recipe import RunConfig, load_recipe

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ROOT / "pipelines" / "recipes" / "TRIED.md",
    *sorted((ROOT / "cluster_configs").rglob("*.md")),
]
TEXTS = [path.read_text() for path in DOCUMENTS]
SECTIONS = "|".join(
    name
    for name, field in RunConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Config)
)
SETTING = rf"(?<![\w/.])(?:{SECTIONS})\.(?!py\b)\w+(?:\.\w+)*"


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def inline(text):
    """Code among words."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def commands(program):
    """The words after `program` of every command, each once."""
    shell = "\n".join(block for text in TEXTS for block in blocks(text, "bash")).replace(
        "\\\n", " "
    )
    lines = [*shell.splitlines(), *(code for text in [*TEXTS, shell] for code in inline(text))]
    found = [line.split("#")[0].strip() for line in lines if re.match(rf"(\S*/)?{program} ", line)]
    assert found
    return [shlex.split(line)[1:] for line in dict.fromkeys(found)]


def is_setting(name):
    try:
        load_recipe("demo", {name: None})
    except StrataError as error:
        return not re.search("unknown setting|holds no setting|no index of it", str(error))
    return True


@pytest.mark.parametrize("words", commands("strata"), ids=" ".join)
def test_a_command_line_of_strata_is_understood(words):
    command, *arguments = words
    if not arguments and command != "inspect":
        assert command in main.commands  # it is named, not written out
        return
    parameters = main.commands[command].make_context(command, arguments).params
    recipe = parameters.get("recipe", "demo")
    is_packaged = recipe.islower() and not recipe.endswith(".yaml")
    load_recipe(recipe if is_packaged else "demo", parse_overrides(parameters.get("overrides", [])))


def test_the_command_line_of_the_soak_is_understood():
    text = ast.get_docstring(ast.parse((ROOT / "tests" / "pipelines" / "soak.py").read_text()))
    words = shlex.split(text[text.index("python tests/") :].replace("\\\n", ""))
    assert (ROOT / words[1]).is_file()
    load_recipe("demo", parse_overrides(words[words.index("demo") + 1 :]))


@pytest.mark.parametrize("words", commands("ray"), ids=" ".join)
def test_a_command_line_of_ray_is_understood(words):
    from ray.scripts.scripts import cli

    command, *arguments = words
    if arguments:
        cli.commands[command].make_context(command, arguments)
    assert command in cli.commands


@pytest.mark.parametrize("words", commands("make"), ids=" ".join)
def test_a_target_of_make_is_there(words):
    subprocess.run(
        ["make", "--dry-run", f"PYTHON={sys.executable}", *words],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )


@pytest.mark.parametrize("block", [block for text in TEXTS for block in blocks(text, "yaml")])
def test_a_yaml_block_is_part_of_a_recipe(block):
    settings = {
        f"{section}.{name}": value
        for section, part in yaml.safe_load(block).items()
        for name, value in part.items()
    }
    validate(RunConfig, override(load_recipe("demo", {}).model_dump(mode="json"), settings), block)


def test_settings_that_documents_and_messages_name_are_there():
    named = {name for text in TEXTS for code in inline(text) for name in re.findall(SETTING, code)}
    assert len(named) > 5
    sources = "".join(
        path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py")
    )
    named |= set(re.findall(rf"({SETTING})=", sources))
    assert [name for name in sorted(named) if not is_setting(name)] == []


def test_a_change_goes_to_a_file_and_a_test_that_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (.+?) \| `(.+?)` \| `(.+?)` \|$", text, re.M)
    assert len(rows) == 20 and len({change for change, _, _ in rows}) == 20
    paths = [path for _, *paths in rows for path in paths]
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def test_tables_that_take_an_entry_are_in_the_file_named():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.findall(r"^\| [^|]+\(([A-Z]+)\) \| `(.+?)` \|", text, re.M)
    assert len(found) == 3
    for name, path in found:
        assert re.search(rf"^{name}\b.* = ", (ROOT / path).read_text(), re.M), (name, path)


def test_pictures_are_drawings_that_parse():
    pictures = list((ROOT / "pipelines" / "pictures").iterdir())
    assert pictures
    for path in pictures:
        root = ET.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("viewBox")
        assert "prefers-color-scheme: dark" in path.read_text()


def test_the_hook_runs_make_check():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (hook,) = repo["hooks"]
    assert (repo["repo"], hook["entry"], hook["language"]) == ("local", "make check", "system")


def test_paths_and_extras_that_documents_name_are_there():
    for path, text in zip(DOCUMENTS, TEXTS, strict=True):
        links = [path.parent / link for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text)]
        files = [
            ROOT / code for code in inline(text) if re.fullmatch(r"(\w+/)+([\w.]+\.\w+)?", code)
        ]
        assert [str(found) for found in [*links, *files] if not found.exists()] == []
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = {
        name
        for text in TEXTS
        for names in re.findall(r"'\.\[([\w,]+)\]'", text)
        for name in names.split(",")
    }
    assert named and named <= set(extras)
