"""TensorRT and TensorRT-RTX: runs a bundle's engines on a GPU. Tensors stay there, and all work is enqueued to one stream.

Both share one implementation; the Python module is a value. `cuda.py`, `tensorrt_engine.py` and `tensorrt_context.py` talk to the
GPU.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sana_export.commands import engines_command, export_command
from sana_export.errors import ArtifactError, UsageError
from sana_export.formats.arrays import Array
from sana_export.formats.dtypes import DTYPES
from sana_export.known_files import check_known_files
from sana_export.manifest import EngineEntry, Manifest
from sana_export.profiles import explain_outside
from sana_export.runtime.backends.base import (
    DEFAULT_SETTINGS,
    BackendSettings,
    CapturingBackend,
    DeviceTensor,
    EnqueuedSession,
    Replay,
)
from sana_export.runtime.backends.cuda import ALIGNMENT, CudaDevice, Device
from sana_export.runtime.backends.device_arrays import DeviceArray, DeviceTable
from sana_export.runtime.backends.tensorrt_context import EngineContext, SharedMemory
from sana_export.runtime.backends.tensorrt_engine import LoadedEngine
from sana_export.runtime.backends.tensorrt_options import EngineOptions
from sana_export.runtime.backends.tensorrt_refit import EngineWeights
from sana_export.runtime.memory import choose_memory_mode, memory_requirements
from sana_export.runtime.prompt import PromptEmbeddings
from sana_export.trt.compatibility import Host, detect_host
from sana_export.trt.flavour import load
from sana_export.trt.selection import runnable, typical_axes

LOG = logging.getLogger(__name__)


class GraphEngines:
    """The loaded engines of one graph, and the weights of those that are refittable."""

    def __init__(self, backend: TensorRTBackend, graph: str) -> None:
        self._backend, self._graph = backend, graph
        #: The loaded engines by key.
        self.loaded: dict[str, LoadedEngine] = {}
        # Save the kernels that were compiled for this GPU when the last session of the graph or the process ends.
        weakref.finalize(self, _save_caches, self.loaded)
        # The weights of refittable engines, by the engine's key.
        self._weights: dict[str, EngineWeights] = {}
        # What `refit` changed, for engines that are loaded later.
        self._changed: dict[str, Array] = {}

    def engine(self, entry: EngineEntry) -> LoadedEngine:
        """The engine of `entry`, loaded and with its weights."""
        if entry.key not in self.loaded:
            engine = self._backend.load_engine(entry)
            if entry.refittable:
                weights = self._backend.engine_weights(self._graph, engine)
                weights.fill(self._changed)
                self._weights[entry.key] = weights
            self.loaded[entry.key] = engine
        return self.loaded[entry.key]

    def covering(self, axes: Mapping[str, int]) -> LoadedEngine:
        """The engine for inputs with these `axes`. Raises UsageError if there is none."""
        entry = self._backend.engines.engine_for(self._graph, axes, refittable=bool(self._changed))
        if entry is None:
            engines = self._backend.engines.engines[self._graph]
            # After a refit, an engine may cover the shapes but have fixed weights.
            why = [f"{entry.profile}: {explain_outside(entry.ranges, axes) or 'its weights are fixed'}" for entry in engines]
            raise UsageError(
                f"no {self._backend.name} engine of {self._graph} covers this request",
                found="; ".join(why),
                wanted="a request within one of these",
                fix=engines_command(self._backend.bundle, self._backend.name),
            )
        return self.engine(entry)

    def refit(self, weights: Mapping[str, Array]) -> None:
        """Refit every loaded engine, or none of them. Engines that are loaded later get the weights too.

        From now on only refittable engines run.
        """
        self._backend.check_refit(self._graph)
        if not self._weights:
            self.engine(self._backend.engines.refittable(self._graph)[0])
        self._backend.gpu.wait()  # an engine must not change while its work is running
        before = {name: self._changed.get(name) for name in weights}
        done: list[EngineWeights] = []
        try:
            for engine in self._weights.values():
                engine.refit(weights)
                done.append(engine)
        except BaseException:
            for engine in done:
                engine.refit({name: engine.own[name] if value is None else value for name, value in before.items()})
            raise
        self._changed |= weights


class EngineSession(EnqueuedSession):
    """One graph, in execution contexts that no other session uses. Each run uses the engine for its shapes.

    An engine is loaded, and its context made, when it is first needed.
    """

    def __init__(self, backend: TensorRTBackend, graph: str, engines: GraphEngines) -> None:
        self._backend, self._graph, self._engines = backend, graph, engines
        self._spec = backend.manifest.graphs[graph].spec
        self._contexts: dict[str, EngineContext] = {}
        self._last: EngineContext | None = None

    def run(
        self, feeds: Mapping[str, DeviceTensor | Array], outputs: Mapping[str, DeviceTensor] | None = None
    ) -> dict[str, DeviceTensor]:
        backend = self._backend
        values = {name: backend.to_device(value) for name, value in feeds.items()}
        context = self._last = self._shaped({name: value.shape for name, value in values.items()})
        found = {
            tensor.name: (outputs or {}).get(tensor.name) or backend.empty(context.output_shape(tensor.name), tensor.dtype)
            for tensor in self._spec.outputs
        }
        context.run(values, found)
        return found

    @property
    def capturable(self) -> bool:
        return self._last is not None and self._last.capturable

    def separate(self) -> EngineSession:
        return EngineSession(self._backend, self._graph, self._engines)

    def reserve(self, axes: Mapping[str, int]) -> None:
        self._shaped(
            {
                tensor.name: tuple(axis if isinstance(axis, int) else axes[axis] for axis in tensor.shape)
                for tensor in self._spec.inputs
            }
        )

    def refit(self, weights: Mapping[str, Array]) -> None:
        self._engines.refit(weights)

    @property
    def loaded(self) -> Mapping[str, LoadedEngine]:
        """The loaded engines of the graph by key."""
        return self._engines.loaded

    def _shaped(self, shapes: Mapping[str, tuple[int, ...]]) -> EngineContext:
        """A context of the engine for inputs of these shapes, with these shapes and the memory for them."""
        axes = {
            axis: length
            for tensor in self._spec.inputs
            for axis, length in zip(tensor.shape, shapes[tensor.name], strict=True)
            if isinstance(axis, str)
        }
        engine = self._engines.covering(axes)
        if engine.entry.key not in self._contexts:
            self._contexts[engine.entry.key] = EngineContext(engine, self._backend.gpu, self._backend.shared)
        context = self._contexts[engine.entry.key]
        context.shape(shapes)
        return context


def _save_caches(loaded: Mapping[str, LoadedEngine]) -> None:
    for engine in loaded.values():
        engine.save_cache()


class TensorRTBackend(CapturingBackend):
    """The engines of `bundle` for the backend `name` ("tensorrt" or "tensorrt-rtx").

    By default, `module` is imported, `device` is opened and `machine` is detected. Raises ArtifactError, with the reasons, if the
    engines do not run on this machine, and DependencyError if the module, the driver or the GPU is missing.
    """

    device = "cuda"

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        name: str,
        settings: BackendSettings = DEFAULT_SETTINGS,
        *,
        module: Any = None,
        device: Device | None = None,
        machine: Host | None = None,
    ) -> None:
        self._options = EngineOptions.parse(settings.options, name)
        self.text_multiple = self._options.text_multiple
        self.bundle, self.manifest, self.name = bundle, manifest, name
        self.engines = runnable(bundle, manifest, name, machine or detect_host(settings.device))
        self._module = load(name) if module is None else module
        self.index = settings.device or 0
        self.gpu = CudaDevice(self.index) if device is None else device
        self.shared = SharedMemory(self.gpu)
        self._stream_weights = False

    def load(self, graph: str) -> EngineSession:
        typical = typical_axes(self.manifest.model)
        if not self.engines.engines.get(graph):
            self.engines.check_supported([graph], typical)
        engines = GraphEngines(self, graph)
        engines.engine(self.engines.engine_for(graph, typical) or self.engines.engines[graph][0])
        return EngineSession(self, graph, engines)

    def load_engine(self, entry: EngineEntry) -> LoadedEngine:
        """Check an engine's file and load it."""
        build = engines_command(self.bundle, self.name)
        (path,) = check_known_files(self.bundle, [entry.file], fix=build)
        settings = self._options.settings(entry.graph)
        return LoadedEngine(
            self._module, self.gpu, entry, path, settings=settings, build=build, stream_weights=self._stream_weights
        )

    def engine_weights(self, graph: str, engine: LoadedEngine) -> EngineWeights:
        """The weights of an engine of `graph`, not set yet."""
        export, build = export_command(self.bundle, self.manifest), self._refittable_line(graph)
        return EngineWeights(self._module, engine.engine, self.manifest.graphs[graph], self.bundle, export=export, build=build)

    def _refittable_line(self, graph: str) -> str:
        return engines_command(self.bundle, self.name, "--graphs", graph, "--refittable")

    def check_refit(self, graph: str) -> None:
        if not self.engines.refittable(graph):
            raise ArtifactError(
                f"the weights of {graph} are inside its engines and cannot be changed",
                found=f"engines for {', '.join(entry.profile for entry in self.engines.engines[graph])} without --refittable",
                wanted="an engine that was built with --refittable",
                fix=self._refittable_line(graph),
            )

    def to_device(self, array: Any) -> DeviceArray:
        if isinstance(array, DeviceArray):
            return array
        target = self.empty(array.shape, str(array.dtype))
        self.gpu.upload(target.address, array)
        return target

    def to_host(self, value: DeviceTensor | Array) -> Array:
        if isinstance(value, np.ndarray):
            return value
        host = np.empty(value.shape, value.dtype)
        self.gpu.download(value.address, host)
        return host

    def gather(self, embeddings: PromptEmbeddings) -> DeviceArray:
        """Rows are copied within the device. Only those of the instruction come from the host."""
        target = self.zeros(embeddings.shape, "float32")
        _, batch, length, channels = embeddings.shape
        row_bytes = channels * DTYPES["float32"].bytes
        sources = {key: self.to_device(source) for key, source in embeddings.sources.items()}
        for rows in embeddings.rows:
            source = sources[id(rows.source)]
            branch, number, first = rows.place
            place = ((branch * batch + number) * length + first) * row_bytes
            begin = (rows.item * source.shape[1] + rows.start) * row_bytes
            self.gpu.copy(target.address + place, source.address + begin, (rows.stop - rows.start) * row_bytes)
        return target

    def record_event(self) -> Any:
        return self.gpu.record_event()

    def seconds(self, start: Any, end: Any) -> float:
        return self.gpu.seconds(start, end)

    def choose_memory_mode(self, mode: str) -> str:
        wanted = memory_requirements(self.manifest, self.engines.typical(self.manifest.model))
        chosen, warning = choose_memory_mode(mode, wanted, self.gpu.free_bytes(), self.bundle, self.name)
        if warning:
            LOG.warning("%s", warning)
        self._stream_weights = chosen == "streaming"
        return chosen

    def check_supported(self, graphs: Iterable[str], axes: Mapping[str, int]) -> None:
        self.engines.check_supported(graphs, axes)

    def ranges(self, graph: str) -> Mapping[str, tuple[int, int, int]] | None:
        if graph not in self.engines.engines:
            return None
        typical = self.engines.engine_for(graph, typical_axes(self.manifest.model)) or self.engines.engines[graph][0]
        return typical.ranges

    def wait(self) -> None:
        self.gpu.wait()

    def release_memory(self) -> None:
        self.shared.release()
        self.gpu.trim()

    def empty(self, shape: Sequence[int], dtype: str) -> DeviceArray:
        """A new tensor with undefined values."""
        shape = tuple(shape)
        memory = self.gpu.allocate(math.prod(shape) * DTYPES[dtype].bytes)
        return DeviceArray(memory.address, shape, dtype, memory)

    def zeros(self, shape: Sequence[int], dtype: str) -> DeviceArray:
        target = self.empty(shape, dtype)
        self.gpu.clear(target.address, target.nbytes)
        return target

    def table(self, rows: int, shape: Sequence[int], dtype: str) -> DeviceTable:
        stride = -(-math.prod(shape) * DTYPES[dtype].bytes // ALIGNMENT) * ALIGNMENT
        return DeviceTable(self.gpu.allocate(rows * stride), rows, stride, tuple(shape), dtype)

    def leading(self, value: DeviceArray, count: int) -> DeviceArray:
        return replace(value, shape=(count, *value.shape[1:]))

    def write(self, target: DeviceArray, value: DeviceTensor | Array) -> None:
        if tuple(value.shape) != tuple(target.shape):
            raise ValueError(f"a tensor of shape {tuple(target.shape)} cannot take one of shape {tuple(value.shape)}")
        if isinstance(value, DeviceArray):
            self.gpu.copy(target.address, value.address, target.nbytes)
        else:
            self.gpu.upload(target.address, np.asarray(value, dtype=target.dtype))

    def write_table(self, target: Sequence[DeviceArray], rows: Array) -> None:
        assert isinstance(target, DeviceTable)
        padded = np.zeros((len(target), target.stride), dtype=np.uint8)
        content = np.ascontiguousarray(rows, dtype=target[0].dtype).reshape(len(target), -1).view(np.uint8)
        padded[:, : content.shape[1]] = content
        self.gpu.upload(target.memory.address, padded)

    def copy(self, value: DeviceArray) -> DeviceArray:
        target = self.empty(value.shape, value.dtype)
        self.gpu.copy(target.address, value.address, target.nbytes)
        return target

    def capture(self, work: Callable[[], None]) -> Replay:
        return self.gpu.capture(work)

    @property
    def generation(self) -> int:
        return self.shared.generation
