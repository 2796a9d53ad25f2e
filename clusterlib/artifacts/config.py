"""Strict frozen settings: YAML in, dotted overrides on top, a fingerprint out."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clusterlib.artifacts.credentials import redacted, remedy
from clusterlib.errors import StrataError

_MERGE = "tag:yaml.org,2002:merge"


class Config(BaseModel):
    """Base of every settings model: frozen, strict about names, documented on the field."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

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


class _Loader(yaml.SafeLoader):
    """yaml.SafeLoader, but that a key given twice is an error: of the two it would take the
    last.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # What was merged in (`<<`) may well be given again; it is not among the keys yet.
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if key.value in lines:
                    raise yaml.YAMLError(
                        f"line {line} gives {key.value!r} a second time, after line "
                        f"{lines[key.value]}; remove one"
                    )
                lines[key.value] = line
        return node


def _load(text: str, origin: str) -> Any:
    """The data of a YAML text.

    Raises:
        StrataError: it is not YAML, or no plain data.
    """
    try:
        data = _Loader(text).get_single_data()
        _check_scalars(data)
    except RecursionError as error:
        raise StrataError(f"{origin}: nested too deep, or holds itself") from error
    except (yaml.YAMLError, ValueError) as error:
        raise StrataError(f"{origin}: not valid YAML: {error}") from error
    except (LookupError, AttributeError) as error:  # of a parser given what its tag does not fit
        raise StrataError(f"{origin}: a tag (such as !!int) does not fit its value") from error
    return data


def _check_scalars(value: Any) -> None:
    """Raise ValueError for what no file system, file format or fingerprint would take."""
    if isinstance(value, Mapping):
        for item in (*value, *value.values()):
            _check_scalars(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_scalars(item)
    elif isinstance(value, int) and value.bit_length() > 64:
        raise ValueError(f"an integer of {value.bit_length()} bits, where 64 are taken")
    elif isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        raise ValueError(f"{value!r} holds a NUL character or half of a surrogate pair")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping.

    Raises:
        StrataError: the file is missing, is not YAML or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise StrataError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise StrataError(f"{path}: not valid YAML: {error}") from error
    data = _load(text, str(path))
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
        overrides[name] = _load(text, repr(word))
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
                if not name.isdecimal() or int(name) >= len(node):
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
        StrataError: a URI holds credentials; or one line per fault: the dotted name, what is wrong
            and, for an unknown setting, the nearest known one.
    """
    for name, text in _texts(data):
        refuse_credentials(f"{origin}: {name}", text)
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        lines = [_explain(cls, fault) for fault in error.errors()]
        raise StrataError(f"{origin}: " + "\n".join(lines)) from error


def refuse_credentials(name: str, text: str) -> None:
    """Raise StrataError where a URI in a setting or an option holds credentials."""
    if redacted(text) != text:
        raise StrataError(f"{name}: {redacted(text)} holds credentials; {remedy(text)}")


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, text) of all texts inside nested settings, keys among them."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, (Mapping, list, tuple)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            inner = f"{name}.{key}" if name else f"{key}"
            yield inner, str(key)
            yield from _texts(item, inner)


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
