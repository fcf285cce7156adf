"""Sana on NVIDIA GPUs: deployment graphs, TensorRT engines and a runtime without PyTorch.

The public names are imported when they are first used: `SanaRuntime`, `Request` and `build_bundle` work without PyTorch,
`open_checkpoint`, `export_bundle` and `verify_bundle` need the extra `export`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sana_export import errors as errors
    from sana_export.calibration.run import Calibration as Calibration
    from sana_export.calibration.run import calibrate as calibrate
    from sana_export.checkpoint.checkpoint import open_checkpoint as open_checkpoint
    from sana_export.export.bundle import export_bundle as export_bundle
    from sana_export.hub.bundles.fetch import pull_bundle as pull_bundle
    from sana_export.hub.bundles.push import push_bundle as push_bundle
    from sana_export.image_files import read_metadata as read_metadata
    from sana_export.image_files import save_image as save_image
    from sana_export.runtime.pipeline import SanaRuntime as SanaRuntime
    from sana_export.runtime.request import Request as Request
    from sana_export.trt.bundle import build_bundle as build_bundle
    from sana_export.verify.bundle import verify_bundle as verify_bundle

__version__ = "0.1.0"

#: The module that defines each public name.
_MODULES = {
    "Calibration": "sana_export.calibration.run",
    "Request": "sana_export.runtime.request",
    "SanaRuntime": "sana_export.runtime.pipeline",
    "build_bundle": "sana_export.trt.bundle",
    "calibrate": "sana_export.calibration.run",
    "export_bundle": "sana_export.export.bundle",
    "open_checkpoint": "sana_export.checkpoint.checkpoint",
    "pull_bundle": "sana_export.hub.bundles.fetch",
    "push_bundle": "sana_export.hub.bundles.push",
    "read_metadata": "sana_export.image_files",
    "save_image": "sana_export.image_files",
    "verify_bundle": "sana_export.verify.bundle",
}
__all__ = [
    "Calibration",
    "Request",
    "SanaRuntime",
    "__version__",
    "build_bundle",
    "calibrate",
    "errors",
    "export_bundle",
    "open_checkpoint",
    "pull_bundle",
    "push_bundle",
    "read_metadata",
    "save_image",
    "verify_bundle",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name == "errors":
        return import_module("sana_export.errors")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == __name__:
            raise
        from sana_export.errors import DependencyError
        from sana_export.installation import install_command

        raise DependencyError(
            f"{__name__}.{name} needs a package that is not installed",
            found=error,
            wanted="the extra `export`: torch, diffusers, transformers, onnx",
            fix=install_command("export"),
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
