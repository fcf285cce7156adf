"""LoKr, DoRA and scales of layers at run time: the images of diffusers and PEFT with them, and no trace after unloading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sana_export.adapters import Lora
from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.errors import ArtifactError, UsageError
from sana_export.runtime import SanaRuntime
from sana_export.verify.reference import load_reference
from tests.runtime.test_lora import GRAPHS, assert_same_image, draw, draw_reference, own_bytes, record
from tests.support.lora_files import TARGETS, diffusers_lora, flat, load_transformer, randomized


@pytest.fixture
def runtime(tiny_bundle: Path) -> SanaRuntime:
    return SanaRuntime.from_pretrained(tiny_bundle, backend="onnxruntime")


def reference(runtime: SanaRuntime, checkpoint: SanaCheckpoint) -> Any:
    return load_reference(checkpoint, runtime.manifest.options, pag=False)


def assert_unloads(runtime: SanaRuntime, plain: np.ndarray) -> None:
    """After unloading, the image and every bit of the weights are as before."""
    recorders = record(runtime)
    runtime.unload_lora()
    np.testing.assert_array_equal(draw(runtime), plain)
    for graph in GRAPHS:
        own = own_bytes(runtime.bundle, graph)
        (refit,) = recorders[graph].refits
        assert refit
        assert all(value.tobytes() == own[name].tobytes() for name, value in refit.items())


def test_a_dora_with_scales_of_layers(runtime: SanaRuntime, tiny_checkpoint: SanaCheckpoint, tmp_path: Path) -> None:
    """Against diffusers' `set_adapters`, after a plain LoRA."""
    paths = [
        diffusers_lora(load_transformer(tiny_checkpoint), tmp_path / "plain", seed=1, r=2),
        diffusers_lora(load_transformer(tiny_checkpoint), tmp_path / "dora", r=4, lora_alpha=7, use_dora=True),
    ]
    plain = draw(runtime)
    runtime.load_lora(paths[0], 0.4)
    runtime.load_lora(paths[1], {"attn2": 0.25, "*": 0.7})
    assert runtime.loras == (Lora(paths[0], 0.4), Lora(paths[1], 0.7, (("attn2", 0.25),)))
    pipeline = reference(runtime, tiny_checkpoint)
    for path in paths:
        pipeline.load_lora_weights(str(path), adapter_name=path.name)
    pipeline.set_adapters(["plain", "dora"], [0.4, {"transformer": {"attn2": 0.25, "": 0.7}}])
    assert_same_image(draw(runtime), draw_reference(pipeline), plain)
    assert_unloads(runtime, plain)


def test_a_lokr_as_simpletuner_names_it(runtime: SanaRuntime, tiny_checkpoint: SanaCheckpoint, tmp_path: Path) -> None:
    """Against PEFT's merge of the same numbers."""
    from peft import LoKrConfig, get_peft_model, get_peft_model_state_dict

    plain = draw(runtime)
    pipeline = reference(runtime, tiny_checkpoint)
    model = randomized(get_peft_model(pipeline.transformer, LoKrConfig(r=2, alpha=2, target_modules=list(TARGETS))), factor=0.3)
    tensors = {}
    for name, value in get_peft_model_state_dict(model).items():
        layer, end = name.removeprefix("base_model.model.").rsplit(".", 1)
        tensors[f"lycoris_{flat(layer)}.{end}"] = value.contiguous()
        tensors[f"lycoris_{flat(layer)}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors", metadata={"lycoris_config": "{}"})
    pipeline.transformer = model.merge_and_unload()
    runtime.load_lora(tmp_path)
    assert_same_image(draw(runtime), draw_reference(pipeline), plain)
    assert_unloads(runtime, plain)


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        ({"attn3": 1.0}, "for layers that it does not change"),
        ({"attn1": "1"}, "the scale of attn1 in the LoRA .* is not a number"),
        ({"attn1": float("nan")}, "is out of range"),
        ({"": 1.0}, "for no part of a layer's name"),
        ({"attn1.": 1.0}, "for no part of a layer's name"),
        ({1: 1.0}, "for no part of a layer's name"),
        ({"*": 1e9}, "the scale of the LoRA .* is out of range"),
    ],
)
def test_wrong_scales_of_layers_change_nothing(
    runtime: SanaRuntime, tiny_checkpoint: SanaCheckpoint, tmp_path: Path, scale: Any, said: str
) -> None:
    path = diffusers_lora(load_transformer(tiny_checkpoint), tmp_path / "style", r=2)
    recorders = record(runtime)
    with pytest.raises(UsageError, match=said):
        runtime.load_lora(path, scale)
    assert runtime.loras == ()
    assert not any(recorder.refits for recorder in recorders.values())


def test_a_damaged_value_changes_nothing(runtime: SanaRuntime, tiny_checkpoint: SanaCheckpoint, tmp_path: Path) -> None:
    path = diffusers_lora(load_transformer(tiny_checkpoint), tmp_path / "style", r=2) / "pytorch_lora_weights.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("transformer_blocks.1.attn2.to_k.lora_B.weight"))
    tensors[name][3, 1] = torch.nan
    save_file(tensors, path)
    recorders = record(runtime)
    with pytest.raises(ArtifactError, match=name):
        runtime.load_lora(path)
    assert runtime.loras == ()
    assert not any(recorder.refits for recorder in recorders.values())
