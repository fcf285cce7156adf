"""Layers of an engine, from TensorRT's profiler and engine inspector. For TensorRT and TensorRT-RTX; not run on a GPU yet."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from typing import Any

from sana_export.bench.nvtx_ranges import nvtx_range
from sana_export.bench.profile.profile import GraphRun, LayerTime
from sana_export.bench.torch_engine import Refused, bind
from sana_export.commands import engines_command, export_command
from sana_export.errors import ArtifactError, DependencyError
from sana_export.manifest import EngineEntry
from sana_export.profiles import explain_outside
from sana_export.runtime.backends.tensorrt_refit import EngineWeights
from sana_export.trt.compatibility import Host, detect_host, incompatibilities
from sana_export.trt.flavour import load
from sana_export.trt.logger import CollectedLog, logger_for
from sana_export.trt.selection import engine_set


def layers(run: GraphRun) -> list[LayerTime]:
    """The median time of each layer of the engine that serves these inputs.

    Raises ArtifactError if there is none that runs on this GPU or if the module refuses it, and DependencyError if there is no GPU.
    """
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
    entry = _serving(run, entries, detect_host(torch.cuda.current_device()))
    trt: Any = load(run.backend)
    with logger_for(trt).collect() as log:
        return _Profile(run, trt, log, fix).layers(entry)


def _serving(run: GraphRun, entries: list[EngineEntry], host: Host) -> EngineEntry:
    """The engine that the runtime uses for inputs of these shapes on `host`."""
    axes = {
        axis: length
        for tensor in run.spec.inputs
        for axis, length in zip(tensor.shape, run.inputs[tensor.name].shape, strict=True)
        if isinstance(axis, str)
    }
    why = {entry.key: incompatibilities(entry, host) for entry in entries}
    found = engine_set(run.bundle, run.backend, (entry for entry in entries if not why[entry.key]))
    entry = found.engine_for(run.graph, axes) if run.graph in found.engines else None
    if entry is None:
        reasons = [f"{entry.profile}: {'; '.join(why[entry.key]) or explain_outside(entry.ranges, axes)}" for entry in entries]
        raise ArtifactError(
            f"no engine of {run.graph} serves this workload here",
            found="; ".join(reasons),
            wanted=f"an engine that {run.backend} built for this GPU and these sizes",
            fix=engines_command(run.bundle, run.backend),
        )
    return entry


class _Profile:
    """Runs one engine with `trt`. An error shows what it wrote to `log`; `fix` is the command that builds the engine again."""

    def __init__(self, run: GraphRun, trt: Any, log: CollectedLog, fix: str) -> None:
        self._run, self._trt, self._log, self._fix = run, trt, log, fix

    def layers(self, entry: EngineEntry) -> list[LayerTime]:
        """The layers of the engine of `entry`, each with its median time."""
        import torch

        run = self._run
        runtime = self._trt.Runtime(logger_for(self._trt))
        engine = runtime.deserialize_cuda_engine((run.bundle / entry.file.path).read_bytes())
        self._check(engine is not None, "loading")
        if entry.refittable:
            graph, export = run.manifest.graphs[run.graph], export_command(run.bundle, run.manifest)
            EngineWeights(self._trt, engine, graph, run.bundle, export=export, build=self._fix).fill()
        # TensorRT adds synchronization to work on the default stream.
        timer, stream = _timer(self._trt), torch.cuda.Stream()
        try:
            bound = bind(self._trt, engine, run.spec, {name: tensor.to(stream.device) for name, tensor in run.inputs.items()})
        except Refused as error:
            self._check(False, str(error))
            raise
        bound.context.profiler = timer
        stream.wait_stream(torch.cuda.current_stream())  # it copies the inputs
        for number in range(1 + run.runs):
            if number == 1:
                timer.times.clear()  # the first run warms up
            with nvtx_range(run.graph):
                self._check(bound.context.execute_async_v3(stream.cuda_stream), "running")
                stream.synchronize()
        kinds = _kinds(engine, bound.context, self._trt)
        return [LayerTime(name[:60], kinds.get(name, ""), statistics.median(times)) for name, times in timer.times.items()]

    def _check(self, worked: bool, doing: str) -> None:
        if not worked:
            raise ArtifactError(
                f"{doing} the engine of {self._run.graph} failed in {self._trt.__name__} {self._trt.__version__}",
                found="; ".join(self._log.errors) or "no reason given",
                wanted="an engine that runs here",
                fix=self._fix,
            )


def _timer(trt: Any) -> Any:
    """A TensorRT profiler that collects the milliseconds of each layer."""

    class Timer(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times: dict[str, list[float]] = defaultdict(list)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times[layer_name].append(ms)

    return Timer()


def _kinds(engine: Any, context: Any, trt: Any) -> dict[str, str]:
    """Layer to its type, if the engine inspector reports it (engines built with detailed verbosity report all)."""
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    found = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    entries = [entry for entry in found.get("Layers", []) if isinstance(entry, dict)]
    return {entry["Name"]: entry.get("LayerType", "") for entry in entries if "Name" in entry}
