"""A module with TensorRT-RTX's interface whose engines run a bundle's ONNX files in ONNX Runtime, in the memory of a `HostDevice`.

An "engine" is a line of JSON. Every context spoils the memory that it works in, as a real one does. Names and answers are those of
the installed TensorRT-RTX 1.7; tests/trt/test_module_interface.py holds the two beside each other.

It is strict about what NVIDIA leaves undefined. Captured work fails if its context has other shapes or other memory than at the
capture. Work fails if its context, or the runtime configuration of it, is gone. A context needs an engine with all its weights.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import enum
import json
import math
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from sana_export.contract import GraphSpec
from sana_export.files import file_entry
from sana_export.formats.dtypes import DTYPES
from sana_export.manifest import EngineEntry, Manifest
from sana_export.profiles import PROFILES, Profile
from sana_export.trt.plan import dynamic_axes, onnx_sha256

VERSION = "1.7.1.116"
#: What a run works in: bytes for each element of its inputs.
WORK_FACTOR = 3


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity


class EngineValidity(enum.IntEnum):
    VALID, SUBOPTIMAL, INVALID = range(3)


class EngineInvalidityDiagnostics(enum.IntFlag):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4
    OLD_CUDA_RUNTIME = 8
    INSUFFICIENT_GPU_MEMORY = 16
    MALFORMED_ENGINE = 32
    CUDA_ERROR = 64


class ExecutionContextAllocationStrategy(enum.IntEnum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class DynamicShapesKernelSpecializationStrategy(enum.IntEnum):
    LAZY, EAGER, NONE = range(3)


class CudaGraphStrategy(enum.IntEnum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class RuntimeCache:
    def __init__(self, module: HostTensorRT) -> None:
        self.module, self.shapes = module, set[str]()

    def deserialize(self, blob: bytes) -> bool:
        content = json.loads(blob)
        if content["gpu"] != self.module.device.name:
            return False
        self.shapes |= set(content["shapes"])
        return True

    def serialize(self) -> bytes:
        return json.dumps({"gpu": self.module.device.name, "shapes": sorted(self.shapes)}).encode()


class RuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
    cuda_graph_strategy = CudaGraphStrategy.DISABLED
    allocation = ExecutionContextAllocationStrategy.STATIC
    cache: RuntimeCache | None = None

    def __init__(self, module: HostTensorRT) -> None:
        self.module = module

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.allocation = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self.module)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class Context:
    memory, memory_size = 0, 0

    def __init__(self, engine: Engine, config: RuntimeConfig) -> None:
        assert config.allocation == ExecutionContextAllocationStrategy.USER_MANAGED
        self.engine, self.config, self.module = engine, weakref.ref(config), engine.module
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.own_graph: Any = None  # what the context's own CUDA graph is for

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        (tensor,) = [tensor for tensor in self.engine.spec.inputs if tensor.name == name]
        for axis, length in zip(tensor.shape, shape, strict=True):
            lowest, _, highest = self.engine.ranges[axis] if isinstance(axis, str) else (axis, axis, axis)
            if not lowest <= length <= highest:
                return self.module.fail(f"{name}: {axis} {length} is not within {lowest} to {highest}")
        assert self.module.device.capturing is None, "a shape was set while work is captured"
        assert self.module.device.is_current, "a shape was set in a thread whose current device is another one"
        self.shapes[name] = shape
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        if self.module.cannot_size:
            return int(self.module.fail(self.module.cannot_size))
        factor = self.module.work_factors.get(self.engine.spec.name, WORK_FACTOR)
        return factor * sum(math.prod(shape) for shape in self.shapes.values())

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self.update_device_memory_size_for_shapes()
        self.memory, self.memory_size = memory, size

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        axes = {
            axis: length
            for tensor in self.engine.spec.inputs
            for axis, length in zip(tensor.shape, self.shapes[tensor.name], strict=True)
            if isinstance(axis, str)
        }
        for direction in ("height", "width"):
            for of, inner in (("image", "latent"), ("feature", "latent"), ("tile_image", "tile")):
                if (length := axes.get(f"{inner}_{direction}")) is not None:
                    axes.setdefault(f"{of}_{direction}", length * self.engine.scales[of])
            for of, inner in (("image", "latent"), ("encoded", "latent"), ("window_image", "window")):
                if (length := axes.get(f"{of}_{direction}")) is not None:
                    axes.setdefault(f"{inner}_{direction}", length // self.engine.scales[of])
        (tensor,) = [tensor for tensor in (*self.engine.spec.inputs, *self.engine.spec.outputs) if tensor.name == name]
        return tuple(axis if isinstance(axis, int) else axes[axis] for axis in tensor.shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0, name
        self.addresses[name] = address
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return self.module.capturable

    def execute_async_v3(self, stream: int) -> bool:
        device, engine = self.module.device, self.engine
        assert stream == device.stream
        assert device.is_current, "an engine runs in a thread whose current device is another one"
        if device.capturing is not None and self.module.breaks_captures:
            return self.module.fail("Error Code 1: Cuda Runtime (operation not permitted when stream is capturing)")
        if self.module.out_of_memory == "running":
            return self.module.fail("Error Code 1: Cuda Runtime (out of memory)")
        self.module.runs.append(engine.spec.name)
        self.module.shapes.append((engine.spec.name, f"{sorted(self.shapes.items())}"))
        config = self.config()
        assert config is not None, "the runtime configuration of a context is gone"
        if config.cache is not None:
            config.cache.shapes.add(f"{sorted(self.shapes.items())}")
        if config.cuda_graph_strategy == CudaGraphStrategy.WHOLE_GRAPH_CAPTURE:
            needed = (dict(self.shapes), dict(self.addresses), self.memory)
            self.module.own_captures += [engine.spec.name] if self.own_graph != needed else []
            self.own_graph = needed
        tensors = {
            tensor.name: (self.addresses[tensor.name], self.get_tensor_shape(tensor.name), tensor.dtype)
            for tensor in (*engine.spec.inputs, *engine.spec.outputs)
        }
        for address, shape, dtype in tensors.values():
            device.inside(address, math.prod(shape) * DTYPES[dtype].bytes)
        session = engine.session  # what is captured keeps the weights that it was captured with
        work, size = self.memory, self.update_device_memory_size_for_shapes()
        assert size <= self.memory_size
        device.inside(work, size)
        captured = device.capturing is not None
        assert not (captured and engine.streams), "work that streams weights was captured"
        shapes, living = dict(self.shapes), weakref.ref(self)

        def run() -> None:
            context = living()
            assert context is not None, "a context was destroyed before its work was done"
            if captured:
                assert context.shapes == shapes, "captured work ran after the shapes of its context changed"
                assert context.memory == work, "captured work ran after the memory of its context moved"
            device.inside(work, size)
            ctypes.memset(device.host(work, size), 0xFB, size)
            views = {name: _view(device, *tensor) for name, tensor in tensors.items()}
            feeds = {tensor.name: views[tensor.name] for tensor in engine.spec.inputs}
            names = [tensor.name for tensor in engine.spec.outputs]
            for name, value in zip(names, session.run(names, feeds), strict=True):
                views[name][...] = value

        device.enqueue(run)
        return True


def _view(device: Any, address: int, shape: tuple[int, ...], dtype: str) -> Any:
    size = math.prod(shape) * DTYPES[dtype].bytes
    return np.frombuffer((ctypes.c_uint8 * size).from_address(device.host(address, size)), np.uint8).view(dtype).reshape(shape)


class Engine:
    #: What a run at the largest shapes works in.
    device_memory_size_v2 = 1 << 20
    has_contexts = False

    def __init__(self, module: HostTensorRT, content: Mapping[str, Any]) -> None:
        from sana_export.manifest import parse_spec

        self.module, self.ranges, self.scales = module, content["ranges"], content["scales"]
        self.spec: GraphSpec = parse_spec(content["spec"])
        self.onnx, self.refittable = content["onnx"], content["refittable"]
        self.values: dict[str, onnxruntime.OrtValue] = {}
        self.session: Any = None  # without weights it cannot run
        if not self.refittable:
            self.open()
        #: The bytes of weights that may be streamed, and of those that stay on the device.
        self.streamable_weights_size = module.streamable_bytes or content["bytes"]
        self._budget = self.streamable_weights_size
        # Weights take memory for as long as the engine lives.
        self.weights = module.device.allocate(content["bytes"])

    def open(self) -> None:
        options = onnxruntime.SessionOptions()
        if self.values:
            options.add_external_initializers(list(self.values), list(self.values.values()))
        self.session = onnxruntime.InferenceSession(self.onnx, options, providers=["CPUExecutionProvider"])

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self.module)

    def create_execution_context(self, config: RuntimeConfig) -> Context:
        assert self.session is not None, "a context was made of an engine without weights"
        self.has_contexts = True
        self.module.contexts.append((self.spec.name, copy.copy(config)))
        return Context(self, config)

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        assert not self.has_contexts, "the budget was changed after a context was made"
        if not self.module.refuses_budgets:
            self._budget = budget

    @property
    def streams(self) -> bool:
        return self._budget < self.streamable_weights_size


@dataclasses.dataclass
class Weights:
    dtype: np.dtype[Any]
    address: int
    size: int

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class Refitter:
    """For an `Engine`. The first refit needs all weights, later ones only those that change."""

    def __init__(self, engine: Engine, logger: Any) -> None:
        self.engine, self.module = engine, engine.module
        self.given: dict[str, onnxruntime.OrtValue] = {}
        initializers = onnx.load(engine.onnx, load_external_data=False).graph.initializer
        self.shapes = {tensor.name: tuple(tensor.dims) for tensor in initializers if tensor.external_data}

    def get_all_weights(self) -> list[str]:
        return list(self.shapes)

    def get_weights_prototype(self, name: str) -> Weights:
        return Weights(np.dtype(np.float32), 0, math.prod(self.shapes[name]))

    def set_named_weights(self, name: str, weights: Weights) -> bool:
        values = np.frombuffer(ctypes.string_at(weights.address, weights.nbytes), weights.dtype).reshape(self.shapes[name])
        self.given[name] = onnxruntime.OrtValue.ortvalue_from_numpy(values)
        return True

    def get_missing_weights(self) -> list[str]:
        return [] if self.engine.values else [name for name in self.shapes if name not in self.given]

    def refit_cuda_engine(self) -> bool:
        assert not (self.engine.values and self.module.device.queue), "an engine was refitted with work under way"
        if self.module.refits_fail_on == self.engine.spec.name:
            return self.module.fail("out of device memory")
        self.module.refits.append((self.engine.spec.name, set(self.given)))
        self.engine.values |= self.given
        self.engine.open()
        return True


class Runtime:
    def __init__(self, logger: Any) -> None:
        self.module: HostTensorRT = logger.module
        self.module.logger = logger

    def get_engine_validity(self, content: Any) -> tuple[EngineValidity, int]:
        if self.module.diagnostics:
            return EngineValidity.INVALID, int(self.module.diagnostics)
        return EngineValidity.VALID, 0

    def deserialize_cuda_engine(self, content: Any) -> Engine | None:
        if self.module.out_of_memory == "loading":
            self.module.fail("Error Code 1: Cuda Runtime (out of memory)")
            return None
        if self.module.cannot_load:
            self.module.fail(self.module.cannot_load)
            return None
        self.module.loads += 1
        return Engine(self.module, json.loads(bytes(content)))


class HostTensorRT:
    """The module for one device. Tests set here what is to fail."""

    __name__ = "host_tensorrt"
    __version__ = VERSION
    Runtime = Runtime
    Refitter = Refitter
    Weights = Weights
    EngineValidity = EngineValidity
    EngineInvalidityDiagnostics = EngineInvalidityDiagnostics
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy
    CudaGraphStrategy = CudaGraphStrategy

    def __init__(self, device: Any) -> None:
        self.device = device
        self.capturable, self.diagnostics, self.out_of_memory = True, EngineInvalidityDiagnostics(0), ""
        self.logger: Any = None
        self.loads = 0
        self.runs: list[str] = []
        self.shapes: list[tuple[str, str]] = []  # graph and shapes of each run
        self.refits: list[tuple[str, set[str]]] = []
        self.refits_fail_on = ""
        self.streamable_bytes, self.refuses_budgets = 0, False
        self.cannot_load, self.cannot_size, self.breaks_captures = "", "", False
        self.contexts: list[tuple[str, RuntimeConfig]] = []
        #: Bytes that a run of a graph works in for each element of its inputs, if they are not `WORK_FACTOR`.
        self.work_factors: dict[str, int] = {}
        #: The graphs whose contexts captured their own work, once for each capture.
        self.own_captures: list[str] = []
        module = self

        class Logger(ILogger):
            """Knows its module, as the C++ library knows itself."""

            @property
            def module(self) -> HostTensorRT:
                return module

        self.ILogger = Logger

    def fail(self, line: str) -> bool:
        self.logger.log(Severity.ERROR, line)
        return False


def with_engines(bundle: Path, profile: Profile | str = "default", *, activation_bytes: int = 1000, **changes: Any) -> Manifest:
    """`bundle` with an engine of every graph for `profile`; `changes` replace fields of their entries."""
    manifest = Manifest.load(bundle)
    profile = PROFILES[profile] if isinstance(profile, str) else profile
    ranges = profile.ranges(manifest.model, instruction_tokens=4000)
    scale, factor = manifest.model.decoder_tile_scale, manifest.model.vae_scale_factor
    encoded = manifest.model.encoder_tile_scale
    scales = {
        "image": factor,
        "feature": factor // scale,
        "tile_image": scale,
        "encoded": factor // encoded,
        "window_image": encoded,
    }
    for name, graph in manifest.graphs.items():
        own = {axis: ranges[axis] for axis in dynamic_axes(graph.spec)}
        content = {
            "onnx": str(bundle / graph.onnx.path),
            "spec": dataclasses.asdict(graph.spec),
            "ranges": own,
            "scales": scales,
            "refittable": bool(changes.get("options", {}).get("refittable") and graph.data),
            "bytes": sum(file.bytes for file in graph.files),
        }
        key = f"{profile.name}-{name}-{changes.get('backend_version', VERSION)}".ljust(64, "0")
        path = bundle / "engines" / "tensorrt-rtx" / key[:40] / f"{name}.engine"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        entry = EngineEntry(
            graph=name,
            backend="tensorrt-rtx",
            key=key,
            file=dataclasses.replace(file_entry(bundle, path)),
            onnx_sha256=onnx_sha256(graph),
            backend_version=VERSION,
            compute_capabilities=(),
            operating_system="any",
            profile=profile.name,
            ranges=own,
            activation_bytes=activation_bytes,
        )
        own_changes = changes if graph.data else {name: value for name, value in changes.items() if name != "options"}
        manifest = manifest.with_engine(dataclasses.replace(entry, **own_changes))
    manifest.save(bundle)
    return manifest
