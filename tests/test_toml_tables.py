"""TOML tables become dataclasses, or errors that name the key and what is allowed there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sana_export.errors import UsageError
from sana_export.toml_tables import parse_table, read_toml


@dataclass(frozen=True)
class Example:
    name: str
    count: int = 1
    scale: float | None = None
    wide: bool = False
    folder: Path = Path()
    words: str | tuple[str, ...] = ()
    points: tuple[Mapping[str, int], ...] = ()
    source: str = field(default="code", metadata={"hidden": True})


def test_values_have_the_types_of_the_fields(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(
        'name = "熊猫"\ncount = 2\nscale = 3\nwide = true\nfolder = "a/b"\nwords = ["x", "y"]\n[[points]]\nx = 1\n', "utf-8"
    )
    found = parse_table(Example, read_toml(path, "example"), "x.toml")
    assert found == Example("熊猫", 2, 3.0, True, Path("a/b"), ("x", "y"), ({"x": 1},))
    assert isinstance(found.scale, float)
    assert parse_table(Example, {"name": "a", "words": "one"}, "x.toml").words == "one"


@pytest.mark.parametrize(
    ("table", "message", "found", "wanted"),
    [
        ([], "x.toml is not a table", "[]", "a TOML table"),
        ({}, "x.toml is incomplete", "no name", "name"),
        ({"name": "a", "cuont": 1}, "unknown key in x.toml", "cuont", "count"),
        ({"name": "a", "source": "b"}, "unknown key in x.toml", "source", "scale"),
        ({"name": 1}, "name in x.toml has the wrong type", "1", "a string"),
        ({"name": "a", "count": 1.5}, "count in x.toml has the wrong type", "1.5", "a whole number"),
        ({"name": "a", "count": True}, "count in x.toml has the wrong type", "True", "a whole number"),
        ({"name": "a", "wide": 1}, "wide in x.toml has the wrong type", "1", "true or false"),
        ({"name": "a", "scale": "1"}, "scale in x.toml has the wrong type", "'1'", "a number"),
        ({"name": "a", "words": ["a", 1]}, "words in x.toml has the wrong type", "['a', 1]", "a string or a list of strings"),
        ({"name": "a", "points": [1]}, "points in x.toml has the wrong type", "[1]", "tables of whole numbers"),
    ],
)
def test_wrong_tables(table: object, message: str, found: str, wanted: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_table(Example, table, "x.toml")
    assert caught.value.message == message
    assert caught.value.found == found
    assert wanted in str(caught.value.wanted)


@pytest.mark.parametrize("content", [None, b"a = ", b"\xff"])
def test_a_file_that_cannot_be_read(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"x\.toml cannot be read as a recipe"):
        read_toml(path, "recipe")
