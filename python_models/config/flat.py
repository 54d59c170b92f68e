# SPDX-License-Identifier: Apache-2.0
"""Settings as flat names and plain values, converted to the types of a config's leaves."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from python_models.config.schema import Arguments
from python_models.errors import UserError, unknown_name

ConfigT = TypeVar("ConfigT")


def leaves(config: object) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, annotation and value of every leaf of a (nested) dataclass."""
    hints = get_type_hints(type(config))
    for item in fields(config):  # type: ignore[arg-type]
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from leaves(value)
        else:
            yield item.name, hints[item.name], value


def flatten(config: object) -> dict[str, Any]:
    """Return the leaves as a flat dict of plain YAML values."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        return list(value) if isinstance(value, tuple) else value

    return {name: plain(value) for name, _, value in leaves(config)}


def override(config: ConfigT, values: Mapping[str, Any], source: str) -> ConfigT:
    """Return a copy of a config with some leaves replaced.

    Args:
        config: A (nested) dataclass.
        values: New values by leaf name; ``-`` and ``_`` are the same. Converted to the leaf's type.
        source: Where they come from, for the error message.

    Raises:
        UserError: If a name is unknown or a value has the wrong type.
    """
    values = {name.replace("-", "_"): value for name, value in values.items()}
    hints = {name: hint for name, hint, _ in leaves(config)}
    for name in values:
        if name not in hints:
            raise UserError(f"{source}: {unknown_name('setting', name, hints)}")
    converted = {name: _convert(name, value, hints[name], source) for name, value in values.items()}
    return _replace_leaves(config, converted)


def _replace_leaves(config: ConfigT, values: Mapping[str, Any]) -> ConfigT:
    changes: dict[str, Any] = {}
    for item in fields(config):  # type: ignore[arg-type]
        value = getattr(config, item.name)
        if is_dataclass(value):
            changes[item.name] = _replace_leaves(value, values)
        elif item.name in values:
            changes[item.name] = values[item.name]
    return replace(config, **changes)  # type: ignore[type-var]


def _convert(name: str, value: Any, hint: Any, source: str) -> Any:
    """Convert a YAML value to a leaf's type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        hint = next(a for a in arguments if a is not type(None))
        return _convert(name, value, hint, source)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{source}: {name}={value!r} must be a mapping of names to values")
        return _network_arguments(name, value, source)
    if origin is Literal:
        if value in arguments:
            return value
        expected = "one of " + ", ".join(map(repr, arguments))
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_convert(name, item, arguments[0], source) for item in value)
        expected = "a list"
    elif hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    elif hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as text
        except ValueError:
            expected = "a number"
    elif hint is int and isinstance(value, bool):
        expected = "a whole number"
    elif isinstance(value, hint):
        return value
    else:
        expected = {int: "a whole number", bool: "true or false"}.get(hint, hint.__name__)
    raise UserError(f"{source}: {name}={value!r} must be {expected}")


_GIVEN_BY_THE_TASK = {"num_classes": "--num-classes", "in_channels": "--channels"}


def _network_arguments(name: str, values: Mapping[Any, Any], source: str) -> Arguments:
    arguments = {}
    for key, value in values.items():
        if not isinstance(key, str) or not key.isidentifier():
            raise UserError(f"{source}: {name}: {key!r} cannot be the name of an argument")
        if key in _GIVEN_BY_THE_TASK:
            raise UserError(
                f"{source}: {name}: {key} follows from the dataset or {_GIVEN_BY_THE_TASK[key]}: "
                "leave it out"
            )
        # YAML 1.1 reads 1e-3 as text.
        is_number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value, re.I)
        arguments[key] = float(value) if is_number else value
        try:
            json.dumps(value)  # as it is stored with the weights
        except TypeError as error:
            raise UserError(
                f"{source}: {name}: {key}={value!r} must be a number, text, true, false, null or a "
                "list or mapping of these"
            ) from error
    return arguments


def read_arguments(words: Iterable[str]) -> Arguments:
    """Read a network's arguments as they stand on the command line.

    Args:
        words: ``NAME=VALUE``, the values as in YAML.

    Raises:
        UserError: If a word has another form.

    Example:
        >>> read_arguments(["width=2", "shortcut=no", "rate=1e-3"])
        {'width': 2, 'shortcut': False, 'rate': 0.001}
    """
    import yaml

    arguments = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"{word!r} must have the form NAME=VALUE")
        try:
            arguments[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{word!r} has a value that YAML cannot read") from error
    return _network_arguments("arguments", arguments, "command line")
