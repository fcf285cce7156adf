"""The clamped reference: diffusers' attention processors with the clip that the fp16 checkpoints were trained with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import SanaPAGPipeline
from diffusers.models.attention_processor import (
    PAGCFGSanaLinearAttnProcessor2_0,
    PAGIdentitySanaLinearAttnProcessor2_0,
    SanaLinearAttnProcessor2_0,
)

from sana_export.graphs.numerics import FP16_MAX
from sana_export.synth.checkpoint import build_pipeline
from sana_export.synth.recipes import RECIPES
from sana_export.verify.reference import ClampedLinearAttnProcessor, clamp_attention, clamp_pag_processors

PROCESSORS = (SanaLinearAttnProcessor2_0, PAGCFGSanaLinearAttnProcessor2_0, PAGIdentitySanaLinearAttnProcessor2_0)


@pytest.fixture
def pipeline() -> Any:
    """Its self-attention outputs exceed the limit, and its weights fit into fp16."""
    made = build_pipeline(RECIPES["tiny-random"])
    for block in made.transformer.transformer_blocks:
        block.attn1.to_out[0].weight.data *= 1e5
    return made


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_every_processor_is_clipped_and_otherwise_unchanged(pipeline: Any, processor: Any, dtype: torch.dtype) -> None:
    attention = pipeline.transformer.transformer_blocks[1].attn1.to(dtype)
    tokens = torch.randn((6, 20, 128), generator=torch.Generator().manual_seed(1)).to(dtype)
    attention.set_processor(processor())
    plain = attention(tokens)
    attention.set_processor(ClampedLinearAttnProcessor(processor()))
    clamped = attention(tokens)
    assert clamped.dtype == dtype
    assert torch.equal(clamped, plain.clip(-FP16_MAX, FP16_MAX))
    over = (plain.float().abs() > FP16_MAX).float().mean()
    # diffusers clips in fp16 only.
    assert over == 0 if dtype == torch.float16 else 0.01 < over < 0.99


def test_clamp_reaches_every_self_attention_once(pipeline: Any) -> None:
    transformer = pipeline.transformer
    clamp_attention(transformer)
    clamp_attention(transformer)
    for name, processor in transformer.attn_processors.items():
        assert isinstance(processor, ClampedLinearAttnProcessor) == (".attn1." in name), name
        if ".attn1." in name:
            assert isinstance(processor.processor, SanaLinearAttnProcessor2_0)


def test_a_pag_call_uses_clamped_processors_and_restores_the_others(pipeline: Any) -> None:
    pag = SanaPAGPipeline(**pipeline.components, pag_applied_layers="transformer_blocks.1")
    pag.set_progress_bar_config(disable=True)
    clamp_attention(pag.transformer)
    clamp_pag_processors(pag)
    clamp_pag_processors(pag)
    used: list[Any] = []
    hook = pag.transformer.transformer_blocks[1].attn1.register_forward_hook(
        lambda module, _inputs, output: used.append((type(module.processor.processor), output.abs().max().item()))
    )
    options: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 1, "use_resolution_binning": False}
    for guidance_scale in (4.5, 1.0):
        pag("a cat", guidance_scale=guidance_scale, pag_scale=2.0, output_type="latent", **options)
    hook.remove()
    assert [kind for kind, _ in used] == list(PROCESSORS[1:])
    assert all(largest <= FP16_MAX for _, largest in used)
    kinds = {type(p.processor) for name, p in pag.transformer.attn_processors.items() if ".attn1." in name}
    assert kinds == {SanaLinearAttnProcessor2_0}
