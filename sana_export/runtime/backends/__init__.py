"""What executes a bundle's graphs: one table of backends behind two small interfaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from sana_export.errors import DependencyError, UsageError
from sana_export.manifest import Manifest

#: A tensor where the backend computes: opaque, made by `Backend.to_device` or by a session, readable with `Backend.to_host`.
DeviceTensor = Any
Array = npt.NDArray[Any]


class Session(Protocol):
    """One loaded graph."""

    def run(self, feeds: Mapping[str, DeviceTensor | Array]) -> dict[str, DeviceTensor]:
        """Run the graph on all its inputs by name (contract.py) and return all its outputs, left on the device.

        An input is an array of the contract's dtype or a device tensor of this backend, also another session's output. When
        `run` returns, the outputs are computed. Raises DependencyError where memory runs out.
        """
        ...

    def refit(self, weights: Mapping[str, Array]) -> None:
        """Put `weights` in place of the graph's initializers of these names; every other one stays as it is.

        Arrays have the shape and dtype that is stored, bfloat16 as the bits in uint16, and may be read-only maps. The next `run`
        uses them. Raises ArtifactError where the graph is loaded in a form that cannot take them, DependencyError where memory
        runs out; the session then holds what it held before.
        """
        ...


class Backend(Protocol):
    """Loads graphs of one bundle. `device` is "cpu" or "cuda"."""

    name: str
    device: str

    def load(self, graph: str) -> Session:
        """Check the graph's files against the manifest and load it. Raises ArtifactError, or DependencyError out of memory."""
        ...

    def to_device(self, array: Array) -> DeviceTensor:
        """The tensor of `array`, to feed more than once. It may share the array's memory."""
        ...

    def to_host(self, value: DeviceTensor | Array) -> Array:
        """The values of a float32 or integer tensor. The result may share the tensor's memory: do not write to it."""
        ...


Loader = Callable[[Path, Manifest], Backend]

AUTO = "auto"


def _onnxruntime(bundle: Path, manifest: Manifest) -> Backend:
    from sana_export.runtime.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(bundle, manifest)


def _engines(name: str) -> Loader:
    def load(bundle: Path, manifest: Manifest) -> Backend:
        raise DependencyError(
            "running TensorRT engines is not part of this version of sana-export yet",
            found=f"backend {name}",
            wanted=" or ".join((AUTO, *RUNNABLE)),
            fix="--backend onnxruntime",
        )

    return load


#: Every backend by its name on the command line.
BACKENDS: dict[str, Loader] = {
    "onnxruntime": _onnxruntime,
    "tensorrt": _engines("tensorrt"),
    "tensorrt-rtx": _engines("tensorrt-rtx"),
}
#: Those that can run a bundle, the best first: what "auto" takes its choice from.
RUNNABLE = ("onnxruntime",)


def open_backend(name: str, bundle: Path, manifest: Manifest) -> Backend:
    """The backend `name` of `BACKENDS`, or for "auto" the best one that can run here, ready to load graphs of `bundle`.

    Raises UsageError for an unknown name, DependencyError where the backend's package is missing, ArtifactError where the
    bundle's precision cannot run on it.
    """
    name = RUNNABLE[0] if name == AUTO else name
    if name not in BACKENDS:
        raise UsageError(f"there is no backend named {name!r}", wanted=", ".join((AUTO, *BACKENDS)), fix=f"--backend {AUTO}")
    return BACKENDS[name](bundle, manifest)
