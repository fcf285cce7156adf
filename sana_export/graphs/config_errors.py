"""The error for a checkpoint whose config asks for something that the deployment graphs do not implement."""

from __future__ import annotations

from sana_export.errors import ArtifactError


def unsupported_config(component: str, key: str, *, found: object, wanted: object) -> ArtifactError:
    """The error for the entry `key` in the config.json of a checkpoint's `component` folder."""
    return ArtifactError(
        f"{component}/config.json has an unsupported {key}",
        found=found,
        wanted=wanted,
        fix="use a checkpoint with the architecture of a published Sana model (sana-export variants lists them)",
    )
