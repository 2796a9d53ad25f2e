"""Query-passage pairs from the docstrings of installed Python packages, read with `ast`; nothing is
imported.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import platform
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import xxhash

from clusterlib.errors import StrataError

STANDARD_LIBRARY = "stdlib"
HELD_OUT_PERCENT = 10  # of the modules
_MIN_PASSAGE_WORDS = 15
_MAX_QUERY_WORDS = 64
# Tests and vendored copies say nothing of the package, or say it twice.
_SKIPPED = {
    "tests",
    "test",
    "testing",
    "_vendor",
    "vendored",
    "thirdparty",
    "thirdparty_files",
    "site-packages",
}

_DOCTEST = re.compile(r"^[ \t]*(>>>|\.\.\.( |$)|In \[\d+\]:)")
_DIRECTIVE = re.compile(r"^([ \t]*)\.\. (\w[\w:-]*::|_|\[)")
_UNDERLINE = re.compile(r"^\s*([-=~^*#\"'])\1{2,}\s*$")
_TABLE_RULE = re.compile(r"^\s*[-=+|][-=+| ]{2,}\s*$")
_FIELD = re.compile(r"^\s*:(param|type|raises?|returns?|rtype|keyword|var|ivar)\b[^:]*:\s*")
# `name : type` of numpydoc, `name (type): text` of Google style; the description after it is kept.
_NUMPY_PARAMETER = re.compile(r"^\*{0,2}[\w.]+(, ?\*{0,2}[\w.]+)* ?: ?[\w{\[('\"`].*$")
_GOOGLE_PARAMETER = re.compile(r"^\s+[*\w.]+( ?\([^)]*\))?: ")
_SIGNATURE = re.compile(r"^[\w.]+\s*\(.*\)(\s*->\s*.*)?$", re.DOTALL)
_SECTIONS = {
    "parameters", "returns", "return", "raises", "yields", "notes", "see also", "examples",
    "example", "references", "attributes", "methods", "warnings", "warning", "other parameters",
    "args", "arguments", "keyword arguments", "kwargs", "note", "usage", "shape",
}  # fmt: skip
_DROPPED_SECTIONS = {"see also", "references", "examples", "example", "methods"}
_ROLE = re.compile(r":[\w:.+-]+:`~?([^`<]+?)(?:\s*<[^`>]*>)?`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{1,2}")
_LITERAL = re.compile(r"``?([^`]+)``?_{0,2}")
_EMPHASIS = re.compile(r"(?<!\w)(\*\*|\*)([^*\s](?:[^*]*[^*\s])?)\1(?!\w)")
_SURROGATE = re.compile("[\ud800-\udfff]")
_REFERENCE = re.compile(r"\s*\[[\w#*]+\]_")


@dataclass(frozen=True)
class Docstring:
    """One cleaned docstring, from line `row` of `module`."""

    module: str
    row: int
    query: str
    passage: str


def package_version(package: str) -> str:
    """What stands for the package's content in a fingerprint: the versions of what it was installed
    with.

    Raises:
        StrataError: no such package is installed, or none of its source.
    """
    _places(package)
    top = package.partition(".")[0]
    if top == STANDARD_LIBRARY or top in sys.stdlib_module_names:
        return f"python {platform.python_version()}"
    names = sorted(set(importlib.metadata.packages_distributions().get(top, ())))
    if not names:
        raise StrataError(
            f"{package}: no installed distribution holds it, so its version is unknown; install it"
        )
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def module_files(package: str) -> list[tuple[str, Path]]:
    """(dotted module, file) of the package's modules, sorted, without tests and vendored copies.

    A module that is one file is that file; a namespace package is what is installed of it, wherever
    that lies.
    """
    package_version(package)
    prefix = [] if package == STANDARD_LIBRARY else [package]
    found = []
    for place in _places(package):
        if place.is_file():
            found.append((package, place))
            continue
        for path in sorted(place.rglob("*.py")):
            parts = path.relative_to(place).with_suffix("").parts
            skipped = _SKIPPED.intersection(parts) or parts[-1].startswith(("test_", "conftest"))
            if path.is_file() and not skipped:
                found.append(
                    (".".join([*prefix, *(part for part in parts if part != "__init__")]), path)
                )
    return found


def _places(package: str) -> list[Path]:
    """The folders of a package, or the file of a module, found without importing any."""
    if package == STANDARD_LIBRARY:
        return [Path(sysconfig.get_path("stdlib"))]
    top, *inner = package.split(".")
    named = all(name.isidentifier() for name in (top, *inner))
    try:
        spec = (
            importlib.util.find_spec(top) if named else None
        )  # of a top-level name it imports nothing
    except ValueError:  # a module that no file made, as __main__ may be
        spec = None
    if spec is None:
        raise StrataError(
            f"{package}: no such Python package is installed; its docstrings cannot be read"
        )
    if spec.submodule_search_locations:  # six sets an empty list of them once it is imported
        places = [Path(folder) for folder in spec.submodule_search_locations]
    else:
        places = [Path(spec.origin)] if spec.has_location and spec.origin else []
    for name in inner:
        folders = [place / name for place in places if (place / name).is_dir()]
        packages = [folder for folder in folders if (folder / "__init__.py").is_file()]
        files = [place / f"{name}.py" for place in places if (place / f"{name}.py").is_file()]
        places = packages[:1] or files[:1] or folders  # as Python's import chooses
        if not places:
            raise StrataError(
                f"{package}: {top} is installed and has no Python source of this name"
            )
    places = [place for place in places if place.is_dir() or place.suffix == ".py"]
    if not places:
        raise StrataError(
            f"{package}: it is built in or compiled, so there is no Python source to read "
            "docstrings of"
        )
    return places


def held_out(module: str) -> bool:
    """Whether a module belongs to the test split: a fixed 10% of all modules, by the hash of their
    names.
    """
    return xxhash.xxh3_64_intdigest(module.encode()) % 100 < HELD_OUT_PERCENT


def read_docstrings(package: str, split: Literal["train", "test"]) -> Iterator[Docstring]:
    """Docstrings of the package's modules in the split, in order of module and line.

    The first paragraph is the query and the rest the passage; a docstring whose passage has fewer
    than 15 words is passed over, since most one-line docstrings have none.
    """
    for module, path in module_files(package):
        if held_out(module) != (split == "test"):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (
            SyntaxError,
            ValueError,
            RecursionError,
            MemoryError,
        ):  # for other Python versions, templates
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node, clean=False)
                pair = split_docstring(text) if text else None
                if pair:
                    yield Docstring(module, getattr(node, "lineno", 1), *pair)


def split_docstring(text: str) -> tuple[str, str] | None:
    """(query, passage) of a raw docstring, cleaned of signatures, code, doctests and markup; or
    None.
    """
    if _SURROGATE.search(text):  # as an escape in the source; it is in no encoding
        return None
    paragraphs = [paragraph for paragraph in clean_docstring(text).split("\n\n") if paragraph]
    while paragraphs and _SIGNATURE.match(paragraphs[0]):
        paragraphs.pop(0)
    if len(paragraphs) < 2:
        return None
    query, passage = paragraphs[0], " ".join(paragraphs[1:])
    if not 2 <= len(query.split()) <= _MAX_QUERY_WORDS or len(passage.split()) < _MIN_PASSAGE_WORDS:
        return None
    return query, passage


def clean_docstring(text: str) -> str:
    """The prose of a docstring: paragraphs on one line each, joined by blank lines."""
    lines = inspect.cleandoc(text).splitlines()
    kept: list[str] = []
    skip_deeper: int | None = (
        None  # inside a directive or literal block: lines indented deeper than this
    )
    in_doctest = dropping = False
    for number, line in enumerate(lines):
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if not stripped:
            in_doctest = False
            kept.append("")
            continue
        if skip_deeper is not None:
            if indent > skip_deeper:
                continue
            skip_deeper = None
        underlined = number + 1 < len(lines) and bool(_UNDERLINE.match(lines[number + 1]))
        heading = stripped.rstrip(":").lower()
        if heading in _SECTIONS and (underlined or stripped.endswith(":")):
            dropping = heading in _DROPPED_SECTIONS
            kept.append("")
            continue
        if underlined and indent == 0:
            dropping = False
        if dropping or _UNDERLINE.match(line) or _TABLE_RULE.match(line):
            continue
        if in_doctest or _DOCTEST.match(line):  # the output runs to the next blank line
            in_doctest = True
            continue
        if _DIRECTIVE.match(line):
            skip_deeper = indent
            continue
        if stripped.endswith("::"):
            skip_deeper = indent
            line = line.rstrip()[:-1]
        if (
            _NUMPY_PARAMETER.match(line)
            and number + 1 < len(lines)
            and lines[number + 1].startswith((" ", "\t"))
        ):
            continue
        line = _FIELD.sub("", _GOOGLE_PARAMETER.sub("", line))
        kept.append(line.strip())
    paragraphs = re.split(r"\n{2,}", "\n".join(kept).strip())
    return "\n\n".join(filter(None, (_clean_inline(paragraph) for paragraph in paragraphs)))


def _clean_inline(paragraph: str) -> str:
    for pattern, replacement in (
        (_ROLE, r"\1"),
        (_LINK, r"\1"),
        (_LITERAL, r"\1"),
        (_EMPHASIS, r"\2"),
        (_REFERENCE, ""),
    ):
        paragraph = pattern.sub(replacement, paragraph)
    return " ".join(paragraph.split())
