"""One engine on the device: loads it, checks it with its module, creates its execution context, and runs it.

The module (`tensorrt` or `tensorrt_rtx`) is a value. Features that only one of them or a later version has are used if `hasattr`
finds them. Sources: NVIDIA's TensorRT and TensorRT-RTX documentation and the installed TensorRT-RTX 1.7. This code needs a GPU
and has not been run on one: the tests use a module of the same interface that runs the ONNX file
(tests/support/host_tensorrt.py).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sana_export.cuda_errors import OUT_OF_MEMORY, find_failure
from sana_export.errors import ArtifactError, DependencyError, SanaExportError
from sana_export.files import write_whole
from sana_export.manifest import EngineEntry
from sana_export.runtime.backends.cuda import Device, Memory
from sana_export.runtime.backends.weight_streaming import set_weight_budget, streams_weights
from sana_export.trt.logger import CollectedLog, logger_for

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ContextSettings:
    """How TensorRT-RTX runs a graph. TensorRT has neither setting. Chosen from NVIDIA's documentation, not measured yet."""

    #: When kernels for the current shapes are compiled: before the first run ("EAGER") or during it ("LAZY").
    specialization: str
    #: The context captures its own work. Off for graphs whose work the runtime captures.
    cuda_graph: bool


#: The runtime captures the graphs of the sampling loop, with the kernels that exist at that time.
IN_THE_LOOP = ContextSettings("EAGER", cuda_graph=False)
ELSEWHERE = ContextSettings("LAZY", cuda_graph=True)
SETTINGS = {"denoiser": IN_THE_LOOP, "sampler": IN_THE_LOOP}

#: The module's `EngineInvalidityDiagnostics` by name: what is wrong, the type of the error, what is wanted, and the fix.
_INVALID: dict[str, tuple[str, type[SanaExportError], str, str]] = {
    "VERSION_MISMATCH": ("it is from another version", ArtifactError, "an engine of this version", "{build}"),
    "UNSUPPORTED_CC": ("it is for another GPU", ArtifactError, "an engine for this GPU's compute capability", "{build}"),
    "OLD_CUDA_DRIVER": ("the driver is too old", DependencyError, "a newer NVIDIA driver", "update NVIDIA's driver"),
    "OLD_CUDA_RUNTIME": ("the CUDA runtime is too old", DependencyError, "a newer CUDA runtime", "update NVIDIA's driver"),
    "INSUFFICIENT_GPU_MEMORY": ("out of memory while loading", DependencyError, "more free GPU memory", "--memory staged"),
    "MALFORMED_ENGINE": ("it is damaged", ArtifactError, "a complete engine", "{build}"),
    "CUDA_ERROR": ("CUDA does not work here", DependencyError, "an NVIDIA GPU and its driver", "sana-export doctor"),
}


