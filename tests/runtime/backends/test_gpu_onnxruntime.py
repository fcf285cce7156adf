"""ONNX Runtime on a GPU, against the CPU. `make gpu-check` runs it; it has not been run yet."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from sana_export.runtime import SanaRuntime
from sana_export.runtime.backends.onnxruntime import OnnxRuntimeBackend

pytestmark = pytest.mark.gpu


def test_onnxruntime_on_cuda_draws_what_the_cpu_draws(tiny_bundle) -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip('this ONNX Runtime has no CUDA provider: pip install "sana-export[cuda]"')
    request = {"height": 128, "width": 192, "use_resolution_binning": False, "num_inference_steps": 4, "seed": 3}
    runtime = SanaRuntime.from_pretrained(tiny_bundle, backend="onnxruntime")
    assert runtime.backend.device == "cuda"
    found = runtime("a red apple", output_type="np", **request).images

    def on_the_cpu(bundle, manifest):
        return OnnxRuntimeBackend(bundle, manifest, provider="CPUExecutionProvider")

    wanted = SanaRuntime.from_pretrained(tiny_bundle, backend=on_the_cpu)("a red apple", output_type="np", **request).images
    assert -10.0 * np.log10(np.mean((found - wanted) ** 2)) >= 40.0
