"""Reads a TOML file into a frozen dataclass. Every error names the file, the key and what is allowed there."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TypeVar

from sana_export.errors import UsageError, first_line
from sana_export.user_paths import user_path

T = TypeVar("T")

#: The largest file. Nobody writes a recipe or a workload of this size.
MAX_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class ValueType:
    """What a field of one type accepts."""

    #: Types of the TOML value.
    accepted: tuple[type, ...]
    #: Turns the TOML value into the field's value.
    convert: Callable[[Any], Any]
    #: What an error calls it.
    name: str
    #: Type of the items of a list.
    item: type = object


VALUE_TYPES: dict[Any, ValueType] = {
    str: ValueType((str,), str, "a string"),
    Path: ValueType((str,), user_path, "a path"),
    bool: ValueType((bool,), bool, "true or false"),
    int: ValueType((int,), int, "a whole number"),
    float: ValueType((int, float), float, "a number"),
    tuple[str, ...]: ValueType((list,), tuple, "a list of strings", str),
    tuple[Mapping[str, int], ...]: ValueType((list,), tuple, "tables of whole numbers", dict),
}


def read_toml(path: Path, what: str, example: str = "a TOML file") -> dict[str, Any]:
    """The content of `path`. Raises UsageError, calling the file a `what`, if it cannot be read."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        return tomllib.loads(content.decode("utf-8").replace("\r\n", "\n"))
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, not TOML, too large or nested too deep
        raise UsageError(f"{path} cannot be read as a {what}", found=first_line(error), wanted=example) from error


def parse_table(kind: type[T], table: object, where: str) -> T:
    """A `kind` from a TOML table whose keys are its fields. Fields with the metadata {"hidden": True} are not keys.

    Raises UsageError, naming `where`, for an unknown key, a missing key or a value of the wrong type.
    """
    if not isinstance(table, Mapping):
        raise UsageError(f"{where} is not a table", found=repr(table), wanted="a TOML table")
    fields = {
        item.name: item
        for item in dataclasses.fields(kind)  # type: ignore[arg-type]
        if not item.metadata.get("hidden")
    }
    if unknown := [key for key in table if key not in fields]:
        near = difflib.get_close_matches(unknown[0], fields, n=3, cutoff=0.5)
        raise UsageError(f"unknown key in {where}", found=unknown[0], wanted=", ".join(near or fields))
    required = [name for name, item in fields.items() if item.default is MISSING and item.default_factory is MISSING]
    if missing := [name for name in required if name not in table]:
        raise UsageError(f"{where} is incomplete", found=f"no {', '.join(missing)}", wanted=", ".join(required))
    hints = typing.get_type_hints(kind)
    return kind(**{key: _value(value, hints[key], f"{key} in {where}") for key, value in table.items()})


def _value(value: Any, hint: Any, where: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    allowed = {option: VALUE_TYPES[option] for option in options if option in VALUE_TYPES}
    for option, expected in allowed.items():
        fits = isinstance(value, expected.accepted) and isinstance(value, bool) == (option is bool)
        if fits and (not isinstance(value, list) or all(isinstance(item, expected.item) for item in value)):
            return expected.convert(value)
    names = " or ".join(expected.name for expected in allowed.values())
    raise UsageError(f"{where} has the wrong type", found=repr(value), wanted=names)
