"""settings: every setting of a recipe, from the models that own them."""

from __future__ import annotations

import itertools
import json
import textwrap
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from clusterlib.artifacts.config import Config, dump, models_in
from clusterlib.errors import StrataError

_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: dotted; `*` stands for the place in a list or the key of a mapping.
        type: such as `int >= 1` or `cls | mean`.
        default: as YAML would hold it; None of a setting that must be given.
        description: a clause.
    """

    name: str
    type: str
    default: str | None
    description: str


def settings(cls: type[Config], section: str = "") -> list[Setting]:
    """The settings of a model, or those below one of its dotted names, in the order of the models.

    Raises:
        StrataError: there is no such section.
    """
    found = [
        setting
        for setting in _walk(cls)
        if not section or f"{setting.name}.".startswith(f"{section}.")
    ]
    if not found:
        sections = ", ".join(cls.model_fields)
        raise StrataError(f"{section}: no such section or setting; the sections are {sections}")
    return found


def as_text(found: Sequence[Setting]) -> str:
    """Each setting's name, type and default on one line, its description below."""
    return "\n".join(
        f"{setting.name}: {setting.type}{_default(setting, ' = {}')}\n"
        + textwrap.indent(textwrap.fill(setting.description, 96), "    ")
        for setting in found
    )


def as_markdown(found: Sequence[Setting]) -> str:
    """A page with a table for each section."""
    lines = [
        "# Settings of a recipe",
        "",
        "Made by `strata settings --markdown` from the models; a test holds it against them. `*`",
        "stands for a place in a list or a key of a mapping. What has no default must be given.",
    ]
    for section, inside in itertools.groupby(found, _section):
        lines += ["", f"## {section}", "", "| setting | type | default | what it is |"]
        lines.append("|---|---|---|---|")
        lines += [_row(setting) for setting in inside]
    return "\n".join(lines) + "\n"


def _section(setting: Setting) -> str:
    section, dot, _ = setting.name.partition(".")
    return section if dot else "the recipe"


def _row(setting: Setting) -> str:
    cells = (
        f"`{setting.name}`",
        setting.type,
        _default(setting, "`{}`"),
        setting.description,
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _walk(cls: type[Config], prefix: str = "") -> Iterator[Setting]:
    for name, field in cls.model_fields.items():
        inner = list(models_in(field.annotation))
        if not inner or field.description:
            yield Setting(prefix + name, _type(field), _default_of(field), field.description or "")
        for model, many in inner:
            yield from _walk(model, f"{prefix}{name}.{'*.' if many else ''}")


def _type(field: FieldInfo) -> str:
    limits = [
        f"{sign} {getattr(bound, name)}"
        for bound in field.metadata
        for name, sign in _BOUNDS.items()
        if hasattr(bound, name)
    ]
    return " ".join([_spell(field.annotation), " and ".join(limits)]).strip()


def _spell(annotation: Any) -> str:
    """An annotation as a reader of YAML knows it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " | ".join(
            "null" if argument is type(None) else _spell(argument) for argument in arguments
        )
    if origin in (list, tuple):
        return f"list of {_spell(arguments[0])}"
    if origin is dict:
        return f"mapping of {_spell(arguments[1])}"
    if hasattr(annotation, "__metadata__"):  # Annotated
        return _spell(arguments[0])
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return "section"
    return {str: "text", Any: "anything", bool: "true | false"}.get(annotation, annotation.__name__)


def _default_of(field: FieldInfo) -> str | None:
    if field.default is PydanticUndefined:
        return None
    return "" if isinstance(field.default, Config) else json.dumps(dump(field.default))


def _default(setting: Setting, template: str) -> str:
    return template.format(setting.default) if setting.default else ""
