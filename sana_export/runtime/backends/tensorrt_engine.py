"""One engine on the device: read, checked by its module, given an execution context and memory, run.

The module (`tensorrt` or `tensorrt_rtx`) comes as a value, and what only one of them or a later version offers is asked for with
`hasattr`. Sources: NVIDIA's TensorRT and TensorRT-RTX documentation and the installed TensorRT-RTX 1.7. What runs here needs a GPU
and has not been run on one: the tests use a module of the same interface that runs the ONNX file (tests/support/host_tensorrt.py).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sana_export.errors import ArtifactError, DependencyError, SanaExportError
from sana_export.files import partial_path
from sana_export.manifest import EngineEntry
from sana_export.runtime.backends.cuda import Device, Memory
from sana_export.trt.logger import logger_for

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ContextSettings:
    """How TensorRT-RTX runs a graph; TensorRT knows neither. Chosen by what NVIDIA documents, not measured yet.

    `specialization`: kernels for the shapes at hand are compiled before the first run ("EAGER") or beside it ("LAZY").
    `cuda_graph`: the context captures its own work; not where the runtime captures the whole loop.
    """

    specialization: str
    cuda_graph: bool


#: The graphs of the loop are captured by the runtime, with the kernels that are there then.
IN_THE_LOOP = ContextSettings("EAGER", cuda_graph=False)
ELSEWHERE = ContextSettings("LAZY", cuda_graph=True)
SETTINGS = {"denoiser": IN_THE_LOOP, "sampler": IN_THE_LOOP}

#: The module's `EngineInvalidityDiagnostics` by name: what is wrong, the error that it is, what is wanted, and what mends it.
_INVALID: dict[str, tuple[str, type[SanaExportError], str, str]] = {
    "VERSION_MISMATCH": ("it is of another version", ArtifactError, "an engine of this version", "{build}"),
    "UNSUPPORTED_CC": ("it is for another GPU", ArtifactError, "an engine for this GPU's compute capability", "{build}"),
    "OLD_CUDA_DRIVER": ("the driver is too old", DependencyError, "a newer NVIDIA driver", "update NVIDIA's driver"),
    "OLD_CUDA_RUNTIME": ("the CUDA runtime is too old", DependencyError, "a newer CUDA runtime", "update NVIDIA's driver"),
    "INSUFFICIENT_GPU_MEMORY": ("out of memory while loading", DependencyError, "more free GPU memory", "--memory staged"),
    "MALFORMED_ENGINE": ("it is damaged", ArtifactError, "a whole engine", "{build}"),
    "CUDA_ERROR": ("CUDA does not work here", DependencyError, "an NVIDIA GPU and its driver", "sana-export doctor"),
}
_OUT_OF_MEMORY = ("out of memory", "outofmemory", "out_of_memory", "cudaerror 2:", "insufficient memory")
#: What the CUDA runtime says of a driver that is missing or older than it.
_DRIVER = "driver version is insufficient"


class SharedMemory:
    """The one block of device memory that all engines work in; it grows to what the largest asks for."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._memory: Memory | None = None
        #: How often the block has moved.
        self.generation = 0

    def reserve(self, size: int) -> Memory:
        """The block, at least `size` bytes long."""
        if self._memory is None or self._memory.size < size:
            self._memory = None  # the old block is given back before the new one is taken
            self.generation += 1
            self._memory = self._device.allocate(size)
        return self._memory