class SharedMemory:
    """The block of device memory that all engines use for activations. It grows to the size that the largest engine needs."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._memory: Memory | None = None
        #: The number of times that the block has moved.
        self.generation = 0

    def reserve(self, size: int) -> Memory:
        """The block, with at least `size` bytes. May move it."""
        if self._memory is None or self._memory.size < size:
            self._memory = None  # free the old block before allocating the new one
            self.generation += 1
            self._memory = self._device.allocate(size)
        return self._memory


class LoadedEngine:
    """The engine of `entry`, loaded from the file `path`. `build` is the command that builds it again.

    Raises ArtifactError if the module refuses it, and DependencyError if the driver is missing or memory runs out.
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
        self._cache: Any = None
        self._cache_path = cache_path(path, device.name)
        self._cached_bytes = 0
        device.enter()
        with self._logger.collect() as log:
            self._runtime = module.Runtime(self._logger)
            content = np.memmap(path, np.uint8, "r")
            self._check_valid(content)
            #: The module's `ICudaEngine`.
            self.engine = self._runtime.deserialize_cuda_engine(content)
            if self.engine is None:
                raise self._failed("loading", log)
            self._streams = stream_weights and bool(entry.options.get("weight_streaming"))
            if self._streams:
                if not set_weight_budget(self.engine, device.free_bytes()):
                    raise self._failed("streaming the weights of", log)
                self._streams = streams_weights(self.engine)
            self._context = self._create_context(log)
        self._shapes: dict[str, tuple[int, ...]] = {}
        # Memory is reserved for the current shapes, not for the largest shapes of the profile.
        self._exact = hasattr(self._context, "update_device_memory_size_for_shapes")
        self._needed = 0
        self._generation = -1

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Set the shapes of all inputs and reserve the memory that a run needs."""
        if shapes != self._shapes:
            self._shapes = {}  # if one is refused, the context has a mix of old and new ones
            with self._logger.collect() as log:
                refused = [name for name, shape in shapes.items() if not self._context.set_input_shape(name, shape)]
                if refused:
                    raise self._failed("shaping " + ", ".join(f"{name} {shapes[name]}" for name in refused), log)
            self._shapes = dict(shapes)
            size_for = (
                self._context.update_device_memory_size_for_shapes if self._exact else lambda: self.engine.device_memory_size_v2
            )
            self._needed = size_for()
            self._generation = -1
        if self._generation != self._memory.generation:
            try:
                block = self._memory.reserve(self._needed)
            except DependencyError as error:
                raise self._out_of_memory("running", error.found) from error
            self._context.set_device_memory(block.address, block.size)
            self._generation = self._memory.generation

    def output_shape(self, name: str) -> tuple[int, ...]:
        """The shape of an output for the current shapes of the inputs."""
        return tuple(self._context.get_tensor_shape(name))

    def run(self, addresses: Mapping[str, int]) -> None:
        """Enqueue one run with its tensors at `addresses`."""
        with self._logger.collect() as log:
            for name, address in addresses.items():
                if not self._context.set_tensor_address(name, address):
                    raise self._failed(f"binding {name} of", log)
            if not self._context.execute_async_v3(self._device.stream):
                raise self._failed("running", log)

    @property
    def capturable(self) -> bool:
        """Whether a run can be captured in a CUDA graph. TensorRT, which has no such question, can unless weights are streamed."""
        if self._streams:
            return False
        if not hasattr(self._context, "is_stream_capturable"):
            return True
        return bool(self._context.is_stream_capturable(self._device.stream))

    def save_cache(self) -> None:
        """Save the kernels that were compiled for this GPU next to the engine, if there are new ones."""
        if self._cache is None:
            return
        content = memoryview(self._cache.serialize())
        if content.nbytes <= self._cached_bytes:
            return
        try:
            write_whole(self._cache_path, content)
        except DependencyError as error:  # the cache only saves time
            LOG.warning("the compiled kernels of %s were not saved: %s; %s", self.entry.graph, error.message, error.found)
        self._cached_bytes = content.nbytes

    def _create_context(self, log: CollectedLog) -> Any:
        strategy = self._module.ExecutionContextAllocationStrategy.USER_MANAGED
        if hasattr(self.engine, "create_runtime_config"):
            config = self.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            self._configure(config)
            context = self.engine.create_execution_context(config)
        else:
            context = self.engine.create_execution_context(strategy)
        if context is None:
            raise self._failed("loading", log)
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
            with contextlib.suppress(OSError):  # no cache yet
                content = self._cache_path.read_bytes()
                if self._cache.deserialize(content):
                    self._cached_bytes = len(content)
                else:
                    LOG.info("%s: the cached kernels are for another GPU or driver and will be compiled again", self.entry.graph)
            config.set_runtime_cache(self._cache)

    def _check_valid(self, content: Any) -> None:
        """Ask the module about the engine before loading it, if this version can tell."""
        if not hasattr(self._runtime, "get_engine_validity"):
            return
        validity, diagnostics = self._runtime.get_engine_validity(content)
        if validity != self._module.EngineValidity.INVALID:
            return
        members = self._module.EngineInvalidityDiagnostics.__members__
        found = [name for name, member in members.items() if int(diagnostics) & int(member)]
        if not found:  # loading the engine will say why
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

    def _failed(self, doing: str, log: CollectedLog) -> SanaExportError:
        """The error for what the module logged."""
        found = "; ".join(log.errors)
        failure = find_failure(found)
        if failure is OUT_OF_MEMORY:
            return self._out_of_memory(doing, found)
        if failure is not None:  # not the engine's fault
            return DependencyError(
                f"{doing} the engine of {self.entry.graph} failed: CUDA does not work here",
                found=found,
                wanted=f"{failure.wanted}, for {self._module.__name__} {self._module.__version__}",
                fix=failure.fix,
            )
        return ArtifactError(
            f"{doing} the engine of {self.entry.graph} failed in {self._module.__name__} {self._module.__version__}",
            found=found or "no reason given",
            wanted=f"an engine that runs on {self._device.name}",
            fix=self._build,
        )

    def _out_of_memory(self, doing: str, found: object) -> DependencyError:
        return DependencyError(
            f"out of GPU memory while {doing} the engine of {self.entry.graph}",
            found=f"{found}; {self._device.free_bytes()} bytes free",
            wanted=OUT_OF_MEMORY.wanted,
            fix=OUT_OF_MEMORY.fix,
        )


def _made(entry: EngineEntry) -> str:
    target = ", ".join(entry.compute_capabilities) or "every supported GPU"
    return f"with {entry.backend} {entry.backend_version} for {target}"


def cache_path(engine: Path, gpu: str) -> Path:
    """The file of the kernels that were compiled for the GPU of that name, in the engine's folder."""
    name = "".join(character if character.isalnum() else "-" for character in gpu.lower())
    return engine.with_suffix(f".{name}.cache")
