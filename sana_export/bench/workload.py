"""What a benchmark samples: a TOML file that is read into a `Workload`.

The built-in workloads are in the folder `workloads/`. Any other is named by its path.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_export.errors import UsageError
from sana_export.machine import usable_cores
from sana_export.numeric import MAX_IMAGES, MAX_ROUNDS, MAX_SIDE, MAX_STEPS, MOST_SCALE, MOST_THREADS, integer, real
from sana_export.toml_tables import parse_table, read_toml

FOLDER = Path(__file__).with_name("workloads")
PROMPTS = Path(__file__).with_name("prompts.toml")
DEVICES = ("cpu", "cuda")
#: Sana's latents have 1/32 of the image's size on each side.
SIDE_FACTOR = 32


@dataclass(frozen=True)
class Workload:
    """One request, repeated. Every round samples each prompt once. Sizes are not rounded to resolution bins."""

    #: Its name in reports.
    name: str
    #: Height of the images in pixels.
    height: int
    #: Width of the images in pixels.
    width: int
    #: Number of steps.
    num_inference_steps: int
    #: Guidance scale.
    guidance_scale: float
    #: The prompts.
    prompts: tuple[str, ...]
    #: Scale of perturbed-attention guidance. 0 turns it off.
    pag_scale: float = 0.0
    #: Number of images in one call.
    images_per_prompt: int = 1
    #: Seed of every call.
    seed: int = 0
    #: Rounds that are not counted.
    warmup: int = 1
    #: Rounds that are counted.
    repeats: int = 5
    #: Number of CPU threads. None means every core that this process may use.
    threads: int | None = None
    #: Where eager diffusers runs, "cpu" or "cuda". Its dtypes depend on it.
    device: str = "cpu"
    #: Other sizes and batches to time after the workload itself: for each, the fields that it changes.
    sweep: tuple[Mapping[str, int], ...] = ()

    def points(self) -> list[Workload]:
        """The workload of each point of the sweep."""
        return [dataclasses.replace(self, sweep=(), **dict[str, Any](point)) for point in self.sweep]

    def resolved_threads(self) -> int:
        """The number of CPU threads of each backend."""
        return self.threads or usable_cores()

    def sampling(self) -> dict[str, Any]:
        """The fields of `runtime.request.Request` that are the same in all calls of the workload."""
        names = ("num_inference_steps", "guidance_scale", "pag_scale", "height", "width")
        same = {name: getattr(self, name) for name in names}
        return {**same, "num_images_per_prompt": self.images_per_prompt, "use_resolution_binning": False}


#: Fields that a point of a sweep may change.
_SWEPT = ("height", "width", "images_per_prompt", "num_inference_steps", "warmup", "repeats")
#: Field to its smallest and its largest valid value.
_LIMITS: dict[str, tuple[float, float]] = {
    "height": (SIDE_FACTOR, MAX_SIDE),
    "width": (SIDE_FACTOR, MAX_SIDE),
    "num_inference_steps": (1, MAX_STEPS),
    "guidance_scale": (0, MOST_SCALE),
    "pag_scale": (0, MOST_SCALE),
    "images_per_prompt": (1, MAX_IMAGES),
    "seed": (0, 2**63 - 1),
    "warmup": (1, MAX_ROUNDS),
    "repeats": (1, MAX_ROUNDS),
    "threads": (1, MOST_THREADS),
}


def built_in_workloads() -> dict[str, Path]:
    """Name to file of the built-in workloads."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def load_workload(name: str | Path) -> Workload:
    """The built-in workload `name`, or the one in the TOML file `name`. Raises UsageError if it is missing or invalid."""
    known = built_in_workloads()
    path = known.get(str(name), Path(name))
    if not path.is_file():
        near = difflib.get_close_matches(str(name), known, n=3)
        raise UsageError(
            f"unknown workload {str(name)!r}",
            found="no built-in workload of that name and no such file",
            wanted=", ".join(near or known),
            fix=f"--workload {(near or list(known))[0]}",
        )
    return parse_workload(read_toml(path, "workload"), path)


def parse_workload(content: dict[str, Any], path: Path) -> Workload:
    """The workload in a TOML document from `path`. Its name is the file's unless the document has one."""
    content = {"name": path.stem, **content}
    if "prompt_sets" in content:
        content["prompts"] = list(prompts_of(content.pop("prompt_sets"), f"prompt_sets in {path}"))
    workload = parse_table(Workload, content, str(path))
    _check(workload, path)
    return workload


def prompts_of(sets: Any, where: str) -> tuple[str, ...]:
    """The prompts of the named sets in prompts.toml, in order. Raises UsageError, which mentions `where`, for an unknown set."""
    known: dict[str, list[str]] = tomllib.loads(PROMPTS.read_text("utf-8"))
    names = [str(name) for name in sets] if isinstance(sets, (list, tuple)) else [str(sets)]
    if unknown := [name for name in names if name not in known] or ([] if names else ["nothing"]):
        raise UsageError(f"{where}: unknown set of prompts", found=unknown[0], wanted=", ".join(known))
    return tuple(" ".join(prompt.split()) for name in names for prompt in known[name])


def _check(workload: Workload, path: Path) -> None:
    if not workload.prompts:
        raise UsageError(f"prompts in {path} is empty", found="[]", wanted="a list of strings")
    for key, (least, most) in _LIMITS.items():
        value = getattr(workload, key)
        if value is not None:
            check: Callable[[str, Any, Any, Any], int | float] = integer if isinstance(value, int) else real
            check(f"{key} in {path}", value, least, most)
    for key in ("height", "width"):
        side = getattr(workload, key)
        if side % SIDE_FACTOR:
            raise UsageError(f"{key} in {path} is not a valid size", found=side, wanted=f"a multiple of {SIDE_FACTOR}")
    for point in workload.sweep:
        for key, value in point.items():
            if key not in _SWEPT or not isinstance(value, int) or isinstance(value, bool):
                raise UsageError(
                    f"sweep in {path} has an invalid entry",
                    found=f"{key} = {value!r}",
                    wanted=f"whole numbers for {', '.join(_SWEPT)}",
                )
    for inner in workload.points():
        _check(inner, path)
    if workload.device not in DEVICES:
        raise UsageError(f"device in {path} is unknown", found=workload.device, wanted=" or ".join(DEVICES))
