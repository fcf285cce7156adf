"""The context and denoiser graphs equal diffusers' SanaTransformer2DModel for several configs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.models.attention_processor import PAGCFGSanaLinearAttnProcessor2_0

from sana_export.export.parity import compare_tensors
from sana_export.graphs.context import Context
from sana_export.graphs.denoiser import Denoiser
from sana_export.graphs.numerics import FP16_MAX, NUMERICS
from sana_export.synth.checkpoint import build_pipeline
from sana_export.synth.recipes import RECIPES
from sana_export.verify.reference import clamp_attention

CONFIGS = {
    "plain": {},
    "qk_norm": {"qk_norm": "rms_norm_across_heads"},
    "2K positions": {"interpolation_scale": 1.0, "sample_size": 8},
    "4K positions and qk_norm": {"interpolation_scale": 2.0, "sample_size": 8, "qk_norm": "rms_norm_across_heads"},
    "other heads": {
        "num_attention_heads": 6,
        "num_cross_attention_heads": 3,
        "cross_attention_head_dim": 64,
        "cross_attention_dim": 192,
    },
    "guidance": {"guidance_embeds": True},
    "guidance, its scale and qk_norm": {
        "guidance_embeds": True,
        "guidance_embeds_scale": 0.35,
        "qk_norm": "rms_norm_across_heads",
    },
}


def make_transformer(config: dict) -> torch.nn.Module:
    recipe = RECIPES["tiny-random"]
    return build_pipeline(replace(recipe, transformer={**recipe.transformer, **config})).transformer


def draw_inputs(transformer, *, branches=3, batch=2, tokens=11, height=5, width=7) -> dict[str, torch.Tensor]:
    """Random inputs. The prompts of a batch differ in length."""
    lengths = torch.randint(1, tokens + 1, (branches, batch, 1))
    return {
        "latents": torch.randn(batch, 32, height, width),
        "timestep": torch.randint(1, 1000, (1,)).float(),
        "guidance": torch.rand(1) * 10,
        "prompt_embeds": torch.randn(branches, batch, tokens, transformer.config.caption_channels),
        "context_mask": (torch.arange(tokens) < lengths).float(),
    }


@torch.no_grad()
def run_reference(transformer, inputs) -> torch.Tensor:
    """diffusers' noise_pred [K, B, 32, h, w]."""
    branches, batch = inputs["context_mask"].shape[:2]
    config = transformer.config
    guidance = (inputs["guidance"] * config.guidance_embeds_scale).expand(branches * batch) if config.guidance_embeds else None
    out = transformer(
        inputs["latents"].repeat(branches, 1, 1, 1),
        encoder_hidden_states=inputs["prompt_embeds"].flatten(0, 1),
        encoder_attention_mask=inputs["context_mask"].flatten(0, 1),
        timestep=inputs["timestep"].expand(branches * batch),
        guidance=guidance,
    ).sample
    return out.unflatten(0, (branches, batch))


@torch.no_grad()
def run_graphs(transformer, inputs, *, perturbed=None, source=None, clamp=False, pag_layers=(), dtype="float32") -> torch.Tensor:
    """The graphs' noise_pred [K, B, 32, h, w]. Each branch continues the text branch of its number, if `source` is None."""
    config, weights, numerics = dict(transformer.config), transformer.state_dict(), NUMERICS[dtype]
    context = Context(config, weights, numerics)(inputs["prompt_embeds"])
    denoiser = Denoiser(config, weights, numerics, clamp=clamp, pag_layers=pag_layers)
    source = torch.arange(len(inputs["context_mask"])) if source is None else source
    perturbed = torch.zeros(len(source)) if perturbed is None else perturbed
    others = {"guidance": inputs["guidance"]} if config["guidance_embeds"] else {}
    others |= {"source": source} if pag_layers else {}
    return denoiser(inputs["latents"], inputs["timestep"], context, inputs["context_mask"], perturbed, **others)


def assert_equal(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    cosine = torch.nn.functional.cosine_similarity(found.double().flatten(), wanted.double().flatten(), dim=0)
    assert cosine >= 0.999999
    assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 7), (3, 12)])
def test_equals_diffusers(config, height, width):
    transformer = make_transformer(config)
    inputs = draw_inputs(transformer, height=height, width=width)
    assert_equal(run_graphs(transformer, inputs), run_reference(transformer, inputs))


@pytest.mark.parametrize("timestep", [0.9999, 0.78, 0.2])
def test_guidance_in_half_precision(timestep):
    """With timesteps as SANA-Sprint uses them, between 0 and 1."""
    transformer = make_transformer(CONFIGS["guidance, its scale and qk_norm"])
    inputs = {**draw_inputs(transformer), "timestep": torch.tensor([timestep])}
    found, wanted = run_graphs(transformer, inputs, dtype="float16"), run_reference(transformer, inputs)
    assert compare_tensors("noise_pred", found.numpy(), wanted.numpy(), "fp16").passed
    other = run_graphs(transformer, {**inputs, "guidance": inputs["guidance"] + 1.0}, dtype="float16")
    assert (other - found).abs().max() > 10 * (found - wanted).abs().max()


