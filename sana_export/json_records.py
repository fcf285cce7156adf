"""Turns JSON values into frozen dataclasses, checking the type of every value: the inverse of `dataclasses.asdict`. And back."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")

#: What JSON has for these types. A number may be written without a fraction.
_SCALARS: dict[Any, tuple[type, ...]] = {str: (str,), bool: (bool,), int: (int,), float: (int, float)}
#: The largest magnitude of a number. Other programs have no larger integers.
_MOST = 2**63 - 1


def json_value(value: Any) -> Any:
    """`value`, with infinity and NaN as text, because JSON has neither."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def record_from_json(kind: type[T], value: Any, where: str = "it") -> T:
    """The `kind` that `dataclasses.asdict` turned into `value`. Fields that are missing have their defaults.

    Raises ValueError, naming the place in the document after `where`, for a value of another type, a number that is not finite or
    too large, a missing key or an unknown one.
    """
    if not isinstance(value, Mapping):
        raise _wrong(where, value, "an object")
    fields = _fields(typing.cast(Any, kind))
    for key in value:
        if key not in fields:
            raise ValueError(f"{where} has the unknown key {key!r}")
    for key, (_, required) in fields.items():
        if required and key not in value:
            raise ValueError(f"{where} has no {key}")
    return kind(**{key: _convert(fields[key][0], item, f"{where}.{key}") for key, item in value.items()})


@cache
def _fields(kind: Any) -> dict[str, tuple[Any, bool]]:
    """The type of each field of a dataclass, and whether it must be given."""
    hints = typing.get_type_hints(kind)
    return {
        item.name: (hints[item.name], item.default is MISSING and item.default_factory is MISSING)
        for item in dataclasses.fields(kind)
    }


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as a value of the type `hint`."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if hint in _SCALARS:
        if not isinstance(value, _SCALARS[hint]) or (isinstance(value, bool) and hint is not bool):
            raise _wrong(where, value, hint.__name__)
        if isinstance(value, int | float) and not abs(value) <= _MOST:
            raise ValueError(f"{where} is out of range")
        return value
    if dataclasses.is_dataclass(hint):
        return record_from_json(typing.cast(Any, hint), value, where)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(parts, value, where)
    if origin is tuple:
        if not isinstance(value, list) or (parts[-1] is not Ellipsis and len(value) != len(parts)):
            raise _wrong(where, value, "a list" if parts[-1] is Ellipsis else f"a list of {len(parts)}")
        kinds = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
        return tuple(_convert(kind, item, f"{where}[{index}]") for index, (kind, item) in enumerate(zip(kinds, value, strict=True)))
    if not isinstance(value, Mapping):  # all other fields are mappings from names
        raise _wrong(where, value, "an object")
    return {key: _convert(parts[1], item, f"{where}.{key}") for key, item in value.items()}


def _convert_union(parts: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in parts:
        return None
    others = [part for part in parts if part is not types.NoneType]
    for part in others[:-1]:
        try:
            return _convert(part, value, where)
        except ValueError:
            continue
    return _convert(others[-1], value, where)


def _wrong(where: str, value: Any, wanted: str) -> ValueError:
    return ValueError(f"{where} is a {type(value).__name__}, not {wanted}")
