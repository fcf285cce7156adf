"""A recipe: what `sana-export engines` makes, as a TOML file says it."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sana_export.bench.workload import load_workload
from sana_export.cli.images import FORMATS
from sana_export.cli.verbs.build import BUILD_OPTIONS
from sana_export.errors import UsageError
from sana_export.manifest import PRECISIONS
from sana_export.profiles import profile_named
from sana_export.trt.flavour import flavour_of
from sana_export.trt.options import BuildOptions

T = TypeVar("T")


@dataclass(frozen=True)
class Build:
    """Engines for one backend, target and profile; the options of `sana-export build`."""

    backend: str = "tensorrt-rtx"
    profile: str | None = None
    height: int | None = None
    width: int | None = None
    batch: int | None = None
    compute_capabilities: tuple[str, ...] = ()
    graphs: tuple[str, ...] = ()
    refittable: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False
    weight_streaming: bool = False

    @property
    def options(self) -> BuildOptions:
        return BuildOptions(**{name: getattr(self, name) for name in BUILD_OPTIONS})


@dataclass(frozen=True)
class Verify:
    """The parity check; None means its default."""

    backend: str | None = None
    prompts: tuple[str, ...] | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Sample:
    """One image (or several prompts' images); the options of `sana-export generate`. `output` is relative to the current folder."""

    prompt: str | tuple[str, ...]
    output: Path
    negative_prompt: str = ""
    steps: int | None = None
    guidance_scale: float | None = None
    pag_scale: float = 0.0
    height: int | None = None
    width: int | None = None
    seed: int = 0
    images_per_prompt: int = 1
    resolution_binning: bool | None = None
    backend: str = "auto"


@dataclass(frozen=True)
class Bench:
    """The latency comparison; the options of `sana-export bench`."""

    workload: str
    backends: tuple[str, ...] = ()
    output: Path | None = None


@dataclass(frozen=True)
class Recipe:
    """A whole recipe. A part that the file leaves out is not done; `output` (the bundle) is relative to the current folder."""

    model: str
    output: Path
    precision: str = "fp16"
    pag_layers: tuple[str, ...] = ()
    clamp: bool | None = None
    graphs: tuple[str, ...] = ()
    revision: str | None = None
    variant: str | None = None
    transformer: Path | None = None
    lora: tuple[str, ...] = ()
    build: tuple[Build, ...] = ()
    verify: Verify | None = None
    sample: Sample | None = None
    bench: Bench | None = None
    path: Path = field(default=Path(), metadata={"hidden": True})


#: The tables of a recipe.
PARTS: dict[str, type[Build | Verify | Sample | Bench]] = {"build": Build, "verify": Verify, "sample": Sample, "bench": Bench}


def load_recipe(path: Path) -> Recipe:
    """Read and check the recipe at `path`. Raises UsageError for what it cannot mean, naming the key and what it may be."""
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(
            f"{path} cannot be read as a recipe", found=str(error), wanted="a TOML file such as engines/tiny.toml"
        ) from error
    parts: dict[str, Any] = {}
    for name, kind in PARTS.items():
        if name not in content:
            continue
        table = content.pop(name)
        tables = table if isinstance(table, list) and name == "build" else [table]
        parsed = tuple(_parse(kind, one, f"[{name}] of {path}") for one in tables)
        parts[name] = parsed if name == "build" else parsed[0]
    recipe = dataclasses.replace(_parse(Recipe, content, str(path)), path=path, **parts)
    _check(recipe)
    return recipe


def _check(recipe: Recipe) -> None:
    """Find what would fail only after the long export."""
    if recipe.precision not in PRECISIONS:
        raise UsageError(f"unknown precision in {recipe.path}", found=recipe.precision, wanted=", ".join(PRECISIONS))
    for build in recipe.build:
        flavour_of(build.backend)
        if build.profile is not None:
            profile_named(build.profile)
    if recipe.sample is not None and recipe.sample.output.suffix.lower() not in FORMATS:
        raise UsageError(
            f"output of [sample] in {recipe.path} is not the name of an image file",
            found=str(recipe.sample.output),
            wanted="a name that ends with " + ", ".join(FORMATS),
        )
    if recipe.bench is not None:
        load_workload(recipe.bench.workload)


def _parse(kind: type[T], table: object, where: str) -> T:
    """`table` as a `kind`; its keys are the fields that are not parts, and each value has the field's type."""
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
        raise UsageError(f"{where} is not complete", found=f"no {', '.join(missing)}", wanted=", ".join(required))
    hints = typing.get_type_hints(kind)
    return kind(**{key: _value(value, hints[key], f"{key} in {where}") for key, value in table.items()})


#: Type of a field: the TOML values that fit it, what makes the field's value of one, and how a message calls it.
_KINDS: dict[Any, tuple[tuple[type, ...], Any, str]] = {
    str: ((str,), str, "a string"),
    Path: ((str,), Path, "a path"),
    bool: ((bool,), bool, "true or false"),
    int: ((int,), int, "a whole number"),
    float: ((int, float), float, "a number"),
    tuple[str, ...]: ((list,), tuple, "a list of strings"),
}


def _value(value: Any, hint: Any, where: str) -> Any:
    wanted = []
    for kind in typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,):
        if kind not in _KINDS:
            continue
        accepted, make, name = _KINDS[kind]
        wanted.append(name)
        fits = isinstance(value, accepted) and isinstance(value, bool) == (kind is bool)
        if fits and (not isinstance(value, list) or all(isinstance(item, str) for item in value)):
            return make(value)
    raise UsageError(f"{where} is of the wrong kind", found=repr(value), wanted=" or ".join(wanted))
