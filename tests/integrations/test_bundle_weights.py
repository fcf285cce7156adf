"""The weights in a bundle's files, as `use_bundle` compares them with a pipeline's."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sana_export.integrations.diffusers.bundle_weights import BundleWeights
from sana_export.manifest import Manifest
from sana_export.runtime import SanaRuntime
from tests.support.quantized import read_weights


def test_weights_of_a_quantized_graph(quantized_bundle: Path, tiny_bundle: Path) -> None:
    """Every layout: rows and columns, 4 bits in blocks and 8 bits with a scale for each channel."""
    entries = [Manifest.load(bundle).graphs for bundle in (quantized_bundle, tiny_bundle)]
    runtimes = [SanaRuntime.from_pretrained(bundle, backend="onnxruntime") for bundle in (quantized_bundle, tiny_bundle)]
    for graph in ("denoiser", "text_encoder"):
        stored, whole = (BundleWeights(runtime, graph) for runtime in runtimes)
        numbers = read_weights(quantized_bundle / entries[0][graph].onnx.path)
        for weight in entries[0][graph].quantized:
            shape = weight.shape[::-1] if weight.transposed else weight.shape
            turned = not weight.transposed and weight.axis == (0 if weight.block else 1)
            rows = (0, 3, 17)
            found, distance = stored.rows(weight.name, shape, rows, transposed=turned)
            plain, exact = whole.rows(weight.name, shape, rows, transposed=turned)
            wanted, steps = (array.T if turned or weight.transposed else array for array in numbers[weight.name])
            np.testing.assert_allclose(found, wanted[list(rows)].reshape(3, -1), rtol=1e-6)
            np.testing.assert_allclose(distance, steps[list(rows)].reshape(3, -1) / 2, rtol=1e-6)
            assert (np.abs(found - plain) <= distance * 1.0001).all()
            assert not exact.any()
            assert stored.size(weight.name) == whole.size(weight.name) == np.prod(weight.shape)
    assert stored.size("unknown") == 0
