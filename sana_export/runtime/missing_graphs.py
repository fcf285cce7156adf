"""The errors for a request or a pipeline that needs graphs which a bundle does not have."""

from __future__ import annotations

from pathlib import Path

from sana_export.commands import export_command
from sana_export.controlnets import fitting
from sana_export.errors import ArtifactError
from sana_export.manifest import Manifest


def no_encoder(bundle: Path, manifest: Manifest, found: str) -> ArtifactError:
    """The error for an image that the bundle cannot encode. `found` says what is missing, or what needs it."""
    return ArtifactError(
        f"{bundle} was exported without the graphs of image-to-image",
        found=found,
        wanted="a bundle with the graphs of the group img2img",
        fix=export_command(bundle, manifest, groups=("img2img",)),
    )


def no_controlnet(bundle: Path, manifest: Manifest, found: str) -> ArtifactError:
    """The error for a control image that the bundle cannot follow. `found` says what is missing, or what needs it."""
    *_, heads, _, dim = manifest.graphs["context"].spec.outputs[0].shape
    alias = next(iter(fitting(int(heads), int(dim))), "CONTROLNET")
    return ArtifactError(
        f"{bundle} was exported without a ControlNet",
        found=found,
        wanted="a bundle that was exported with --controlnet",
        fix=export_command(bundle, manifest, controlnet=alias, groups=("control", "img2img")),
    )
