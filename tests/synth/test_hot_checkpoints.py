"""The hot checkpoints work as intended: they exceed the range of fp16, give a good image in fp32, and break a naive cast."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SanaPAGPipeline, SanaPipeline

from sana_export.verify.reference import clamp_attention, clamp_pag_processors
from tests.support.hot_checkpoints import HOT_CHECKPOINTS, Range, measure_ranges

PROMPT = "a cute 🐼 eating 🎋, ink drawing style"
FP16_MAX = torch.finfo(torch.float16).max


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hot")
    return {kind: make(root / kind) for kind, make in HOT_CHECKPOINTS.items()}


def load(folder: Path, *, clamp: bool = False, half: str | None = None, pag: bool = False) -> Any:
    """The checkpoint in float32, with the component `half` cast to fp16."""
    cls, options = (SanaPAGPipeline, {"pag_applied_layers": "transformer_blocks.1"}) if pag else (SanaPipeline, {})
    pipeline = cls.from_pretrained(folder, dtype=torch.float32, **options)
    pipeline.set_progress_bar_config(disable=True)
    if clamp:
        clamp_attention(pipeline.transformer)
    if half:
        torch.nn.Module.to(getattr(pipeline, half), torch.float16)
    return pipeline


def sample(pipeline: Any, **options: Any) -> np.ndarray:
    """The image [H, W, 3], 0 to 1."""
    arguments = {"guidance_scale": 4.5, "num_inference_steps": 6, "height": 192, "width": 192, **options}
    images = pipeline(
        PROMPT,
        generator=torch.Generator().manual_seed(0),
        use_resolution_binning=False,
        output_type="np",
        **arguments,
    ).images
    return np.asarray(images[0])


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """PSNR, where NaN counts as no similarity at all."""
    error = float(np.mean((one - other) ** 2))
    return 10 * math.log10(1 / max(error, 1e-20)) if error == error else 0.0


def assert_sane(image: np.ndarray) -> None:
    assert np.isfinite(image).all()
    spread = 2 * image.std(axis=(0, 1))
    assert ((spread > 0.15) & (spread < 0.7)).all(), spread
    assert ((image == 0) | (image == 1)).mean() < 0.15


def largest(ranges: dict[str, Range], part: str) -> float:
    return max(found.max_abs for name, found in ranges.items() if part in name)


@pytest.mark.parametrize("kind", HOT_CHECKPOINTS)
def test_the_weights_fit_into_fp16(folders: dict[str, Path], kind: str) -> None:
    pipeline = load(folders[kind])
    for component in ("text_encoder", "transformer", "vae"):
        for name, weight in getattr(pipeline, component).named_parameters():
            assert weight.abs().max() <= FP16_MAX, f"{component}.{name}"


def test_attention_exceeds_ten_times_the_range_of_fp16(folders: dict[str, Path]) -> None:
    from safetensors.torch import load_file

    stored = load_file(folders["attention"] / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.float16}
    pipeline = load(folders["attention"], clamp=True)
    images: list[np.ndarray] = []
    ranges = measure_ranges(
        pipeline.transformer, r"attn1\.to_out\.0$|transformer_blocks\.\d$|proj_out", lambda: images.append(sample(pipeline))
    )
    outputs = {name: found for name, found in ranges.items() if "to_out" in name}
    assert largest(ranges, "to_out") >= 6e5
    assert 0.005 < sum(found.overflow_share for found in outputs.values()) / len(outputs) < 0.2
    assert all(found.overflow_share > 0.005 for found in outputs.values())
    # The gates scale it down, so the residual stream stays small.
    assert max(found.max_abs for name, found in ranges.items() if name not in outputs) < 1e3
    assert_sane(images[0])


def test_attention_without_the_clamp_is_another_image(folders: dict[str, Path]) -> None:
    reference = sample(load(folders["attention"], clamp=True))
    assert psnr(reference, sample(load(folders["attention"]))) < 30
    # diffusers clips in fp16, and the clamped float32 reference computes the same function.
    assert psnr(reference, sample(load(folders["attention"], half="transformer"))) > 40


@pytest.mark.parametrize("guidance_scale", [4.5, 1.0])
def test_perturbed_attention_is_clamped_too(folders: dict[str, Path], guidance_scale: float) -> None:
    options = {"guidance_scale": guidance_scale, "pag_scale": 2.0}
    half = sample(_half_pag(folders["attention"]), **options)
    pipeline = load(folders["attention"], clamp=True, pag=True)
    assert psnr(half, sample(pipeline, **options)) < 30
    clamp_pag_processors(pipeline)
    assert psnr(half, sample(pipeline, **options)) > 40


def _half_pag(folder: Path) -> Any:
    """The PAG pipeline feeds its transformer in the text encoder's dtype, so both networks are cast."""
    pipeline = load(folder, half="transformer", pag=True)
    torch.nn.Module.to(pipeline.text_encoder, torch.float16)
    return pipeline


def test_text_encoder_stream_reaches_300000(folders: dict[str, Path]) -> None:
    pipeline = load(folders["text_encoder"])
    images: list[np.ndarray] = []
    ranges = measure_ranges(pipeline.text_encoder, r"layers\.\d$|o_proj|down_proj|^norm$", lambda: images.append(sample(pipeline)))
    stream = {name: found for name, found in ranges.items() if name.count(".") == 1}
    assert 3e5 <= max(found.max_abs for found in stream.values()) < 6e5
    # Only few channels: hardly any value of the stream exceeds the range of fp16.
    assert all(found.overflow_share < 0.05 for found in stream.values())
    for layer in range(3):
        assert ranges[f"layers.{layer}.mlp.down_proj"].max_abs > FP16_MAX
        assert ranges[f"layers.{layer}.self_attn.o_proj"].max_abs > FP16_MAX
    assert 1 < ranges["norm"].max_abs < 50
    assert_sane(images[0])


def test_vae_decoder_exceeds_the_range_of_fp16_in_every_stage(folders: dict[str, Path]) -> None:
    pipeline = load(folders["vae"])
    images: list[np.ndarray] = []
    ranges = measure_ranges(
        pipeline.vae.decoder,
        r"up_blocks\.\d$|conv1|conv2|conv_inverted|conv_depth|conv_point|conv_out$|conv_in$",
        lambda: images.append(sample(pipeline)),
    )
    for stage in range(6):
        assert ranges[f"up_blocks.{stage}"].max_abs >= 1.5e5, stage
    for part in ("conv1", "conv2", "conv_inverted", "conv_depth", "conv_in"):
        assert largest(ranges, part) > FP16_MAX, part
    assert max(found.max_abs for found in ranges.values()) < 1e6
    assert ranges["conv_out"].max_abs < 10
    assert_sane(images[0])


@pytest.mark.parametrize("component", ["text_encoder", "vae"])
def test_a_naive_cast_breaks_the_image(folders: dict[str, Path], component: str) -> None:
    reference = sample(load(folders[component]))
    assert psnr(reference, sample(load(folders[component], half=component))) < 20
