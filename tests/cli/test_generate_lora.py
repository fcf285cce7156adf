"""`generate --lora` gives the runtime's images with these LoRAs, without PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sana_export.runtime import SanaRuntime
from tests.support.command_line import Cli
from tests.support.imports import heavy_modules, line

SMALL = ("--height", 64, "--width", 96, "--no-resolution-binning", "--steps", 2, "--seed", 7)
SETTINGS: dict[str, Any] = {"height": 64, "width": 96, "use_resolution_binning": False, "num_inference_steps": 2, "seed": 7}


def save_lora(path: Path, layer: str, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    name = f"transformer.transformer_blocks.{layer}"
    matrices = {"lora_A": torch.randn(4, 128, generator=generator), "lora_B": torch.randn(128, 4, generator=generator)}
    save_file({f"{name}.{key}.weight": 0.1 * value for key, value in matrices.items()}, path)
    return path


@pytest.fixture
def loras(tmp_path: Path) -> tuple[Path, Path]:
    return save_lora(tmp_path / "a.safetensors", "0.attn1.to_q", 1), save_lora(tmp_path / "b.safetensors", "1.attn2.to_v", 2)


def test_the_image_equals_the_runtimes_with_two_loras(
    tiny_bundle: Path, loras: tuple[Path, Path], tmp_path: Path, cli: Cli
) -> None:
    output = tmp_path / "x.png"
    options = ("--lora", f"{loras[0]}:0.8", "--lora", f"{loras[1]}:2,attn2=-0.5")
    ran = cli("generate", tiny_bundle, "a cat", "-o", output, *SMALL, *options, "--json")
    assert ran.code == 0
    assert ran.json["loras"] == [
        {"path": str(loras[0]), "scale": 0.8},
        {"path": str(loras[1]), "scale": 2.0, "layer_scales": {"attn2": -0.5}},
    ]
    runtime = SanaRuntime.from_pretrained(tiny_bundle)
    images = [np.asarray(runtime("a cat", **SETTINGS).images[0])]
    for path, scale in zip(loras, (0.8, -0.5), strict=True):
        runtime.load_lora(path, scale)
        images.append(np.asarray(runtime("a cat", **SETTINGS).images[0]))
    assert not np.array_equal(images[0], images[1])
    assert not np.array_equal(images[1], images[2])
    np.testing.assert_array_equal(np.asarray(Image.open(output)), images[2])


def test_a_lora_needs_no_pytorch(tiny_bundle: Path, loras: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "x.png"
    assert heavy_modules(line("generate", tiny_bundle, "a cat", "-o", output, *SMALL, "--lora", loras[0])) == set()
    assert output.is_file()


@pytest.mark.parametrize(
    ("lora", "code", "words"),
    [("nothing", 2, "no LoRA"), ("other", 4, "another model"), ("a:inf", 2, "out of range"), ("a:x", 2, "no LoRA")],
)
def test_a_lora_that_does_not_fit_leaves_no_image(
    lora: str, code: int, words: str, tiny_bundle: Path, tmp_path: Path, cli: Cli
) -> None:
    save_lora(tmp_path / "other", "9.attn1.to_q", 1)
    ran = cli("generate", tiny_bundle, "a cat", "-o", tmp_path / "x.png", *SMALL, "--lora", tmp_path / lora)
    assert ran.code == code
    assert words in ran.err
    assert "Traceback" not in ran.err
    assert not (tmp_path / "x.png").exists()
