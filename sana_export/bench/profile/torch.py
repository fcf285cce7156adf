"""Layers of a deployment graph as a PyTorch module, from PyTorch's profiler: operators with the shapes of their inputs."""

from __future__ import annotations

from typing import Any

from sana_export.bench.nvtx_ranges import nvtx_range
from sana_export.bench.profile.profile import GraphRun, LayerTime
from sana_export.runtime.backends.torch import cpu_threads
from sana_export.runtime.backends.torch_weights import stored_graph


def layers(run: GraphRun) -> list[LayerTime]:
    """The mean self time of each operator and shape, on the GPU if there is one, else on the CPU."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    module = stored_graph(run.bundle, run.manifest, run.checkpoint, run.graph, device)
    inputs = {name: tensor.to(device) for name, tensor in run.inputs.items()}
    with cpu_threads(run.threads), torch.inference_mode():
        module(**inputs)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities, record_shapes=True) as profiler:
            for _ in range(run.runs):
                with nvtx_range(run.graph):
                    module(**inputs)
            if on_gpu:
                torch.cuda.synchronize()
    events = profiler.key_averages(group_by_input_shape=True)
    timed = [(event, event.self_device_time_total if on_gpu else event.self_cpu_time_total) for event in events]
    return [LayerTime(_shapes(event), event.key, time / run.runs / 1e3) for event, time in timed if time > 0]


def _shapes(event: Any) -> str:
    """The shapes of an operator's tensors, for example "576x256 2x256x1728"."""
    shapes = ["x".join(map(str, shape)) for shape in event.input_shapes if shape]
    return f"{' '.join(shapes)}"[:60] or "no tensors"
