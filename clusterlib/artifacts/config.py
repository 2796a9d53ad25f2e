"""Strict frozen settings: YAML in, dotted overrides on top, a fingerprint out."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clusterlib.errors import StrataError


class Config(BaseModel):
    """Base of every settings model: frozen, strict about names, documented on the field."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def content(self) -> dict[str, Any]:
        """The settings that change what is made, as plain data; fields made by `runtime` are left
        out.

        Raises:
            TypeError: a value has no stable serialisation.
        """
        return {
            name: plain(getattr(self, name))
            for name, field in type(self).model_fields.items()
            if not (
                isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("runtime")
            )
        }

    def located(self, folder: str) -> Self:
        """A copy that means the same on another machine or in another working folder.

        Args:
            folder: absolute path or URI where relative paths of data start.
        """
        return self.model_copy(
            update={
                name: _each(value, lambda config: config.located(folder)) for name, value in self
            }
        )

    def pinned(self) -> Self:
        """A copy whose names on a hub stand for what they are at now; the hub is asked."""
        return self.model_copy(
            update={name: _each(value, lambda config: config.pinned()) for name, value in self}
        )

    def replace(self, **changes: Any) -> Self:
        """A validated copy with `changes` applied."""
        return type(self).model_validate({**self.model_dump(), **changes})


def _each(value: Any, change: Callable[[Config], Config]) -> Any:
    """`value` with every model inside it changed."""
    if isinstance(value, Config):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _each(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_each(item, change) for item in value)
    return value


def runtime(default: Any, **bounds: Any) -> Any:
    """A field that says where or how fast something is made, never what: no part of a
    fingerprint.
    """
    return Field(default, json_schema_extra={"runtime": True}, **bounds)


def plain(value: Any) -> Any:
    """`value` as JSON-ready data with one spelling.

    Raises:
        TypeError: the value (or one inside it) has no stable serialisation.
    """
    if isinstance(value, Config):
        return value.content()
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"no stable serialisation for a mapping with keys {list(value)!r}")
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise TypeError(f"no stable serialisation for {value!r} of type {type(value).__name__}")


def dump(value: Any) -> Any:
    """`value` as JSON-ready data, every setting of every model included."""
    if isinstance(value, Config):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {key: dump(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [dump(item) for item in value]
    return value


def fingerprint(value: Any) -> str:
    """16 hex digits of the SHA-256 of `value`'s canonical JSON.

    Raises:
        TypeError: the value has no stable serialisation.
    """
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


ConfigType = TypeVar("ConfigType", bound=Config)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping.

    Raises:
        StrataError: the file is missing, is not YAML or holds no mapping.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StrataError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StrataError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise StrataError(f"{path}: must hold a mapping of settings, not {type(data).__name__}")
    return data


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """`["train.steps=5"]` as `{"train.steps": 5}`; values are read as YAML.

    Raises:
        StrataError: a word is not `dotted.name=value`.
    """
    overrides = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise StrataError(f"{word!r}: an override is written name.of.setting=value")
        try:
            overrides[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise StrataError(f"{word!r}: the value is not valid YAML: {error}") from error
    return overrides


def override(data: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested `data` with each dotted name set; a number in a name indexes a list.

    Raises:
        StrataError: a name steps into something that is no mapping or list, or past a list's end.
    """
    changed: dict[str, Any] = _copy(data)
    for dotted, value in overrides.items():
        *parents, last = dotted.split(".")
        node: Any = changed
        for depth, name in enumerate([*parents, last]):
            here = ".".join(dotted.split(".")[:depth]) or "the recipe"
            if isinstance(node, list):
                if not name.isdigit() or int(name) >= len(node):
                    raise StrataError(
                        f"{dotted}: {here} is a list of {len(node)}; {name!r} is no index of it"
                    )
                key: Any = int(name)
            elif isinstance(node, dict):
                key = name
            else:
                raise StrataError(f"{dotted}: {here} is {node!r} and holds no setting {name!r}")
            if depth == len(parents):
                node[key] = _copy(value)
            elif isinstance(node, dict) and node.get(key) is None:
                node[key] = {}
                node = node[key]
            else:
                node = node[key]
    return changed


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy(item) for item in value]
    return value


def validate(cls: type[ConfigType], data: Mapping[str, Any], origin: str) -> ConfigType:
    """`data` as a `cls`.

    Args:
        origin: what the settings were read from, for the message.

    Raises:
        StrataError: one line per fault: the dotted name, what is wrong and, for an unknown setting,
            the nearest known one.
    """
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        lines = [_explain(cls, fault) for fault in error.errors()]
        raise StrataError(f"{origin}: " + "\n".join(lines)) from error


def _explain(cls: type[Config], fault: Any) -> str:
    name = ".".join(str(part) for part in fault["loc"]) or "settings"
    if fault["type"] == "extra_forbidden":
        # Index parts stand for "any item" in the known names.
        wanted = ".".join("*" if isinstance(part, int) else str(part) for part in fault["loc"])
        known = sorted(_names(cls))
        near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.6)
        return f"{name}: unknown setting" + (f"; did you mean {near[0]}?" if near else "")
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] in ("missing", "value_error"):
        return f"{name}: {message}"
    return f"{name}: {message} (got {fault['input']!r})"


def _names(cls: type[Config], prefix: str = "") -> Iterator[str]:
    for name, field in cls.model_fields.items():
        yield prefix + name
        for inner, many in models_in(field.annotation):
            yield from _names(inner, f"{prefix}{name}.{'*.' if many else ''}")


def models_in(annotation: Any) -> Iterator[tuple[type[Config], bool]]:
    """The settings models inside a field's annotation, and whether the field holds many of them."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation, False
        return
    many = get_origin(annotation) in (list, tuple, dict, Sequence, Mapping)
    for argument in get_args(annotation):
        for config, nested in models_in(argument):
            yield config, many or nested
