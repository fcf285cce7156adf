"""Bundles of the small checkpoints."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

#: The block that perturbed attention guidance acts on in the bundle of `tiny-random`.
PAG_LAYER = "transformer_blocks.1"


def tiny_bundle_in(folder: Path) -> Path:
    """The float32 bundle of `tiny-random` with one PAG layer, exported to `folder` unless it is there."""
    return exported("tiny-random", folder / "tiny-fp32", pag_layers=[PAG_LAYER])


def sprint_bundle_in(folder: Path) -> Path:
    """The float32 bundle of `tiny-sprint`, exported to `folder` unless it is there."""
    return exported("tiny-sprint", folder / "tiny-sprint-fp32")


def exported(checkpoint: Any, bundle: Path, precision: str = "fp32", **options: Any) -> Path:
    """`bundle`, exported in float32 or another precision from a checkpoint, or from the one of that name, unless it exists."""
    if not bundle.exists():
        from sana_export.checkpoint.checkpoint import open_checkpoint
        from sana_export.export.bundle import export_bundle

        checkpoint = open_checkpoint(checkpoint) if isinstance(checkpoint, str) else checkpoint
        own = bundle.with_name(f"{bundle.name}-{os.getpid()}")
        export_bundle(checkpoint, own, precision=precision, **options)
        try:
            own.rename(bundle)
        except OSError:  # another test run was faster
            shutil.rmtree(own)
    return bundle
