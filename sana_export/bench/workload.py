"""What a benchmark samples: one TOML file, read into a frozen `Workload`.

The files that come with the package lie in `workloads/` beside this module; any other is named by its path.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_export.errors import UsageError
from sana_export.machine import usable_cores
from sana_export.toml_tables import parse_table, read_toml

FOLDER = Path(__file__).with_name("workloads")
PROMPTS = Path(__file__).with_name("prompts.toml")
DEVICES = ("cpu", "cuda")
#: Sana's latents are 1/32 of the image on each side.
SIDE_FACTOR = 32


@dataclass(frozen=True)
class Workload:
    """One request, repeated: every round samples each prompt once, with `images_per_prompt` images in one call.

    Sizes are pixels and are sampled as they are (no resolution binning). `warmup` rounds are not counted, `repeats` rounds are.
    `device`: where eager diffusers runs, and with that its dtypes. `threads` None: every core that this process may use.
    `sweep`: other sizes and batches that are timed after the workload itself, each the fields that it changes.
    """

    name: str
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    prompts: tuple[str, ...]
    pag_scale: float = 0.0
    images_per_prompt: int = 1
    seed: int = 0
    warmup: int = 1
    repeats: int = 5
    threads: int | None = None
    device: str = "cpu"
    sweep: tuple[Mapping[str, int], ...] = ()

    def points(self) -> list[Workload]:
        """The workloads of the sweep."""
        return [dataclasses.replace(self, sweep=(), **dict[str, Any](point)) for point in self.sweep]

    def resolved_threads(self) -> int:
        """The number of CPU threads that every backend gets."""
        return self.threads or usable_cores()

    def sampling(self) -> dict[str, Any]:
        """The fields of `runtime.request.Request` that all calls of the workload have in common."""
        names = ("num_inference_steps", "guidance_scale", "pag_scale", "height", "width")
        same = {name: getattr(self, name) for name in names}
        return {**same, "num_images_per_prompt": self.images_per_prompt, "use_resolution_binning": False}


#: What a point of a sweep may change.
_SWEPT = ("height", "width", "images_per_prompt", "num_inference_steps", "warmup", "repeats")
#: Field: the least value that makes sense.
_LEAST = {
    "num_inference_steps": 1,
    "guidance_scale": 0,
    "pag_scale": 0,
    "images_per_prompt": 1,
    "seed": 0,
    "warmup": 1,
    "repeats": 1,
    "threads": 1,
}


def built_in_workloads() -> dict[str, Path]:
    """Name to file of the workloads that come with the package."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def load_workload(name: str | Path) -> Workload:
    """The built-in workload `name`, or the one in the TOML file at the path `name`. UsageError where it cannot be used."""
    known = built_in_workloads()
    path = known.get(str(name), Path(name))
    if not path.is_file():
        near = difflib.get_close_matches(str(name), known, n=3)
        raise UsageError(
            f"there is no workload {str(name)!r}",
            found="no built-in of that name and no such file",
            wanted=", ".join(near or known),
            fix=f"--workload {next(iter(near or known), 'FILE.toml')}",
        )
    return parse_workload(read_toml(path, "workload"), path)


def parse_workload(content: dict[str, Any], path: Path) -> Workload:
    """The workload that a TOML document at `path` says; its name is the file's unless it gives one."""
    content = {"name": path.stem, **content}
    if "prompt_sets" in content:
        content["prompts"] = list(prompts_of(content.pop("prompt_sets"), f"prompt_sets in {path}"))
    workload = parse_table(Workload, content, str(path))
    _check(workload, path)
    return workload


def prompts_of(sets: Any, where: str) -> tuple[str, ...]:
    """The prompts of the named sets of prompts.toml, in their order. UsageError, naming `where`, for an unknown name."""
    known: dict[str, list[str]] = tomllib.loads(PROMPTS.read_text("utf-8"))
    names = [str(name) for name in sets] if isinstance(sets, (list, tuple)) else [str(sets)]
    if unknown := [name for name in names if name not in known] or ([] if names else ["nothing"]):
        raise UsageError(f"{where}: there is no such set of prompts", found=unknown[0], wanted=", ".join(known))
    return tuple(" ".join(prompt.split()) for name in names for prompt in known[name])


def _check(workload: Workload, path: Path) -> None:
    if not workload.prompts:
        raise UsageError(f"prompts in {path} is empty", found="[]", wanted="a list of strings")
    for key, least in _LEAST.items():
        value = getattr(workload, key)
        if value is not None and value < least:
            raise UsageError(f"{key} in {path} is too small", found=value, wanted=f"{least} or more")
    for key in ("height", "width"):
        side = getattr(workload, key)
        if side < SIDE_FACTOR or side % SIDE_FACTOR:
            raise UsageError(f"{key} in {path} does not fit", found=side, wanted=f"a multiple of {SIDE_FACTOR}")
    for point in workload.sweep:
        for key, value in point.items():
            if key not in _SWEPT or not isinstance(value, int) or isinstance(value, bool):
                raise UsageError(f"sweep in {path} has a bad key", found=f"{key} = {value!r}", wanted=f"whole {', '.join(_SWEPT)}")
    for inner in workload.points():
        _check(inner, path)
    if workload.device not in DEVICES:
        raise UsageError(f"device in {path} is unknown", found=workload.device, wanted=" or ".join(DEVICES))
