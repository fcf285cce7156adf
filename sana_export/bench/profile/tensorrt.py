"""Layers of an engine, from TensorRT's profiler and engine inspector. For TensorRT and TensorRT-RTX; not run on a GPU yet."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from typing import Any

from sana_export.bench.nvtx_ranges import nvtx_range
from sana_export.bench.profile.profile import GraphRun, LayerTime
from sana_export.commands import engines_command
from sana_export.errors import ArtifactError, DependencyError
from sana_export.trt.flavour import load


def layers(run: GraphRun) -> list[LayerTime]:
    """The median time of each layer. Raises ArtifactError if no engine runs on this GPU, DependencyError if there is no GPU."""
    import torch

    entries = [entry for entry in run.manifest.engines if entry.backend == run.backend and entry.graph == run.graph]
    fix = engines_command(run.bundle, run.backend)
    if not entries:
        raise ArtifactError(
            f"{run.bundle} has no engine of {run.graph}", found="no engine", wanted=f"an engine for {run.backend}", fix=fix
        )
    if not torch.cuda.is_available():
        raise DependencyError(
            "PyTorch finds no GPU",
            found=f"torch {torch.__version__} without one",
            wanted="an NVIDIA GPU, and PyTorch built for CUDA",
            fix="run the same command on a machine with an NVIDIA GPU; the engines need not be built again",
        )
    trt: Any = load(run.backend)
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    serialized = ((run.bundle / entry.file.path).read_bytes() for entry in entries)
    engine = next(filter(None, map(runtime.deserialize_cuda_engine, serialized)), None)
    if engine is None:
        raise ArtifactError(
            f"no engine of {run.graph} runs on this GPU",
            found=torch.cuda.get_device_name(),
            wanted=f"an engine that {run.backend} built for this GPU",
            fix=fix,
        )
    timer = _timer(trt)
    context = engine.create_execution_context()
    context.profiler = timer
    tensors = _bind(engine, context, trt, run)
    stream = torch.cuda.current_stream().cuda_stream
    for number in range(1 + run.runs):
        if number == 1:
            timer.times.clear()  # the first run warms up
        with nvtx_range(run.graph):
            context.execute_async_v3(stream)
            torch.cuda.synchronize()
    del tensors
    kinds = _kinds(engine, context, trt)
    return [LayerTime(name[:60], kinds.get(name, ""), statistics.median(times)) for name, times in timer.times.items()]


def _timer(trt: Any) -> Any:
    """A TensorRT profiler that collects the milliseconds of each layer."""

    class Timer(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times: dict[str, list[float]] = defaultdict(list)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times[layer_name].append(ms)

    return Timer()


def _bind(engine: Any, context: Any, trt: Any, run: GraphRun) -> dict[str, Any]:
    """Give each input and output a tensor on the GPU. The caller must keep the returned tensors alive."""
    import torch

    tensors = {name: tensor.cuda() for name, tensor in run.inputs.items()}
    for name, tensor in tensors.items():
        context.set_input_shape(name, tuple(tensor.shape))
    for tensor in run.spec.outputs:
        shape = tuple(context.get_tensor_shape(tensor.name))
        tensors[tensor.name] = torch.empty(shape, dtype=getattr(torch, tensor.dtype), device="cuda")
    for name, tensor in tensors.items():
        context.set_tensor_address(name, tensor.data_ptr())
    return tensors


def _kinds(engine: Any, context: Any, trt: Any) -> dict[str, str]:
    """Layer to its type, if the engine inspector reports it (engines built with detailed verbosity report all)."""
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    found = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    entries = [entry for entry in found.get("Layers", []) if isinstance(entry, dict)]
    return {entry["Name"]: entry.get("LayerType", "") for entry in entries if "Name" in entry}
