"""Bundles of the small checkpoints."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sana_export.files import locked

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

    def export(folder: Path) -> None:
        from sana_export.checkpoint.checkpoint import open_checkpoint
        from sana_export.export.bundle import export_bundle

        opened = open_checkpoint(checkpoint) if isinstance(checkpoint, str) else checkpoint
        export_bundle(opened, folder, precision=precision, **options)

    return made_once(bundle, export)


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """The folder `target`, which `make` fills unless it exists. Other processes of the test run wait for it."""
    if not target.exists():
        with locked(target.with_name(f"{target.name}.lock"), remove=True):
            if not target.exists():
                own = target.with_name(f"{target.name}-{os.getpid()}")
                shutil.rmtree(own, ignore_errors=True)
                make(own)
                try:
                    own.rename(target)
                except OSError:  # a process on another machine, or where files cannot be locked, was faster
                    if not target.exists():
                        raise
                    shutil.rmtree(own)
    return target
