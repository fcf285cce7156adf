"""The backends that execute a bundle's graphs, by name. What a backend is stands in base.py."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path

from sana_export.errors import ArtifactError, DependencyError, UsageError
from sana_export.installation import install_command
from sana_export.manifest import Manifest
from sana_export.numeric import shown
from sana_export.quantization.choice import quantization_words
from sana_export.quantization.targets import without_kernels
from sana_export.runtime.backends.base import DEFAULT_SETTINGS, Backend, BackendFactory, BackendSettings, Loader
from sana_export.runtime.memory import AUTO

log = logging.getLogger(__name__)


def _onnxruntime(*, cuda_graphs: bool) -> BackendFactory:
    def load(bundle: Path, manifest: Manifest, settings: BackendSettings) -> Backend:
        from sana_export.runtime.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(bundle, manifest, settings, cuda_graphs=cuda_graphs)

    return load


def _onnxruntime_rtx(bundle: Path, manifest: Manifest, settings: BackendSettings) -> Backend:
    from sana_export.runtime.backends.onnxruntime_rtx import OnnxRuntimeRtxBackend

    return OnnxRuntimeRtxBackend(bundle, manifest, settings)


def _torch(*, compiled: bool) -> BackendFactory:
    def load(bundle: Path, manifest: Manifest, settings: BackendSettings) -> Backend:
        try:
            from sana_export.runtime.backends.torch import open_torch
        except ImportError as error:
            raise DependencyError(
                "the backend torch is not installed",
                found=error,
                wanted="PyTorch",
                fix=install_command("export"),
            ) from error
        return open_torch(bundle, manifest, settings, compiled=compiled)

    return load


def _engines(name: str) -> BackendFactory:
    def load(bundle: Path, manifest: Manifest, settings: BackendSettings) -> Backend:
        from sana_export.runtime.backends.tensorrt import TensorRTBackend

        return TensorRTBackend(bundle, manifest, name, settings)

    return load


#: Every backend by its name on the command line.
BACKENDS: dict[str, BackendFactory] = {
    "onnxruntime": _onnxruntime(cuda_graphs=False),
    "onnxruntime-cuda-graphs": _onnxruntime(cuda_graphs=True),
    "onnxruntime-tensorrt-rtx": _onnxruntime_rtx,
    "tensorrt": _engines("tensorrt"),
    "tensorrt-rtx": _engines("tensorrt-rtx"),
    "torch": _torch(compiled=False),
    "torch-compile": _torch(compiled=True),
}
#: The backends that run engines, the best first, and what "auto" takes if no engine runs here.
ENGINE_BACKENDS, FALLBACK = ("tensorrt", "tensorrt-rtx"), "onnxruntime"
#: What "auto" takes in place of `FALLBACK` for weights that this has no kernels for.
EVERY_SCHEME = "torch"


def check_backend(backend: str | Loader) -> None:
    """Raise UsageError unless `backend` is the name of a backend, "auto" or a loader."""
    wanted = ", ".join((AUTO, *BACKENDS))
    if not isinstance(backend, str) and not callable(backend):
        raise UsageError("backend is not a name", found=shown(backend), wanted=f"{wanted}, or a loader")
    if isinstance(backend, str) and backend not in (AUTO, *BACKENDS):
        near = difflib.get_close_matches(backend, BACKENDS, n=1)
        raise UsageError(f"there is no backend named {backend!r}", wanted=wanted, fix=f"--backend {near[0] if near else AUTO}")


def open_backend(backend: str | Loader, bundle: Path, manifest: Manifest, settings: BackendSettings = DEFAULT_SETTINGS) -> Backend:
    """The backend of that name, for "auto" the best one that can run here, or what the loader returns; ready to load graphs.

    Raises UsageError for an unknown name or settings that the backend does not take, DependencyError if its package or GPU is
    missing, and ArtifactError if it cannot run the bundle's precision.
    """
    check_backend(backend)
    if not isinstance(backend, str):
        if settings != DEFAULT_SETTINGS:
            raise UsageError(
                "device, threads and backend_options are for backends named by a string",
                found=f"a loader, with {settings}",
                wanted="a loader that configures its backend itself",
            )
        return backend(bundle, manifest)
    name = _best(bundle, manifest, settings.device) if backend == AUTO else backend
    return BACKENDS[name](bundle, manifest, settings)


def _best(bundle: Path, manifest: Manifest, device: int | None) -> str:
    """The best backend that can run `bundle` here, found without loading any of it."""
    from sana_export.trt.compatibility import detect_host
    from sana_export.trt.selection import runnable

    for name in ENGINE_BACKENDS:
        if any(engine.backend == name for engine in manifest.engines):
            try:
                runnable(bundle, manifest, name, detect_host(device))
            except ArtifactError as error:
                log.info("%s is not used: %s", name, error.found)
            else:
                return name
    if missing := without_kernels(manifest.options.quantize):
        log.info("%s is not used: it has no kernels for %s", FALLBACK, quantization_words(missing))
        return EVERY_SCHEME
    return FALLBACK
