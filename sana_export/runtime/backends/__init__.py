"""What executes a bundle's graphs: one table of backends behind two small interfaces."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

from sana_export.errors import ArtifactError, DependencyError, UsageError
from sana_export.manifest import Manifest

if TYPE_CHECKING:
    from sana_export.runtime.prompt import PromptEmbeddings

log = logging.getLogger(__name__)

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
    """Loads graphs of one bundle. `device` is "cpu" or "cuda". What has a body here is right for a backend that waits for its work.

    A backend whose sessions only enqueue their work also is a `Capturing` one (runtime/sampling.py).
    """

    name: str
    device: str
    #: Kept text tokens are filled up to a multiple of this, so that shapes come back from prompt to prompt.
    text_multiple: int = 1

    def load(self, graph: str) -> Session:
        """Check the graph's files against the manifest and load it. Raises ArtifactError, or DependencyError out of memory."""
        ...

    def to_device(self, array: Array) -> DeviceTensor:
        """The tensor of `array`, to feed more than once. It may share the array's memory."""
        ...

    def to_host(self, value: DeviceTensor | Array) -> Array:
        """The values of a float32 or integer tensor. The result may share the tensor's memory: do not write to it."""
        ...

    def gather(self, embeddings: PromptEmbeddings) -> DeviceTensor | Array:
        """prompt_embeds float32 [K, B, L, C] from the rows of the text encoder's outputs."""
        return embeddings.gather(self.to_host)

    def mark(self) -> Any:
        """A point in the order of the work, for `seconds`."""
        return perf_counter()

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks. Waits for the work before `end`."""
        return float(end - start)

    def settle_memory(self, mode: str) -> str:
        """The mode of `MEMORY_MODES` to run in where `mode` is asked for; "auto" never comes back.

        Raises UsageError where the backend has no such mode, DependencyError where the GPU is too small for it.
        """
        if mode == "streaming":
            raise UsageError(
                f"the backend {self.name} cannot stream weights",
                found=f"memory {mode!r}",
                wanted=", ".join(name for name in MEMORY_MODES if name != mode),
                fix="--memory staged",
            )
        return "resident" if mode == AUTO else mode

    def admit(self, graphs: Iterable[str], axes: Mapping[str, int]) -> None:
        """Raise UsageError where a request with these `axes` (contract.DYNAMIC_AXES) is beyond what `graphs` can do here."""
        return None

    def check_refit(self, graph: str) -> None:
        """Raise ArtifactError where the sessions of `graph` cannot be refitted."""
        return None

    def ranges(self, graph: str) -> Mapping[str, tuple[int, int, int]] | None:
        """min, typical and max of the axes of `graph` that are bounded here; None where there is nothing to run it with."""
        return {}

    def wait(self) -> None:
        """Until all work is done, so that what it uses may be let go."""
        return None


Loader = Callable[[Path, Manifest], Backend]

AUTO = "auto"
#: Where the graphs of a runtime are: resident, all at once; staged, those of one stage at a time (text, denoising, decoding);
#: streaming, staged with weights that stay on the host and come as they are needed. "auto" takes the first that fits.
MEMORY_MODES = (AUTO, "resident", "staged", "streaming")


def _onnxruntime(*, cuda_graphs: bool) -> Loader:
    def load(bundle: Path, manifest: Manifest) -> Backend:
        from sana_export.runtime.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(bundle, manifest, cuda_graphs=cuda_graphs)

    return load


def _torch(*, compiled: bool) -> Loader:
    def load(bundle: Path, manifest: Manifest) -> Backend:
        try:
            from sana_export.runtime.backends.torch import open_torch
        except ImportError as error:
            raise DependencyError(
                "the backend torch is not installed",
                found=error,
                wanted="PyTorch",
                fix='pip install "sana-export[export]"',
            ) from error
        return open_torch(bundle, manifest, compiled=compiled)

    return load


def _engines(name: str) -> Loader:
    def load(bundle: Path, manifest: Manifest) -> Backend:
        from sana_export.runtime.backends.tensorrt import TensorRTBackend

        return TensorRTBackend(bundle, manifest, name)

    return load


#: Every backend by its name on the command line.
BACKENDS: dict[str, Loader] = {
    "onnxruntime": _onnxruntime(cuda_graphs=False),
    "onnxruntime-cuda-graphs": _onnxruntime(cuda_graphs=True),
    "tensorrt": _engines("tensorrt"),
    "tensorrt-rtx": _engines("tensorrt-rtx"),
    "torch": _torch(compiled=False),
    "torch-compile": _torch(compiled=True),
}
#: Those that need engines which were built before, the best first, and what "auto" takes where there are none that run.
ENGINE_BACKENDS, FALLBACK = ("tensorrt", "tensorrt-rtx"), "onnxruntime"


def open_backend(name: str, bundle: Path, manifest: Manifest) -> Backend:
    """The backend `name` of `BACKENDS`, or for "auto" the best one that can run here, ready to load graphs of `bundle`.

    Raises UsageError for an unknown name, DependencyError where the backend's package is missing, ArtifactError where the
    bundle's precision cannot run on it.
    """
    name = _best(bundle, manifest) if name == AUTO else name
    if name not in BACKENDS:
        raise UsageError(f"there is no backend named {name!r}", wanted=", ".join((AUTO, *BACKENDS)), fix=f"--backend {AUTO}")
    return BACKENDS[name](bundle, manifest)


def _best(bundle: Path, manifest: Manifest) -> str:
    """The best backend that can run `bundle` here. Nothing of it is loaded."""
    from sana_export.trt.compatibility import here
    from sana_export.trt.selection import runnable

    for name in ENGINE_BACKENDS:
        if any(engine.backend == name for engine in manifest.engines):
            try:
                runnable(bundle, manifest, name, here())
            except ArtifactError as error:
                log.info("%s is not used: %s", name, error.found)
            else:
                return name
    return FALLBACK
