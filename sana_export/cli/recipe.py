"""A recipe: what `sana-export engines` makes, as a TOML file says it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sana_export.bench.workload import load_workload
from sana_export.cli.images import FORMATS
from sana_export.cli.verbs.build import BUILD_OPTIONS
from sana_export.errors import UsageError
from sana_export.manifest import PRECISIONS
from sana_export.profiles import profile_named
from sana_export.toml_tables import parse_table, read_toml
from sana_export.trt.flavour import flavour_of
from sana_export.trt.options import BuildOptions


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
    content = read_toml(path, "recipe", "a TOML file such as engines/tiny.toml")
    parts: dict[str, Any] = {}
    for name, kind in PARTS.items():
        if name not in content:
            continue
        table = content.pop(name)
        tables = table if isinstance(table, list) and name == "build" else [table]
        parsed = tuple(parse_table(kind, one, f"[{name}] of {path}") for one in tables)
        parts[name] = parsed if name == "build" else parsed[0]
    recipe = dataclasses.replace(parse_table(Recipe, content, str(path)), path=path, **parts)
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
