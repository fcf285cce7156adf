"""The graphs of whole components compute what diffusers' and transformers' components compute, and stay in range in fp16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sana_export.export.half import WideProducts
from sana_export.export.parity import compare_tensors
from sana_export.graphs.components import TextEncoderComponent, TransformerComponent, VaeDecoderComponent, VaeEncoderComponent
from sana_export.graphs.numerics import NUMERICS

#: float32 rounding over a few dozen layers.
CLOSE = 5e-5
PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compare(module: nn.Module, inputs: Mapping[str, Tensor], wanted: Tensor, dtype: str) -> None:
    with torch.no_grad(), WideProducts():
        found = module(**inputs)
    if dtype == "float32":
        torch.testing.assert_close(found, wanted, rtol=0, atol=CLOSE)
    parity = compare_tensors("output", found.numpy(), wanted.numpy(), PRECISIONS[dtype])
    assert found.dtype == torch.float32
    assert parity.passed, parity


@pytest.mark.parametrize("dtype", PRECISIONS)
@torch.no_grad()
def test_the_text_encoder(dtype: str, tiny_checkpoint: Any, tiny_pipeline: Any) -> None:
    config, weights = tiny_checkpoint.config("text_encoder"), tiny_checkpoint.weights("text_encoder")
    module = TextEncoderComponent(config, weights, NUMERICS[dtype])
    ids = torch.randint(0, config["vocab_size"], (3, 11), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(11) < torch.tensor([[1], [11], [7]])).long()
    wanted = tiny_pipeline.text_encoder(ids, attention_mask=mask)[0]
    compare(module, {"input_ids": ids, "attention_mask": mask}, wanted, dtype)


@torch.no_grad()
def test_a_mask_with_holes_hides_tokens_from_the_text_encoder(tiny_checkpoint: Any, tiny_pipeline: Any) -> None:
    """Also padding on the left, for the tokens after it."""
    config, weights = tiny_checkpoint.config("text_encoder"), tiny_checkpoint.weights("text_encoder")
    ids = torch.randint(0, config["vocab_size"], (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 1, 1, 1, 1]])
    wanted = tiny_pipeline.text_encoder(ids, attention_mask=mask)[0]
    found = TextEncoderComponent(config, weights, NUMERICS["float32"])(ids, mask)
    torch.testing.assert_close(found[mask > 0], wanted[mask > 0], rtol=0, atol=CLOSE)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("family", ["tiny", "sprint"])
@torch.no_grad()
def test_the_transformer_with_a_timestep_for_each_image(family: str, dtype: str, request: pytest.FixtureRequest) -> None:
    checkpoint, pipeline = (request.getfixturevalue(f"{family}_{part}") for part in ("checkpoint", "pipeline"))
    config = checkpoint.config("transformer")
    module = TransformerComponent(config, checkpoint.weights("transformer"), NUMERICS[dtype], clamp=False)
    inputs = {
        "hidden_states": random(3, config["in_channels"], 4, 6),
        "encoder_hidden_states": random(3, 11, config["caption_channels"], seed=1),
        "encoder_attention_mask": (torch.arange(11) < torch.tensor([[1], [11], [7]])).long(),
        "timestep": torch.tensor([10.0, 500.0, 999.0]),
    }
    if config["guidance_embeds"]:
        inputs["guidance"] = torch.tensor([0.45, 0.1, 0.3])
    wanted = pipeline.transformer(return_dict=False, **inputs)[0]
    compare(module, inputs, wanted, dtype)


@pytest.mark.parametrize("dtype", PRECISIONS)
@torch.no_grad()
def test_the_autoencoder_without_its_scaling_factor(dtype: str, tiny_checkpoint: Any, tiny_pipeline: Any) -> None:
    config, weights, vae = tiny_checkpoint.config("vae"), tiny_checkpoint.weights("vae"), tiny_pipeline.vae
    latents, image = random(2, config["latent_channels"], 3, 2), random(2, 3, 64, 96, seed=1).clamp(-1, 1)
    compare(VaeDecoderComponent(config, weights, NUMERICS[dtype]), {"latent_sample": latents}, vae.decode(latents).sample, dtype)
    compare(VaeEncoderComponent(config, weights, NUMERICS[dtype]), {"sample": image}, vae.encode(image).latent, dtype)


@torch.no_grad()
def test_the_clamp_is_part_of_the_transformer(tiny_checkpoint: Any) -> None:
    """With outputs of the first self-attention far beyond 65504, the clipped graph differs from the other one, and stays finite."""
    config, stored = tiny_checkpoint.config("transformer"), tiny_checkpoint.weights("transformer")
    name = "transformer_blocks.0.attn1.to_out.0.weight"
    weights = {key: stored[key] * (1e8 if key == name else 1.0) for key in stored}
    inputs = {
        "hidden_states": random(1, config["in_channels"], 4, 4),
        "encoder_hidden_states": random(1, 5, config["caption_channels"], seed=1),
        "encoder_attention_mask": torch.ones(1, 5, dtype=torch.int64),
        "timestep": torch.tensor([500.0]),
    }
    clipped, plain = (TransformerComponent(config, weights, NUMERICS["float32"], clamp=clamp)(**inputs) for clamp in (True, False))
    assert clipped.isfinite().all()
    assert (clipped - plain).abs().max() > 1e-3