def test_padding_can_be_omitted():
    transformer = make_transformer({})
    inputs = draw_inputs(transformer, branches=1, batch=1, tokens=9)
    inputs["context_mask"] = (torch.arange(9) < 4).float().reshape(1, 1, 9)
    short = {**inputs, "prompt_embeds": inputs["prompt_embeds"][:, :, :4], "context_mask": torch.ones(1, 1, 4)}
    assert_equal(run_graphs(transformer, short), run_reference(transformer, inputs))


@pytest.mark.parametrize("layers", [(0,), (1,), (0, 2)])
def test_perturbed_attention_equals_diffusers(layers):
    transformer = make_transformer({})
    inputs = draw_inputs(transformer)
    perturbed = torch.tensor([0.0, 0.0, 1.0])
    found = run_graphs(transformer, inputs, perturbed=perturbed, pag_layers=layers)
    plain = run_graphs(transformer, inputs, pag_layers=layers)
    for layer in layers:
        transformer.transformer_blocks[layer].attn1.set_processor(PAGCFGSanaLinearAttnProcessor2_0())
    assert_equal(found, run_reference(transformer, inputs))
    assert torch.equal(found[:2], plain[:2])
    assert (found[2] - plain[2]).abs().max() > 1e-2


@pytest.mark.parametrize("layers", [(0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize("prompts", [1, 2])
def test_a_perturbed_branch_continues_the_branch_of_its_prompt(layers, prompts):
    """Equal to a run with all branches from the start, up to the rounding of PyTorch's products of other sizes."""
    transformer = make_transformer({"qk_norm": "rms_norm_across_heads"})
    inputs = draw_inputs(transformer, branches=prompts)
    source, perturbed = torch.tensor([*range(prompts), prompts - 1]), torch.tensor([0.0] * prompts + [1.0])
    repeated = inputs | {key: inputs[key][source] for key in ("prompt_embeds", "context_mask")}
    found = run_graphs(transformer, inputs, perturbed=perturbed, source=source, pag_layers=layers)
    wanted = run_graphs(transformer, repeated, perturbed=perturbed, pag_layers=layers)
    assert_equal(found, wanted)
    assert (found[-1] - found[-2]).abs().max() > 1e-2


def test_layers_before_the_first_perturbed_attention_run_without_the_perturbed_branch():
    """The rows of every layer, counted where its blocks are called. Its first linear attention runs before it, too."""
    transformer = make_transformer({})
    inputs, rows = draw_inputs(transformer, branches=2, batch=1), []
    config, weights, numerics = dict(transformer.config), transformer.state_dict(), NUMERICS["float32"]
    denoiser = Denoiser(config, weights, numerics, clamp=False, pag_layers=(1,))
    for block in denoiser.blocks:
        for method in ("self_attention", "feed_forward"):
            original = getattr(block, method)
            setattr(block, method, lambda x, *others, run=original: rows.append(len(x)) or run(x, *others))
    source, perturbed = torch.tensor([0, 1, 1]), torch.tensor([0.0, 0.0, 1.0])
    context = Context(config, weights, numerics)(inputs["prompt_embeds"])
    with torch.no_grad():
        denoiser(inputs["latents"], inputs["timestep"], context, inputs["context_mask"], perturbed, source=source)
    assert rows == [1, 2, 2, 3, 3, 3]


def test_perturbed_attention_keeps_the_query_key_norm_of_the_other_branches():
    """diffusers' PAG processors omit the norm. The graph applies it."""
    transformer = make_transformer({"qk_norm": "rms_norm_across_heads"})
    inputs = draw_inputs(transformer)
    found = run_graphs(transformer, inputs, perturbed=torch.tensor([0.0, 0.0, 1.0]), pag_layers=(1,))
    assert_equal(found[:2], run_reference(transformer, inputs)[:2])


def test_clamp_equals_the_clamped_reference():
    transformer = make_transformer({})
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            block.attn1.to_out[0].weight *= 3e5
            block.scale_shift_table[2] *= 1e-5
        transformer.time_embed.linear.weight[2 * 128 : 3 * 128] *= 1e-5
        transformer.time_embed.linear.bias[2 * 128 : 3 * 128] *= 1e-5
    inputs = draw_inputs(transformer)
    unclamped = run_reference(transformer, inputs)
    outputs = []
    transformer.transformer_blocks[0].attn1.to_out[0].register_forward_hook(lambda module, args, out: outputs.append(out))
    clamp_attention(transformer)
    wanted = run_reference(transformer, inputs)
    assert outputs[0].abs().max() > 2 * FP16_MAX
    assert (wanted - unclamped).abs().max() > 1e-2
    assert_equal(run_graphs(transformer, inputs, clamp=True), wanted)