class LoadedEngine:
    """The engine of `entry`, whose file is `path`, ready to run. `build` is the line that builds it again.

    Raises ArtifactError where the module refuses it, DependencyError where the driver or memory is lacking.
    """

    def __init__(
        self,
        module: Any,
        device: Device,
        memory: SharedMemory,
        entry: EngineEntry,
        path: Path,
        *,
        build: str,
        stream_weights: bool = False,
    ) -> None:
        self.entry, self._module, self._device, self._memory = entry, module, device, memory
        self._build, self._logger = build, logger_for(module)
        self._logger.errors.take()
        device.enter()
        self._runtime = module.Runtime(self._logger)
        content = np.memmap(path, np.uint8, "r")
        self._check_valid(content)
        self.engine = self._runtime.deserialize_cuda_engine(content)
        if self.engine is None:
            raise self._failed("loading")
        if stream_weights and entry.options.get("weight_streaming"):
            self.engine.weight_streaming_budget_v2 = self.engine.get_weight_streaming_automatic_budget()
        self._cache: Any = None
        self._cache_path = cache_path(path, device.name)
        self._cached_bytes = 0
        self.context = self._create_context()
        self._shapes: dict[str, tuple[int, ...]] = {}
        #: Memory is asked for by the shapes at hand, not for the largest of the profile.
        self._exact = hasattr(self.context, "update_device_memory_size_for_shapes")
        self._needed = 0
        self._generation = -1

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Settle the shapes of all inputs and the memory that the run of them works in."""
        if shapes != self._shapes:
            refused = [name for name, shape in shapes.items() if not self.context.set_input_shape(name, shape)]
            if refused:
                raise self._failed("shaping " + ", ".join(f"{name} {shapes[name]}" for name in refused))
            self._shapes = dict(shapes)
            size_for = (
                self.context.update_device_memory_size_for_shapes if self._exact else lambda: self.engine.device_memory_size_v2
            )
            self._needed = size_for()
            self._generation = -1
        if self._generation != self._memory.generation:
            try:
                block = self._memory.reserve(self._needed)
            except DependencyError as error:
                raise self._out_of_memory("running", error.found) from error
            if self._exact:
                self.context.device_memory = block.address
            else:
                self.context.set_device_memory(block.address, block.size)
            self._generation = self._memory.generation

    def output_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.context.get_tensor_shape(name))

    def run(self, addresses: Mapping[str, int]) -> None:
        """Enqueue one run with its tensors at `addresses`."""
        for name, address in addresses.items():
            if not self.context.set_tensor_address(name, address):
                raise self._failed(f"binding {name} of")
        if not self.context.execute_async_v3(self._device.stream):
            raise self._failed("running")

    @property
    def capturable(self) -> bool:
        """Whether a run can be captured in a CUDA graph; TensorRT's can."""
        asks = getattr(self.context, "is_stream_capturable", None)
        return True if asks is None else bool(asks(self._device.stream))

    def save_cache(self) -> None:
        """Keep what was compiled for this GPU beside the engine, where there is more of it than was read."""
        if self._cache is None:
            return
        content = memoryview(self._cache.serialize())
        if content.nbytes <= self._cached_bytes:
            return
        try:
            partial = partial_path(self._cache_path)
            partial.write_bytes(content)
            partial.replace(self._cache_path)
        except OSError as error:  # it only saves time
            LOG.warning("the compiled kernels of %s were not kept: %s", self.entry.graph, error)
        self._cached_bytes = content.nbytes

    def _create_context(self) -> Any:
        strategy = self._module.ExecutionContextAllocationStrategy.USER_MANAGED
        if hasattr(self.engine, "create_runtime_config"):
            config = self.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            self._configure(config)
            context = self.engine.create_execution_context(config)
        else:
            context = self.engine.create_execution_context(strategy)
        if context is None:
            raise self._failed("loading")
        return context

    def _configure(self, config: Any) -> None:
        settings = SETTINGS.get(self.entry.graph, ELSEWHERE)
        if hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):
            strategies = self._module.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = getattr(strategies, settings.specialization)
        if hasattr(config, "cuda_graph_strategy"):
            strategies = self._module.CudaGraphStrategy
            config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if settings.cuda_graph else strategies.DISABLED
        if hasattr(config, "create_runtime_cache"):
            self._cache = config.create_runtime_cache()
            with contextlib.suppress(OSError):  # there is none yet
                content = self._cache_path.read_bytes()
                if self._cache.deserialize(content):
                    self._cached_bytes = len(content)
                else:
                    LOG.info("%s: kernels that were compiled on another GPU or driver are compiled again", self.entry.graph)
            config.set_runtime_cache(self._cache)

    def _check_valid(self, content: Any) -> None:
        """Ask the module about the engine before it is loaded, where it can tell."""
        if not hasattr(self._runtime, "get_engine_validity"):
            return
        validity, diagnostics = self._runtime.get_engine_validity(content)
        if validity != self._module.EngineValidity.INVALID:
            return
        members = self._module.EngineInvalidityDiagnostics.__members__
        found = [name for name, member in members.items() if int(diagnostics) & int(member)]
        if not found:  # it does not say why: loading it will
            return
        what, kind, wanted, fix = _INVALID.get(
            found[0], ("its module refuses it", ArtifactError, "an engine that runs here", "{build}")
        )
        raise kind(
            f"the engine of {self.entry.graph} cannot be loaded: {what}",
            found=f"{', '.join(found)}: built {_made(self.entry)}, here is {self._module.__version__} on {self._device.name}"
            f" (compute capability {self._device.compute_capability})",
            wanted=wanted,
            fix=fix.format(build=self._build),
        )

    def _failed(self, doing: str) -> SanaExportError:
        lines = self._logger.errors.take()
        if any(word in line.lower() for line in lines for word in _OUT_OF_MEMORY):
            return self._out_of_memory(doing, "; ".join(lines))
        if any(_DRIVER in line.lower() for line in lines):
            return DependencyError(
                f"{doing} the engine of {self.entry.graph} failed: NVIDIA's driver is missing or too old",
                found="; ".join(lines),
                wanted=f"a driver for {self._module.__name__} {self._module.__version__}",
                fix="install or update NVIDIA's driver; sana-export doctor shows the one here",
            )
        return ArtifactError(
            f"{doing} the engine of {self.entry.graph} failed in {self._module.__name__} {self._module.__version__}",
            found="; ".join(lines) or "no reason given",
            wanted=f"an engine that runs on {self._device.name}",
            fix=self._build,
        )

    def _out_of_memory(self, doing: str, found: object) -> DependencyError:
        return DependencyError(
            f"out of GPU memory while {doing} the engine of {self.entry.graph}",
            found=f"{found}; {self._device.free_bytes()} bytes free",
            wanted="more free GPU memory",
            fix="take --memory staged, ask for fewer images at once or a smaller size, or close what else uses the GPU",
        )


def _made(entry: EngineEntry) -> str:
    target = ", ".join(entry.compute_capabilities) or "every supported GPU"
    return f"with {entry.backend} {entry.backend_version} for {target}"


def cache_path(engine: Path, gpu: str) -> Path:
    """Where the kernels lie that were compiled for the GPU of that name: beside the engine."""
    name = "".join(character if character.isalnum() else "-" for character in gpu.lower())
    return engine.with_suffix(f".{name}.cache")
