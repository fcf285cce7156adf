"""Slices of stored arrays with LoRAs added, in every precision, against torch and against graphs with the LoRA folded in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from safetensors.torch import save_file

from sana_export.adapters import Lora
from sana_export.checkpoint.fold_lora import fold_loras
from sana_export.checkpoint.weights import Weights, read_headers
from sana_export.errors import ArtifactError
from sana_export.formats.dtypes import round_to_bfloat16, widen_bfloat16
from sana_export.graphs.lora_targets import trace_lora_targets
from sana_export.manifest import LoraTarget
from sana_export.runtime.backends.onnxruntime import _as_initializer
from sana_export.runtime.lora_values import lora_values, read_adapter, touched
from tests.support.lora_target_cases import TINY, graphs, matrices, shapes

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def as_bytes(value: torch.Tensor) -> np.ndarray:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy()


def as_tensor(value: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(value).reshape(-1).view(np.uint8)).view(dtype).reshape(value.shape)


def save_lora(path: Path, matrices: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Path:
    """A file in diffusers' format from the matrices (B, A) of each layer."""
    tensors = {}
    for layer, (up, down) in matrices.items():
        tensors |= {f"transformer.{layer}.lora_B.weight": up, f"transformer.{layer}.lora_A.weight": down}
    save_file(tensors, path)
    return path


def test_bfloat16_rounds_as_torch_does() -> None:
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    ties = (generator.integers(0, 1 << 16, 50_000, dtype=np.uint32) << 16) | 0x8000
    special = np.array([0, 1, 0x8000, 0x80000000, 0x7F7F8000, 0x7F7F7FFF, 0x7F800000, 0xFF800000], np.uint32)
    values = np.concatenate([bits, ties, special]).view(np.float32)
    values = values[~np.isnan(values)]
    wanted = torch.from_numpy(values).to(torch.bfloat16)
    assert torch.equal(as_tensor(round_to_bfloat16(values), torch.bfloat16).view(torch.int16), wanted.view(torch.int16))
    assert np.array_equal(widen_bfloat16(round_to_bfloat16(values)), wanted.float().numpy())


