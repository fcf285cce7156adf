"""The commands that error messages tell the user to run, with every option filled in."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Protocol

from sana_export.adapters import Lora
from sana_export.contract import OPTIONAL_GRAPHS
from sana_export.hub.origin import origin_of
from sana_export.lora_scales import scales_text
from sana_export.quantization.choice import calibrated_parts, quantization_words, taken_steps
from sana_export.quantization.targets import common_capabilities
from sana_export.records import Checkpoint, Options
from sana_export.variants import find_variant

#: The precision that `export` uses if none is given.
DEFAULT_PRECISION = "fp16"


class Exported(Protocol):
    """What an export was made from and how, and the names of its graphs. Every manifest says this."""

    @property
    def checkpoint(self) -> Checkpoint: ...

    @property
    def options(self) -> Options: ...

    @property
    def graphs(self) -> Collection[str]: ...


def export_command(
    bundle: Path,
    exported: Exported,
    *,
    precision: str | None = None,
    pag_layers: tuple[int, ...] | None = None,
    quantize: Mapping[str, str] | None = None,
    loras: Iterable[Lora] = (),
    groups: Iterable[str] = (),
    controlnet: str | None = None,
) -> str:
    """The command that exports `bundle` again.

    It repeats the bundle's own options, except for those given here and for a calibration file that does not fit them. `loras` are
    added to its LoRAs, `groups` (contract.GRAPH_GROUPS) to its graphs, `controlnet` names its ControlNet. A bundle that lacks
    graphs of its groups gets them. A bundle in the hub's cache is exported beside it, to the current folder.
    """
    loras, precision = [*loras], exported.options.precision if precision is None else precision
    layers = exported.options.pag_layers if pag_layers is None else pag_layers
    schemes = exported.options.quantize if quantize is None else quantize
    model, *model_options = model_words(exported.checkpoint)
    words = ["sana-export", "export", model, "-o", str(_own_folder(bundle)), *model_options]
    if precision != DEFAULT_PRECISION:
        words += ["--dtype", precision]
    if exported.options.clamp != exported.checkpoint.clamp:
        words.append("--clamp" if exported.options.clamp else "--no-clamp")
    controlled = controlnet is not None and exported.checkpoint.controlnet is None
    if controlnet is not None and controlled:
        words += ["--controlnet", controlnet]
    if layers:
        words += ["--pag-layers", ",".join(f"transformer_blocks.{layer}" for layer in layers)]
    if schemes:
        words += ["--quantize", quantization_words(schemes)]
    if schemes and (steps := taken_steps(schemes, exported.options.quantize_method)):
        words += ["--quantize-method", ",".join(steps)]
    same = precision == exported.options.precision and not loras and not controlled
    if same and exported.options.calibration_file and _takes_calibration(exported.options, schemes):
        words += ["--calibration", exported.options.calibration_file]
    for lora in loras:
        words += ["--lora", f"{lora.path}:{scales_text(lora.scale, lora.layer_scales)}"]
    present = {*groups, *(OPTIONAL_GRAPHS[name] for name in exported.graphs if name in OPTIONAL_GRAPHS)}
    if present:
        words += ["--graphs", ",".join(["default", *sorted(present)])]
    return shlex.join(words)


def _takes_calibration(options: Options, schemes: Mapping[str, str]) -> bool:
    """Whether the calibration file of an export with `options` is also one for `schemes`. It may have seen no other parts."""
    if schemes == options.quantize:
        return True
    needed, own = (calibrated_parts(chosen, taken_steps(chosen, options.quantize_method)) for chosen in (schemes, options.quantize))
    return bool(needed) and set(needed) <= set(own)


def repair_command(bundle: Path, exported: Exported) -> str:
    """The command that restores the files of `bundle`: downloads them again if it came from the hub, or exports it again."""
    origin = origin_of(bundle)
    return export_command(bundle, exported) if origin is None else origin.pull_command()


def engine_repair_command(bundle: Path, backend: str) -> str:
    """The command that restores the engines of `bundle`: downloads them again if it came from the hub, or builds them again."""
    origin = origin_of(bundle)
    return engines_command(bundle, backend) if origin is None else origin.pull_command()


def _own_folder(bundle: Path) -> Path:
    """Where the user may change `bundle`: its own folder, or one for a copy of a bundle in the hub's cache."""
    origin = origin_of(bundle)
    return bundle if origin is None or origin.folder else Path(origin.name)


