"""The exact check of a quantized graph: does it compute what its module does with the numbers that its stored weights stand for?

The comparison with diffusers has wide limits, because rounding weights changes the function. This one has the limits of the graph's
precision, so it finds every other difference.
"""

from __future__ import annotations

import torch

from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.export.half import WideProducts
from sana_export.export.onnx import to_numpy
from sana_export.export.parity import Parity, compare_tensors
from sana_export.runtime import SanaRuntime
from sana_export.runtime.backends.torch import TorchBackend
from sana_export.verify.graph_checks import inputs_for, run_graph


@torch.no_grad()
def check_stored(runtime: SanaRuntime, checkpoint: SanaCheckpoint, graph: str, seed: int) -> list[Parity]:
    """One row for each output of `graph`: the runtime's against that of the graph in torch, both with the stored weights."""
    inputs = inputs_for(runtime, graph, seed)
    backend = TorchBackend(runtime.bundle, runtime.manifest, checkpoint, compiled=False)
    with WideProducts():
        wanted = backend.load(graph).run(inputs)
    found = run_graph(runtime, graph, {name: to_numpy(value) for name, value in inputs.items()})
    precision = runtime.manifest.options.precision
    input_bits = min(weight.input_bits for weight in runtime.manifest.graphs[graph].quantized)
    return [
        compare_tensors(f"{graph}, stored weights", value, to_numpy(wanted[name]), precision, input_bits=input_bits)
        for name, value in found.items()
    ]
