"""The command that makes a bundle again, for the errors that ask for it."""

from __future__ import annotations

import shlex
from pathlib import Path

from sana_export.manifest import Manifest

#: What `export` takes where no precision is named.
DEFAULT_PRECISION = "fp16"


def export_line(
    bundle: Path, manifest: Manifest, *, precision: str | None = None, pag_layers: tuple[int, ...] | None = None
) -> str:
    """`sana-export export MODEL -o BUNDLE` with the options that the bundle has, or with the ones given here instead."""
    precision = manifest.options.precision if precision is None else precision
    layers = manifest.options.pag_layers if pag_layers is None else pag_layers
    words = ["sana-export", "export", manifest.checkpoint.source, "-o", str(bundle)]
    if manifest.checkpoint.revision is not None:
        words += ["--revision", manifest.checkpoint.revision]
    if precision != DEFAULT_PRECISION:
        words += ["--dtype", precision]
    if manifest.options.clamp != manifest.checkpoint.clamp:
        words.append("--clamp" if manifest.options.clamp else "--no-clamp")
    if manifest.checkpoint.weights_variant is not None and manifest.checkpoint.variant is None:
        words += ["--variant", manifest.checkpoint.weights_variant]
    if layers:
        words += ["--pag-layers", ",".join(f"transformer_blocks.{layer}" for layer in layers)]
    return shlex.join(words)
