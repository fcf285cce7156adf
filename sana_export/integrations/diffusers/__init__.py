"""A bundle behind diffusers' Sana pipelines (`use_bundle`), and a pipeline of a bundle alone (`SanaExportPipeline`).

`use_bundle(pipe, "bundle")` puts the bundle's graphs behind the components of a pipeline. diffusers' own code still does the rest:
`pipe(...)` takes the same words and gives the same images. `restore(pipe)` undoes it. docs/diffusers.md says what can be kept.

Needs PyTorch and diffusers, the extra `export`.
"""

from __future__ import annotations

from sana_export.errors import DependencyError
from sana_export.installation import install_command

try:
    from sana_export.integrations.diffusers.pipeline import SanaExportPipeline, SanaExportSprintPipeline
    from sana_export.integrations.diffusers.use import BundleUse, restore, use_bundle
except ImportError as error:
    raise DependencyError(
        "the integration with diffusers needs packages that are not installed",
        found=error,
        wanted="torch, diffusers and transformers",
        fix=install_command("export"),
    ) from error

__all__ = ["BundleUse", "SanaExportPipeline", "SanaExportSprintPipeline", "restore", "use_bundle"]