def _first_own(bundle: Path, *words: str) -> str:
    """The command of these words for `bundle`, which it changes. A bundle in the hub's cache is pulled to a folder first."""
    verb, *options = words
    command, own = ["sana-export", verb, str(_own_folder(bundle)), *options], _own_folder(bundle)
    origin = origin_of(bundle)
    pull = "" if own is bundle or origin is None else f"{origin.pull_command(output=own)} && "
    return pull + shlex.join(command)


def first_export_command(folder: Path) -> str:
    """The command that exports the checkpoint in `folder` to a new bundle next to it."""
    model = str(folder)
    if find_variant(model) is not None:  # without a slash, `export` takes it for the checkpoint of that name
        model = f"./{folder}"
    named = folder if folder.name not in ("", "..") else folder.resolve()
    return shlex.join(["sana-export", "export", model, "-o", f"{named}-bundle"])


def reference_command(verb: str, bundle: Path, exported: Exported, *options: str) -> str:
    """The command of `verb` (verify, bench) for `bundle` and the checkpoint that it was exported from, with more options."""
    return shlex.join(["sana-export", verb, str(bundle), "--reference", *model_words(exported.checkpoint), *options])


def ranges_command(bundle: Path, exported: Exported) -> str:
    """The command that reports which tensors of `bundle` leave the range of its precision."""
    return reference_command("verify", bundle, exported, "--ranges")


def engines_command(bundle: Path, backend: str, *options: str) -> str:
    """The command that builds a bundle's engines for `backend`, with more options of `build`."""
    return _first_own(bundle, "build", "--backend", backend, *options)


def first_engines_command(bundle: Path, exported: Exported) -> str:
    """The command that builds the TensorRT-RTX engines of a bundle for every GPU that its quantization schemes exist for."""
    named = common_capabilities(exported.options.quantize.values())
    return engines_command(bundle, "tensorrt-rtx", *(["--compute-capability", *named] if named else []))


def generate_command(bundle: Path, backend: str) -> str:
    """A command that draws an image with a bundle on `backend`."""
    return shlex.join(["sana-export", "generate", str(bundle), "a red apple", "-o", "apple.png", "--backend", backend])


def model_words(checkpoint: Checkpoint) -> list[str]:
    """The words of a command that name a checkpoint: MODEL, then the options for its revision, files and overlays."""
    words = [checkpoint.source]
    if checkpoint.revision is not None:
        words += ["--revision", checkpoint.revision]
    row = find_variant(checkpoint.source)
    if checkpoint.weights_variant not in (None, row and row.weights_variant):
        words += ["--variant", str(checkpoint.weights_variant)]
    if checkpoint.transformer is not None:
        words += ["--transformer", checkpoint.transformer.path]
    if checkpoint.vae is not None:
        words += ["--vae", checkpoint.vae.path]
    if checkpoint.controlnet is not None:
        words += ["--controlnet", checkpoint.controlnet.path]
    for lora in checkpoint.loras:
        words += ["--lora", f"{lora.path}:{scales_text(lora.scale, lora.layer_scales)}"]
    return words


def resave_command(source: str, pipeline: str, suffix: str, *changes: str) -> str:
    """The command that loads a checkpoint as diffusers' `pipeline`, makes `changes` to it in Python, and saves it to a new folder.

    The folder has the checkpoint's name and `suffix`.
    """
    named = PurePath(source) if PurePath(source).name not in ("", "..") else Path(source).resolve()
    folder = named.name + suffix
    load, save = (json.dumps(name, ensure_ascii=False) for name in (source, folder))  # the shell's quotes are the single ones
    steps = [f"pipeline = diffusers.{pipeline}.from_pretrained({load})", *changes, f"pipeline.save_pretrained({save})"]
    return shlex.join(["python", "-c", "; ".join(["import diffusers", *steps])])


def build_command(bundle: Path, backend: str, *, height: int, width: int, batch: int = 1) -> str:
    """The command that builds engines for one image size in pixels and up to `batch` images."""
    size = ["--height", str(height), "--width", str(width), "--batch", str(batch)]
    return _first_own(bundle, "build", "--backend", backend, *size)
