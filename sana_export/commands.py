"""The command that makes a bundle again, for the errors that ask for it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from sana_export.adapters import Lora
from sana_export.manifest import Checkpoint, Manifest
from sana_export.variants import find_variant

#: What `export` takes where no precision is named.
DEFAULT_PRECISION = "fp16"


def export_line(
    bundle: Path,
    manifest: Manifest,
    *,
    precision: str | None = None,
    pag_layers: tuple[int, ...] | None = None,
    loras: Iterable[Lora] = (),
) -> str:
    """The command that exports `bundle` again: with its own options, those given here in their place, and `loras` on top."""
    precision = manifest.options.precision if precision is None else precision
    layers = manifest.options.pag_layers if pag_layers is None else pag_layers
    model, *model_options = model_words(manifest.checkpoint)
    words = ["sana-export", "export", model, "-o", str(bundle), *model_options]
    if precision != DEFAULT_PRECISION:
        words += ["--dtype", precision]
    if manifest.options.clamp != manifest.checkpoint.clamp:
        words.append("--clamp" if manifest.options.clamp else "--no-clamp")
    if layers:
        words += ["--pag-layers", ",".join(f"transformer_blocks.{layer}" for layer in layers)]
    for lora in loras:
        words += ["--lora", f"{lora.path}:{lora.scale}"]
    return shlex.join(words)


def engines_line(bundle: Path, backend: str, *options: str) -> str:
    """The command that builds a bundle's engines for `backend`, with more options of `build`."""
    return shlex.join(["sana-export", "build", str(bundle), "--backend", backend, *options])


def model_words(checkpoint: Checkpoint) -> list[str]:
    """MODEL and the options that say which of its files, and which overlays, a bundle was made from."""
    words = [checkpoint.source]
    if checkpoint.revision is not None:
        words += ["--revision", checkpoint.revision]
    row = find_variant(checkpoint.source)
    if checkpoint.weights_variant not in (None, row and row.weights_variant):
        words += ["--variant", str(checkpoint.weights_variant)]
    if checkpoint.transformer is not None:
        words += ["--transformer", checkpoint.transformer.path]
    for lora in checkpoint.loras:
        words += ["--lora", f"{lora.path}:{lora.scale}"]
    return words


def build_line(bundle: object, backend: str, *, height: int, width: int, batch: int = 1) -> str:
    """The command that builds engines for one image size in pixels and up to `batch` images."""
    return f"sana-export build {bundle} --backend {backend} --height {height} --width {width} --batch {batch}"
