"""Bundles of the small checkpoints."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

#: The block that perturbed attention guidance acts on in the bundle of `tiny-random`.
PAG_LAYER = "transformer_blocks.1"


def exported(checkpoint: Any, bundle: Path, **options: Any) -> Path:
    """`bundle`, exported in float32 unless it exists."""
    from sana_export.export.bundle import export_bundle

    if not bundle.exists():
        own = bundle.with_name(f"{bundle.name}-{os.getpid()}")
        export_bundle(checkpoint, own, precision="fp32", **options)
        try:
            own.rename(bundle)
        except OSError:  # another test run was faster
            shutil.rmtree(own)
    return bundle
