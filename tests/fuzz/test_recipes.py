"""Recipes of any tables: a recipe, or an error that names the file."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sana_export.cli.recipe import SECTIONS, Recipe, load_recipe
from sana_export.errors import SanaExportError, UsageError

FIELDS = {kind: [item.name for item in dataclasses.fields(kind)] for kind in (Recipe, *SECTIONS.values())}
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["", "tiny", "~/x", "x.png", "fp16", "tensorrt-rtx", "cpu", "smoke", "transformer_blocks.0", "denoiser", "-x", "default", "\0"]
)
VALUES = st.recursive(
    TEXTS
    | st.integers(-(2**63), 2**63 - 1)
    | st.integers(-1, 2000)
    | st.floats()
    | st.booleans()
    | st.just(datetime.date(2026, 1, 1)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=5,
)


def tables(kind: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Tables of values under the keys of a section, and under any others."""
    return st.dictionaries(st.sampled_from(FIELDS[kind]) | TEXTS, VALUES, max_size=5)


#: Sections as they should be, so that some recipes are valid.
GOOD: dict[str, Any] = {
    "build": st.just([{"backend": "tensorrt-rtx", "profile": "default"}]),
    "sample": st.fixed_dictionaries(
        {"prompt": TEXTS, "output": st.just("x.png")},
        optional={"steps": st.integers(1, 9), "guidance_scale": st.floats(0, 9), "height": st.integers(1, 999)},
    ),
    "verify": st.just({"steps": 2}),
    "bench": st.just({"workload": "smoke"}),
}
RECIPES = st.builds(
    lambda head, other, sections: {**head, **other, **sections},
    st.fixed_dictionaries({}, optional={"model": st.just("tiny"), "output": st.just("x")}),
    st.one_of(st.just({}), tables(Recipe)),
    st.fixed_dictionaries({}, optional={name: GOOD[name] | tables(kind) | VALUES for name, kind in SECTIONS.items()}),
)


def toml(value: Any) -> str:
    """A value in TOML's notation."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return {math.inf: "inf", -math.inf: "-inf"}.get(value, "nan" if value != value else repr(value))
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(str(key))} = {toml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value).replace("\x7f", "\\u007f") if isinstance(value, str) else str(value)


@example(content={"model": " ", "output": "x"})
@given(RECIPES)
def test_a_table_is_a_recipe_or_an_error(tmp_path: Path, content: dict[str, Any]) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("".join(f"{toml(key)} = {toml(value)}\n" for key, value in content.items()), "utf-8")
    try:
        recipe = load_recipe(path)
    except UsageError:
        return
    assert recipe.model
    assert recipe.path == path


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"recipe\.toml"):
        load_recipe(path)


@pytest.mark.parametrize("content", ["a" * 20_000_000, "a = " + "[" * 100_000, "a." * 5000 + "b = ", "a = " + "9" * 100_000])
def test_large_and_deep_files(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(content)
    with pytest.raises(SanaExportError) as caught:
        load_recipe(path)
    assert caught.value.exit_code == 2


def test_the_tables_include_valid_recipes(tmp_path: Path) -> None:
    counts = [0, 0]

    @given(RECIPES)
    def count(content: dict[str, Any]) -> None:
        path = tmp_path / "recipe.toml"
        path.write_text("".join(f"{toml(key)} = {toml(value)}\n" for key, value in content.items()), "utf-8")
        try:
            load_recipe(path)
            counts[0] += 1
        except UsageError:
            counts[1] += 1

    count()
    assert min(counts) > 2
