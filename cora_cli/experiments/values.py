"""Checks and converts values from YAML against the fields of a configuration class, and reads YAML files that include others.

It checks only types; the configuration classes check what the settings mean.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from cora_cli import reading
from cora_cli.errors import UsageError

Values = dict[str, Any]


def fields_of(config_class: type, leave_out: Collection[str] = ()) -> dict[str, Any]:
    """Type hint by name for every field of a dataclass, except those in `leave_out`."""
    hints = typing.get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class) if field.name not in leave_out}


def unknown_key(key: object, known: Collection[str], where: str) -> str:
    """Error message for a key that is not in `known`, with the closest known key."""
    near = difflib.get_close_matches(str(key), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(sorted(known))}"
    return f"{where}: unknown key {key!r} ({hint})"


def typed(values: object, hints: Mapping[str, Any], where: str, problems: list[str]) -> Values:
    """Convert `values` to the types in `hints`; each value that does not fit adds a sentence to `problems`."""
    if values is None:
        return {}
    if not isinstance(values, dict):
        problems.append(f"{where} must hold `name: value` lines, not {values!r}")
        return {}
    fitting = {}
    for key, value in values.items():
        if key not in hints:
            problems.append(unknown_key(key, hints, where))
            continue
        try:
            fitting[key] = converted(hints[key], value)
        except ValueError as error:
            problems.append(f"{where}: {key} must be {error}, not {value!r}")
    return fitting


def converted(hint: Any, value: Any) -> Any:
    """Convert `value` to the type `hint`; text that spells a number is one. Raises `ValueError` that describes the expected type."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if value is None and type(None) in options:
        return None
    if str in options and isinstance(value, str) and not value.strip():
        raise ValueError("text that is not empty, or left out")
    for option in options:
        if option is not type(None) and (found := _fit(option, value)) is not None:
            return found
    raise ValueError(" or ".join(_described(option) for option in options))


def _fit(hint: Any, value: Any) -> Any:
    """`value` converted to `hint`, or None if it does not fit."""
    if typing.get_origin(hint) is typing.Literal:
        return value if value in typing.get_args(hint) else None
    if typing.get_origin(hint) is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        fits = isinstance(parts, list) and parts and all(isinstance(part, str) and part.strip() for part in parts)
        return tuple(part.strip() for part in parts) if fits else None
    if typing.get_origin(hint) is dict:
        return value if isinstance(value, dict) else None
    if hint is float:
        return reading.number(value)
    if hint is int:
        return reading.integer_of(value)
    return value if type(value) is hint else None


def _described(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    if typing.get_origin(hint) is tuple:
        return "a list of names"
    if typing.get_origin(hint) is dict:
        return "`name: value` lines"
    names = {list: "a list", int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "empty"}
    return names.get(hint, str(hint))


def read_yaml(path: Path) -> Values:
    """Read a YAML mapping. If it has the key `include`, it is merged over that file, whose path is relative to this one.

    Raises `UsageError` with the path of a file that cannot be read, is not a mapping, or includes itself.
    """
    return _read(path, ())


def _read(path: Path, including: tuple[Path, ...]) -> Values:
    if path.resolve() in including:
        raise UsageError(f"grid file {path} includes itself; remove its include line")
    values = reading.read_yaml(path, "grid file")
    included = values.pop("include", None)
    if included is None:
        return values
    if not isinstance(included, str) or not included.strip():
        raise UsageError(f"grid file {path}: include must name one file, not {included!r}")
    return merged(_read(path.parent / Path(included).expanduser(), (*including, path.resolve())), values)


def merged(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> Values:
    """Merge two mappings.

    For a key in both, mappings are merged, lists of `conditions` are joined, and otherwise `upper` wins.
    """
    result = dict(lower)
    for key, value in upper.items():
        below = result.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            result[key] = merged(below, value)
        elif key == "conditions" and isinstance(below, list) and isinstance(value, list):
            result[key] = [*below, *value]
        else:
            result[key] = value
    return result
