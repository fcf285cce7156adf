"""A recipe: the TOML file that `sana-export engines` runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sana_export.bench.workload import load_workload
from sana_export.errors import UsageError
from sana_export.image_files import SUFFIXES
from sana_export.manifest import PRECISIONS
from sana_export.numeric import MAX_IMAGES, MAX_SIDE, MOST_DEVICES, MOST_THREADS, integer
from sana_export.profiles import profile_named
from sana_export.quantization.choice import choose_quantization
from sana_export.quantization.layers import PARTS
from sana_export.quantization.method import parse_method
from sana_export.toml_tables import parse_table, read_toml
from sana_export.trt.flavour import flavour_of
from sana_export.trt.options import BUILD_OPTIONS, BuildOptions


@dataclass(frozen=True)
class BuildSection:
    """[[build]]: engines for one backend, target and profile. The keys are options of `sana-export build`."""

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
        """The keys that are builder options."""
        return BuildOptions(**{name: getattr(self, name) for name in BUILD_OPTIONS})


@dataclass(frozen=True)
class VerifySection:
    """[verify]: the comparison with diffusers. The keys are options of `sana-export verify`; None means its default."""

    backend: str | None = None
    prompts: tuple[str, ...] | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    device: int | None = None
    threads: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The values that are parameters of a request."""
        values = {"guidance_scale": self.guidance_scale, "num_inference_steps": self.steps, "seed": self.seed}
        return {**values, "height": self.height, "width": self.width}


@dataclass(frozen=True)
class SampleSection:
    """[sample]: images of one or more prompts. The keys are options of `sana-export generate`."""

    prompt: str | tuple[str, ...]
    #: Relative to the current folder.
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
    device: int | None = None
    threads: int | None = None

    @property
    def prompts(self) -> list[str]:
        """All prompts."""
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)

    @property
    def images(self) -> int:
        """The number of images."""
        return len(self.prompts) * self.images_per_prompt

    @property
    def settings(self) -> dict[str, Any]:
        """Parameters of `SanaRuntime.__call__`."""
        return {
            "negative_prompt": self.negative_prompt,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "pag_scale": self.pag_scale,
            "height": self.height,
            "width": self.width,
            "seed": self.seed,
            "num_images_per_prompt": self.images_per_prompt,
            "use_resolution_binning": self.resolution_binning,
        }


@dataclass(frozen=True)
class BenchSection:
    """[bench]: the latency comparison. The keys are options of `sana-export bench`."""

    workload: str
    backends: tuple[str, ...] = ()
    output: Path | None = None
    device: int | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Recipe:
    """A whole recipe. A stage without a section is left out."""

    model: str
    #: The bundle, relative to the current folder.
    output: Path
    precision: str = "fp16"
    pag_layers: tuple[str, ...] = ()
    clamp: bool | None = None
    graphs: tuple[str, ...] = ()
    quantize: tuple[str, ...] = ()
    quantize_method: tuple[str, ...] = ()
    #: Relative to the current folder.
    calibration: Path | None = None
    revision: str | None = None
    variant: str | None = None
    transformer: Path | None = None
    vae: str | None = None
    controlnet: str | None = None
    lora: tuple[str, ...] = ()
    build: tuple[BuildSection, ...] = ()
    verify: VerifySection | None = None
    sample: SampleSection | None = None
    bench: BenchSection | None = None
    #: The recipe's own file.
    path: Path = field(default=Path(), metadata={"hidden": True})


#: The tables of a recipe.
SECTIONS: dict[str, type[BuildSection | VerifySection | SampleSection | BenchSection]] = {
    "build": BuildSection,
    "verify": VerifySection,
    "sample": SampleSection,
    "bench": BenchSection,
}


def load_recipe(path: Path) -> Recipe:
    """Read and check the recipe at `path`. Raises UsageError with the wrong key and what is allowed there."""
    content = read_toml(path, "recipe", "a TOML file such as engines/tiny.toml")
    sections: dict[str, Any] = {}
    for name, kind in SECTIONS.items():
        if name not in content:
            continue
        table = content.pop(name)
        tables = table if isinstance(table, list) and name == "build" else [table]
        parsed = tuple(parse_table(kind, one, f"[{name}] of {path}") for one in tables)
        sections[name] = parsed if name == "build" else parsed[0]
    recipe = dataclasses.replace(parse_table(Recipe, content, str(path)), path=path, **sections)
    _check(recipe)
    return recipe


def _check(recipe: Recipe) -> None:
    """Find errors now that would otherwise appear only after the long export."""
    if not recipe.model.strip():
        raise UsageError(f"model in {recipe.path} is empty", found=repr(recipe.model), wanted='a name such as model = "tiny"')
    if recipe.precision not in PRECISIONS:
        raise UsageError(f"unknown precision in {recipe.path}", found=recipe.precision, wanted=", ".join(PRECISIONS))
    choose_quantization(recipe.quantize, PARTS)
    parse_method(recipe.quantize_method)
    for build in recipe.build:
        flavour_of(build.backend)
        if build.profile is not None:
            profile_named(build.profile)
        for key, most in (("batch", MAX_IMAGES), ("height", MAX_SIDE), ("width", MAX_SIDE)):
            if (value := getattr(build, key)) is not None:
                integer(f"{key} in [build] of {recipe.path}", value, 1, most)
    if recipe.sample is not None and recipe.sample.output.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"output of [sample] in {recipe.path} is not the name of an image file",
            found=str(recipe.sample.output),
            wanted="a name that ends with " + ", ".join(SUFFIXES),
        )
    if recipe.bench is not None:
        workload = load_workload(recipe.bench.workload)
        if recipe.bench.device is not None and workload.device == "cpu":
            raise UsageError(
                f"[bench] of {recipe.path} has a device, but its workload runs on the CPU",
                found=f"device = {recipe.bench.device}, workload = {recipe.bench.workload!r}",
                wanted="no device, or a workload on a GPU",
                fix=f"remove device from [bench] in {recipe.path}",
            )
    for name in ("verify", "sample", "bench"):
        section = getattr(recipe, name)
        for key, least, most in (("device", 0, MOST_DEVICES), ("threads", 1, MOST_THREADS)):
            if (value := getattr(section, key, None)) is not None:
                integer(f"{key} in [{name}] of {recipe.path}", value, least, most)
    for section in (recipe.sample, recipe.verify):
        if section is not None:
            _check_request(section, recipe.path)


def _check_request(section: SampleSection | VerifySection, path: Path) -> None:
    """Raise UsageError for values that no request can have."""
    from sana_export.runtime import Request

    try:
        Request(prompt="" if section.prompts is None else section.prompts, **section.settings)
    except UsageError as error:
        name = "sample" if isinstance(section, SampleSection) else "verify"
        raise UsageError(f"[{name}] of {path}: {error.message}", found=error.found, wanted=error.wanted, fix=error.fix) from error