@pytest.mark.parametrize("factor", [1.0, 2.0**-6, 112**-0.5])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_slice_is_rounded_once(tmp_path: Path, dtype: str, transposed: bool, factor: float) -> None:
    """Against float32 sums in torch. A and B are integers, so that their product is exact in any order."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(24, 12, generator=generator).to(DTYPES[dtype])
    up, down = (torch.randint(-3, 4, size, generator=generator).float() for size in ((8, 4), (4, 12)))
    path = save_lora(tmp_path / "x.safetensors", {"layer": (up, down)})
    array = base.T.contiguous() if transposed else base
    target = LoraTarget("layer", (8, 12), "w", tuple(array.shape), dtype, 8, transposed, factor)
    adapter = read_adapter(Lora(path, 0.5), [target])
    own = as_bytes(array)
    kept = own.copy()

    found = as_tensor(lora_values({"w": own}, [target], [adapter], {"w"})["w"], DTYPES[dtype])

    wanted = base.clone()
    delta = (0.5 * (up @ down)) * np.float32(factor)
    wanted[8:16] = (base[8:16].float() + delta).to(base.dtype)
    assert torch.equal(found, wanted.T if transposed else wanted)
    assert not torch.equal(found, array)
    assert np.array_equal(own, kept), "the bundle's own bytes must not change"


@pytest.mark.parametrize("transposed", [False, True])
def test_an_array_with_some_rows_of_a_layer_gets_those_rows_of_the_lora(tmp_path: Path, transposed: bool) -> None:
    base = torch.arange(60.0).reshape(5, 12)
    up, down = torch.arange(16.0).reshape(8, 2), torch.arange(24.0).reshape(2, 12)
    path = save_lora(tmp_path / "x.safetensors", {"layer": (up, down)})
    array = base.T.contiguous() if transposed else base
    target = LoraTarget("layer", (8, 12), "w", tuple(array.shape), "float32", 1, transposed, source_rows=(5, 8))
    found = lora_values({"w": as_bytes(array)}, [target], [read_adapter(Lora(path), [target])], {"w"})["w"]
    wanted = base.clone()
    wanted[1:4] += (up @ down)[5:8]
    assert np.array_equal(found, (wanted.T if transposed else wanted).numpy())


@pytest.mark.parametrize("precision", DTYPES)
def test_every_layer_equals_the_graph_with_the_lora_folded_in(tmp_path: Path, precision: str) -> None:
    """With weights that the precision represents exactly, so that folding and refitting round the same sum."""
    generator = torch.Generator().manual_seed(5)
    weights = {name: torch.randint(-8, 9, value.shape, generator=generator).float() / 64 for name, value in shapes(TINY).items()}
    save_file(weights, tmp_path / "base.safetensors")
    base = Weights(read_headers([tmp_path / "base.safetensors"]))
    layers = {}
    for layer in sorted(matrices(weights)):
        out, inner, *kernel = weights[f"{layer}.weight"].shape
        up = torch.randn(out, 4, *kernel, generator=generator)
        layers[layer] = up, torch.randn(4, inner, *kernel, generator=generator)
    lora = Lora(save_lora(tmp_path / "x.safetensors", layers), 0.3)
    changed, differing, total = 0, 0, 0
    for build in graphs(TINY, precision).values():
        targets = trace_lora_targets(build, base.on_meta())
        own = {name: as_bytes(value) for name, value in build(base).named_parameters()}
        adapter = read_adapter(lora, [LoraTarget(layer, tuple(weights[f"{layer}.weight"].shape), "", (), "") for layer in layers])
        names = touched(targets, [adapter])
        found = lora_values(own, targets, [adapter], names)
        for name, wanted in build(fold_loras(base, [lora])).named_parameters():
            if name not in names:
                assert np.array_equal(own[name], as_bytes(wanted)), name
                continue
            value = as_tensor(found[name], wanted.dtype).float()
            # Folding multiplies by the factor before the sum, refitting after it: at most the last stored bit differs.
            step = torch.finfo(wanted.dtype).eps * wanted.float().abs().clamp_min(2.0**-14)
            assert ((value - wanted.float()).abs() <= 1.01 * step + 1e-6).all(), name
            changed += 1
            differing += int((value != wanted.float()).sum())
            total += value.numel()
    assert changed == 3 + 3 * 7 + 2 + 3
    if precision != "float32":
        assert differing < total / 500


def test_weights_that_leave_the_range_are_named(tmp_path: Path) -> None:
    path = save_lora(tmp_path / "x.safetensors", {"layer": (torch.full((2, 1), 300.0), torch.full((1, 2), 300.0))})
    for dtype, fits in (("float16", False), ("bfloat16", True), ("float32", True)):
        target = LoraTarget("layer", (2, 2), "w", (2, 2), dtype)
        base = {"w": as_bytes(torch.zeros(2, 2, dtype=DTYPES[dtype]))}
        arguments: Any = (base, [target], [read_adapter(Lora(path), [target])], {"w"})
        if fits:
            lora_values(*arguments)
        else:
            with pytest.raises(ArtifactError, match=r"layer with the LoRA .* leaves the range of float16") as caught:
                lora_values(*arguments)
            assert "smaller scale" in str(caught.value.fix)


def test_weights_in_another_dtype_are_refused(tmp_path: Path) -> None:
    path = save_lora(tmp_path / "x.safetensors", {"layer": (torch.ones(2, 1), torch.ones(1, 2))})
    target = LoraTarget("layer", (2, 2), "w", (2, 2), "int8")
    adapters = [read_adapter(Lora(path), [target])]
    with pytest.raises(ArtifactError, match="weights in int8") as caught:
        lora_values({"w": np.zeros(4, np.uint8)}, [target], adapters, {"w"}, fix="sana-export export tiny -o bundle")
    assert caught.value.fix == "sana-export export tiny -o bundle"


def test_bfloat16_bits_reach_onnxruntime(tmp_path: Path) -> None:
    """Its CPU provider can only cast bfloat16, which is enough to compare the values."""
    values = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    (tmp_path / "w.data").write_bytes(bytes(512))
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.BFLOAT16, dims=[16, 16], data_location=1)
    for key, value in (("location", "w.data"), ("offset", "0"), ("length", "512")):
        tensor.external_data.add(key=key, value=value)
    node = helper.make_node("Cast", ["w"], ["y"], to=onnx.TensorProto.FLOAT)
    output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [16, 16])
    model = helper.make_model(helper.make_graph([node], "g", [], [output], [tensor]), opset_imports=[helper.make_opsetid("", 20)])
    onnx.save(model, tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    bits = _as_initializer(values.view(torch.uint16).numpy())
    options.add_external_initializers(["w"], [bits])
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {})[0], values.float().numpy())
