"""A graph is traced once, and what `torch.onnx` then writes is what it writes of a program that it decomposes itself."""

from __future__ import annotations

import pytest
import torch

from sana_export.contract import GraphSpec, TensorSpec
from sana_export.export.example_inputs import TRACE_SIZES, graph_spec, random_inputs
from sana_export.export.tracing import dynamic_shapes, trace
from sana_export.graphs.builders import build_graph
from sana_export.manifest import Options
from tests.support.onnx_graphs import nodes

SPEC = GraphSpec(
    "small",
    (TensorSpec("image", "float32", ("batch", 4, "image_height", "image_width")),),
    (TensorSpec("pixels", "float16", ("batch", "image_height", "image_width", 4)),),
)


class Reshapes(torch.nn.Module):
    """Every operator that is exchanged, and reshapes that copy, that do not and of what is not contiguous."""

    def forward(self, image):
        batch, channels, height, width = image.shape
        first, second = (1.0 - image).chunk(2, dim=1)
        x = torch.cat([first.square(), second.reshape(batch, 2, -1).reshape(second.shape)], dim=1)
        x = x.flatten(2).unflatten(1, (2, -1)).flatten(1, 2).transpose(1, 2)
        x = x.reshape(batch, -1, channels).unflatten(1, (height, width)).transpose(0, 1).flatten(0, 1)
        return x.reshape(height, batch, width, -1).transpose(0, 1).to(torch.float16)


def test_a_program_is_translated_as_torch_onnx_would():
    inputs = random_inputs(SPEC, TRACE_SIZES, seed=0)
    with torch.no_grad():
        ours = to_onnx(trace(Reshapes(), SPEC, inputs))
        theirs = to_onnx(Reshapes(), tuple(inputs.values()))
    assert nodes(ours) == nodes(theirs)


@pytest.mark.parametrize("name", ["text_encoder", "context", "denoiser", "sampler", "vae_decoder_tail", "postprocess"])
def test_a_graph_is_traced_once(tiny_checkpoint, name, monkeypatch):
    options = Options("fp16", clamp=True, pag_layers=(1,))
    spec = graph_spec(name, tiny_checkpoint, options)
    with torch.no_grad():
        program = trace(build_graph(name, tiny_checkpoint, options), spec, random_inputs(spec, TRACE_SIZES, seed=0))
        monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", None)
        to_onnx(program)


@pytest.mark.parametrize("operator", [torch.relu_, lambda x: x.addcmul(x, x)], ids=["it writes to its input", "it decomposes"])
def test_what_needs_it_is_decomposed(operator):
    class Module(torch.nn.Module):
        def forward(self, image):
            return operator(image * 2).permute(0, 2, 3, 1).to(torch.float16)

    with torch.no_grad():
        program = trace(Module(), SPEC, random_inputs(SPEC, TRACE_SIZES, seed=0))
    table = {torch.ops.aten.addcmul.default: torch._decomp.decomposition_table[torch.ops.aten.addcmul.default]}
    left = {str(node.target) for node in program.run_decompositions(table).graph.nodes}
    assert not left & {"aten.relu_.default", "aten.addcmul.default"}


def to_onnx(program, inputs=()):
    """The ONNX model of a program, or of a module that `torch.onnx` traces."""
    exported = torch.onnx.export(program, inputs, dynamo=True, dynamic_shapes=dynamic_shapes(SPEC), opset_version=20, verbose=False)
    return exported.model
