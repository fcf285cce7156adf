"""Our passes give what onnxscript's whole optimizer gives."""

from __future__ import annotations

from typing import Any

import onnx_ir
import onnxscript.optimizer
import pytest
import torch

from sana_export.export.example_inputs import TRACE_SIZES, graph_spec, random_inputs
from sana_export.export.onnx import OPSET
from sana_export.export.optimize import RULES, optimize
from sana_export.export.tracing import dynamic_shapes, trace
from sana_export.graphs.builders import build_graph
from sana_export.manifest import Options
from tests.support.onnx_graphs import nodes


def translated(checkpoint: Any, name: str, precision: str) -> onnx_ir.Model:
    """A graph as torch.onnx translates it, without any cleanup."""
    options = Options(precision, clamp=True, pag_layers=(1,))
    spec = graph_spec(name, checkpoint, options)
    with torch.no_grad():
        program = trace(build_graph(name, checkpoint, options), spec, random_inputs(spec, TRACE_SIZES, seed=0))
        shapes = dynamic_shapes(spec)
        exported = torch.onnx.export(
            program, dynamo=True, dynamic_shapes=shapes, opset_version=OPSET, optimize=False, verbose=False
        )
    assert exported is not None
    return exported.model


@pytest.mark.parametrize(
    ("name", "precision"),
    [("text_encoder", "fp32"), ("context", "fp16"), ("denoiser", "fp16"), ("vae_decoder_tail", "fp16"), ("postprocess", "fp32")],
)
def test_it_equals_the_whole_optimizer(tiny_checkpoint: Any, name: str, precision: str) -> None:
    model = translated(tiny_checkpoint, name, precision)
    ours, theirs = model.clone(), model.clone()
    optimize(ours)
    onnxscript.optimizer.optimize_ir(theirs)
    assert nodes(ours) == nodes(theirs)
    assert nodes(ours) != nodes(model)


def test_each_rule_stands_under_the_operator_that_its_pattern_ends_with() -> None:
    """Under another one it would never match."""
    found = [(operator, str(rule._target_pattern.output_node.op)) for operator, rules in RULES.items() for rule in rules]
    assert [pair for pair in found if pair[0] != pair[1]] == []
    assert len(found) == 33
