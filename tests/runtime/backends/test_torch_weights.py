"""Graphs in PyTorch with a bundle's quantized weights: kept small as on a GPU, and widened as on a CPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sana_export.calibration.run import Calibration
from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.export.example_inputs import TRACE_SIZES, random_inputs
from sana_export.graphs.quantized_tensor import QuantizedTensor
from sana_export.manifest import Manifest
from sana_export.quantization.schemes import SCHEMES
from sana_export.runtime.backends import torch_weights
from sana_export.runtime.backends.torch_weights import stored_graph
from tests.support.bundles import exported

#: The methods of the schemes with every step that adds tensors to a layer.
METHODS = {"int8": ["rescale"], "int4-weight": ["low-rank=8"], "nvfp4": ["rescale", "low-rank=8"]}


@pytest.fixture(scope="module", params=SCHEMES)
def bundle(request: pytest.FixtureRequest, tiny_checkpoint: SanaCheckpoint, build_cache: Path) -> Path:
    """The float32 bundle of `tiny-random` in one scheme."""
    scheme = request.param
    words = {"quantize": [scheme], "quantize_method": METHODS.get(scheme, ["nearest"])}
    calibration = Calibration(["a red apple"], steps=1, size=128)
    needs = {} if scheme == "int8-weight" else {"calibration": calibration}
    return exported(tiny_checkpoint, build_cache / f"tiny-fp32-{scheme}-small", **words, **needs)


def quantized(module: nn.Module) -> list[QuantizedTensor]:
    return [parameter for parameter in module.parameters() if isinstance(parameter, QuantizedTensor)]


@pytest.mark.parametrize("graph", ["denoiser", "text_encoder", "vae_decoder"])
def test_small_weights_compute_what_wide_ones_do(
    graph: str, bundle: Path, tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest.load(bundle)
    wide = stored_graph(bundle, manifest, tiny_checkpoint, graph, "cpu")
    monkeypatch.setattr(torch_weights, "_on_cpu", partial(torch_weights._on_gpu, device=torch.device("cpu")))
    small = stored_graph(bundle, manifest, tiny_checkpoint, graph, "cpu")
    entries = manifest.graphs[graph].quantized
    assert len(quantized(small)) == len(entries) > 0
    assert len(quantized(wide)) == sum(bool(entry.inputs or entry.rescaled or entry.rank) for entry in entries)
    inputs = random_inputs(manifest.graphs[graph].spec, replace(TRACE_SIZES, branches=2, text_branches=2), 7)
    with torch.no_grad():
        wanted, found = (tuple_of(module(**inputs)) for module in (wide, small))
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()


def tuple_of(results: Any) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)
