"""One engine on the device: loads it, checks it with its module, configures its execution contexts and keeps its compiled kernels.

The module (`tensorrt` or `tensorrt_rtx`) is a value. Features that only one of them or a later version has are used if `hasattr`
finds them. Sources: NVIDIA's TensorRT and TensorRT-RTX documentation and the installed TensorRT-RTX 1.7. This code needs a GPU
and has not been run on one: the tests use a module of the same interface that runs the ONNX file
(tests/support/host_tensorrt.py).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from sana_export.cuda_errors import OUT_OF_MEMORY, find_failure
from sana_export.errors import ArtifactError, DependencyError, SanaExportError
from sana_export.files import read_unlisted, write_whole
from sana_export.manifest import EngineEntry
from sana_export.runtime.backends.cuda import Device
from sana_export.runtime.backends.tensorrt_options import ContextSettings
from sana_export.runtime.backends.weight_streaming import set_weight_budget, streams_weights
from sana_export.trt.logger import CollectedLog, logger_for

LOG = logging.getLogger(__name__)


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


class LoadedEngine:
    """The engine of `entry`, loaded from the file `path`. `build` is the command that builds it again.

    Raises ArtifactError if the module refuses it, and DependencyError if the driver is missing or memory runs out.
    """

    def __init__(
        self,
        module: Any,
        device: Device,
        entry: EngineEntry,
        path: Path,
        *,
        settings: ContextSettings,
        build: str,
        stream_weights: bool = False,
    ) -> None:
        self.entry, self._module, self._device, self._build = entry, module, device, build
        #: How its contexts run.
        self.settings = settings
        #: Collects what the module logs.
        self.logger = logger_for(module)
        self._cache: Any = None
        self._cache_path = cache_path(path, device.name)
        self._cached_bytes = 0
        device.enter()
        with self.logger.collect() as log:
            self._runtime = module.Runtime(self.logger)
            content = np.memmap(path, np.uint8, "r")
            self._check_valid(content)
            #: The module's `ICudaEngine`.
            self.engine = self._runtime.deserialize_cuda_engine(content)
            if self.engine is None:
                raise self.failed("loading", log)
            #: Whether some of its weights come from the host in every run, which cannot be captured.
            self.streams = stream_weights and bool(entry.options.get("weight_streaming"))
            if self.streams:
                if not set_weight_budget(self.engine, device.free_bytes()):
                    raise self.failed("streaming the weights of", log)
                self.streams = streams_weights(self.engine)
        # Contexts may refer to their configuration, so it lives as long as the engine.
        self._config = self._configure()

    def create_context(self) -> Any:
        """A new `IExecutionContext` of the module, without memory to work in. The engine has all its weights by now."""
        self._device.enter()
        with self.logger.collect() as log:
            context = self.engine.create_execution_context(self._config)
            if context is None:
                raise self.failed("making an execution context of", log)
        return context

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

    def _configure(self) -> Any:
        """The module's `IRuntimeConfig` for all contexts, which share their compiled kernels."""
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._module.ExecutionContextAllocationStrategy.USER_MANAGED)
        if hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):
            strategies = self._module.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = getattr(strategies, self.settings.specialization)
        if hasattr(config, "cuda_graph_strategy"):
            strategies = self._module.CudaGraphStrategy
            config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if self.settings.cuda_graph else strategies.DISABLED
        if hasattr(config, "create_runtime_cache"):
            self._cache = config.create_runtime_cache()
            if (content := read_unlisted(self._cache_path)) is not None:
                if self._cache.deserialize(content):
                    self._cached_bytes = len(content)
                else:
                    LOG.info("%s: the cached kernels are for another GPU or driver and will be compiled again", self.entry.graph)
            config.set_runtime_cache(self._cache)
        return config

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

    def failed(self, doing: str, log: CollectedLog) -> SanaExportError:
        """The error for what the module logged."""
        found = "; ".join(log.errors)
        failure = find_failure(found)
        if failure is OUT_OF_MEMORY:
            return self.out_of_memory(doing, found)
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

    def out_of_memory(self, doing: str, found: object) -> DependencyError:
        """The error if memory ran out; `found` is what was said."""
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
