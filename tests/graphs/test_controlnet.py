"""The ControlNet and the denoiser with its residuals equal diffusers' SanaControlNetModel and SanaTransformer2DModel."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from diffusers import SanaControlNetModel, SanaTransformer2DModel
from diffusers.models.attention_processor import PAGCFGSanaLinearAttnProcessor2_0
from torch import Tensor

from sana_export.architectures import TRANSFORMER_DEFAULTS
from sana_export.export.parity import compare_tensors
from sana_export.graphs.context import Context
from sana_export.graphs.controlnet import ControlNet
from sana_export.graphs.denoiser import Denoiser
from sana_export.graphs.numerics import NUMERICS
from sana_export.synth.recipes import RECIPES
from sana_export.synth.weights import fill

BASE = RECIPES["tiny-random"].transformer
KEYS = inspect.signature(SanaControlNetModel.__init__).parameters.keys()
CONFIGS: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "2K positions": {"interpolation_scale": 1.0, "sample_size": 8},
    "4K positions": {"interpolation_scale": 2.0, "sample_size": 8},
    "other heads": {
        "num_attention_heads": 6,
        "num_cross_attention_heads": 3,
        "cross_attention_head_dim": 64,
        "cross_attention_dim": 192,
    },
}
#: Layers of the ControlNet and of the transformer, which has three blocks that can take a residual in diffusers if it has four.
DEPTHS = {"two of four": (2, 4), "as many": (3, 3), "one": (1, 3)}


def make_pair(config: Mapping[str, Any], layers: tuple[int, int] = (2, 4)) -> tuple[Any, Any]:
    """A ControlNet and a transformer with random weights."""
    whole = {**BASE, **config}
    controlnet = SanaControlNetModel(**{key: whole[key] for key in whole if key in KEYS} | {"num_layers": layers[0]})
    transformer = SanaTransformer2DModel(**whole | {"num_layers": layers[1]})
    for network, component in ((controlnet, "controlnet"), (transformer, "transformer")):
        fill(network.eval(), component, seed=3)
    return controlnet, transformer


def draw_inputs(*, branches: int = 2, batch: int = 2, tokens: int = 11, height: int = 5, width: int = 7) -> dict[str, Tensor]:
    """Random inputs. The prompts of a batch differ in length."""
    lengths = torch.randint(1, tokens + 1, (branches, batch, 1))
    return {
        "latents": torch.randn(batch, 32, height, width),
        "control": torch.randn(batch, 32, height, width),
        "scale": torch.rand(1) + 0.3,
        "timestep": torch.randint(1, 1000, (1,)).float(),
        "prompt_embeds": torch.randn(branches, batch, tokens, BASE["caption_channels"]),
        "context_mask": (torch.arange(tokens) < lengths).float(),
    }


@torch.no_grad()
def run_reference(controlnet: Any, transformer: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """diffusers' residuals [R, K, B, h, w, C] and noise_pred [K, B, 32, h, w]."""
    branches, batch = inputs["context_mask"].shape[:2]
    common = {
        "encoder_hidden_states": inputs["prompt_embeds"].flatten(0, 1),
        "encoder_attention_mask": inputs["context_mask"].flatten(0, 1),
        "timestep": inputs["timestep"].expand(branches * batch),
    }
    latents = inputs["latents"].repeat(branches, 1, 1, 1)
    samples = controlnet(
        latents,
        controlnet_cond=inputs["control"].repeat(branches, 1, 1, 1),
        conditioning_scale=float(inputs["scale"]),
        **common,
    ).controlnet_block_samples
    noise_pred = transformer(latents, controlnet_block_samples=tuple(samples), **common).sample
    residuals = torch.stack([*samples]).unflatten(1, (branches, batch)).unflatten(3, tuple(latents.shape[2:]))
    return residuals, noise_pred.unflatten(0, (branches, batch))


@torch.no_grad()
def run_graphs(
    controlnet: Any,
    transformer: Any,
    inputs: Mapping[str, Tensor],
    dtype: str = "float32",
    *,
    perturbed: Sequence[float] = (0.0, 0.0),
    pag: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """The graphs' residuals, without the factor that they are stored with, and noise_pred."""
    numerics = NUMERICS[dtype]
    config, weights = {**TRANSFORMER_DEFAULTS, **controlnet.config}, controlnet.state_dict()
    context = Context(config, weights, numerics)(inputs["prompt_embeds"])
    own = [inputs[name] for name in ("latents", "timestep", "control", "scale")]
    residuals = ControlNet(config, weights, numerics, clamp=False)(*own, context, inputs["context_mask"])
    denoiser, weights = dict(transformer.config), transformer.state_dict()
    layers, source = ((), {}) if pag is None else (pag["layers"], {"source": torch.tensor(pag["source"])})
    noise_pred = Denoiser(denoiser, weights, numerics, clamp=False, pag_layers=layers)(
        inputs["latents"],
        inputs["timestep"],
        Context(denoiser, weights, numerics)(inputs["prompt_embeds"]),
        inputs["context_mask"],
        torch.tensor(perturbed),
        residuals=residuals,
        **source,
    )
    return residuals.float() / numerics.scale, noise_pred


def assert_equal(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    cosine = torch.nn.functional.cosine_similarity(found.double().flatten(), wanted.double().flatten(), dim=0)
    assert cosine >= 0.999999
    assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("layers", DEPTHS.values(), ids=DEPTHS)
def test_equals_diffusers(config: Mapping[str, Any], layers: tuple[int, int]) -> None:
    networks, inputs = make_pair(config, layers), draw_inputs()
    for found, wanted in zip(run_graphs(*networks, inputs), run_reference(*networks, inputs), strict=True):
        assert_equal(found, wanted)
    without = {**inputs, "scale": torch.zeros(1)}
    assert (run_graphs(*networks, without)[1] - found).abs().max() > 1e-2  # the residuals matter


@pytest.mark.parametrize("branches", [1, 3])
def test_any_number_of_branches(branches: int) -> None:
    networks, inputs = make_pair({}), draw_inputs(branches=branches, batch=1, height=3, width=12)
    found = run_graphs(*networks, inputs, perturbed=[0.0] * branches)
    for ours, theirs in zip(found, run_reference(*networks, inputs), strict=True):
        assert_equal(ours, theirs)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_perturbed_branch_has_the_residuals_of_its_source(layer: int) -> None:
    """diffusers has no pipeline with both. The ControlNet runs unperturbed, as in its PAG pipelines of other models."""
    networks, inputs = make_pair({}), draw_inputs(branches=2)
    repeated = {name: value[[0, 1, 1]] for name, value in inputs.items() if name in ("prompt_embeds", "context_mask")}
    found = run_graphs(*networks, inputs, perturbed=(0.0, 0.0, 1.0), pag={"layers": (layer,), "source": [0, 1, 1]})[1]
    networks[1].transformer_blocks[layer].attn1.set_processor(PAGCFGSanaLinearAttnProcessor2_0())
    assert_equal(found, run_reference(*networks, {**inputs, **repeated})[1])
    assert (found[2] - found[1]).abs().max() > 1e-2


@pytest.mark.parametrize("config", ["plain", "2K positions"])
def test_half_precision(config: str) -> None:
    networks, inputs = make_pair(CONFIGS[config]), draw_inputs()
    wanted = run_reference(*networks, inputs)
    for name, found, value in zip(("residuals", "noise_pred"), run_graphs(*networks, inputs, "float16"), wanted, strict=True):
        assert compare_tensors(name, found.numpy(), value.numpy(), "fp16").passed
