"""Configs with keys left out, in old spellings or of another class mean what they mean in diffusers and transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from transformers import Gemma2Model

from sana_export.bench.gpu_check.bundles import without_onnx
from sana_export.bench.gpu_check.check import PartContext
from sana_export.checkpoint.checkpoint import SanaCheckpoint, open_checkpoint
from sana_export.export.bundle import model_info
from sana_export.graphs.builders import build_graph
from sana_export.graphs.text_encoder import encode_instruction
from sana_export.manifest import Options
from sana_export.runtime import SanaRuntime
from sana_export.runtime.schedule import make_schedule
from tests.support.checkpoint_edits import LEFT_OUT, edit_config, linked_copy

OPTIONS = Options("fp32", clamp=False)


@pytest.fixture
def folder(tiny_checkpoint: Any, tmp_path: Path) -> Path:
    return linked_copy(tiny_checkpoint.folder, tmp_path / "checkpoint")


def left_out(*keys: str) -> dict[str, Any]:
    return dict.fromkeys(keys, LEFT_OUT)


def rope(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    assert torch.isfinite(wanted).all()
    return float((found - wanted).abs().max() / wanted.abs().max())


def our_hidden_states(checkpoint: SanaCheckpoint, ids: torch.Tensor) -> torch.Tensor:
    weights = checkpoint.weights("text_encoder")
    embeds = weights["embed_tokens.weight"][ids]
    prefix, first = encode_instruction(checkpoint.config("text_encoder"), weights, embeds[0, :1])
    found = build_graph("text_encoder", checkpoint, OPTIONS)(embeds[:, 1:], prefix)
    return torch.cat([first.reshape(1, 1, -1), found], dim=1)


@pytest.mark.parametrize(
    ("given", "otherwise"),
    [
        (left_out("attn_logit_softcapping"), {"attn_logit_softcapping": None}),
        ({"attn_logit_softcapping": None}, {"attn_logit_softcapping": 50.0}),
        (left_out("rope_parameters"), rope(100.0)),
        ({"rope_theta": 500.0, **left_out("rope_parameters")}, rope(10_000.0)),
        ({"rope_theta": 500.0}, rope(500.0)),
        (left_out("rms_norm_eps"), {"rms_norm_eps": 1e-2}),
        (left_out("query_pre_attn_scalar"), {"query_pre_attn_scalar": 16}),
        (left_out("hidden_activation", "sliding_window", "layer_types", "model_type", "attention_bias"), rope(100.0)),
    ],
    ids=lambda given: " ".join(given),
)
@torch.no_grad()
def test_the_text_encoder_is_the_one_that_transformers_loads(
    folder: Path, given: Mapping[str, Any], otherwise: Mapping[str, Any]
) -> None:
    """`otherwise` is what another reading of the config would give. It makes a difference."""
    ids = torch.randint(3, 300, (1, 40))

    def theirs() -> torch.Tensor:
        model = Gemma2Model.from_pretrained(folder / "text_encoder", attn_implementation="eager")
        return model.eval()(ids).last_hidden_state

    edit_config(folder, "text_encoder", **given)
    wanted = theirs()
    assert error(our_hidden_states(open_checkpoint(str(folder)), ids), wanted) <= 2e-5
    edit_config(folder, "text_encoder", **otherwise)
    assert error(theirs(), wanted) > 1e-4


@torch.no_grad()
def test_the_transformer_is_the_one_that_diffusers_loads(folder: Path) -> None:
    edit_config(
        folder,
        "transformer",
        **left_out("norm_eps", "in_channels", "out_channels", "attention_head_dim", "mlp_ratio", "patch_size", "qk_norm"),
        **left_out("interpolation_scale", "guidance_embeds", "guidance_embeds_scale", "timestep_scale", "attention_bias"),
    )
    transformer = diffusers.SanaTransformer2DModel.from_pretrained(folder / "transformer").eval()
    checkpoint = open_checkpoint(str(folder))
    latents, text = torch.randn(1, 32, 5, 7), torch.randn(1, 9, transformer.config.caption_channels)
    wanted = transformer(latents, text, torch.tensor([500.0]), encoder_attention_mask=torch.ones(1, 9)).sample
    context = build_graph("context", checkpoint, OPTIONS)(text.unsqueeze(0))
    arguments = torch.tensor([500.0]), context, torch.ones(1, 1, 9), torch.zeros(1)
    found = build_graph("denoiser", checkpoint, OPTIONS)(latents, *arguments)
    assert error(found[0], wanted) <= 2e-5
    info = model_info(checkpoint, "")
    assert (info.latent_channels, info.timestep_scale, info.guidance_embeds) == (32, 1.0, False)


@torch.no_grad()
def test_the_decoder_is_the_one_that_diffusers_loads(folder: Path) -> None:
    edit_config(
        folder,
        "vae",
        **left_out("decoder_act_fns", "decoder_norm_types", "decoder_conv_act_fn", "decoder_in_shortcut", "scaling_factor"),
        **left_out("in_channels", "latent_channels", "attention_head_dim", "decoder_qkv_multiscales"),
    )
    vae = diffusers.AutoencoderDC.from_pretrained(folder / "vae").eval()
    latents = torch.randn(1, 32, 3, 4)
    assert vae.config.scaling_factor == 1.0
    found = build_graph("vae_decoder", open_checkpoint(str(folder)), OPTIONS)(latents)
    assert error(found, vae.decode(latents).sample) <= 2e-5


SCHEDULERS = {
    "the index names another class": ("FlowMatchEulerDiscreteScheduler", {}),
    "the config names no class": ("FlowMatchEulerDiscreteScheduler", {**left_out("_class_name", "flow_shift"), "shift": 2.5}),
    "the config names no class and DPM": ("DPMSolverMultistepScheduler", left_out("_class_name", "solver_order", "flow_shift")),
    "the name of another class's solver": ("DPMSolverMultistepScheduler", {"solver_type": "bh2"}),
    "UniPC": ("UniPCMultistepScheduler", {"solver_order": 3, **left_out("solver_type")}),
    "single steps with DPM's config": ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
    "stochastic": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
}


@pytest.mark.parametrize(("name", "changes"), SCHEDULERS.values(), ids=SCHEDULERS)
def test_the_scheduler_is_the_one_that_diffusers_loads(folder: Path, name: str, changes: dict[str, Any]) -> None:
    edit_config(folder, "index", scheduler=["diffusers", name])
    edit_config(folder, "scheduler", **changes)
    scheduler = getattr(diffusers, name).from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(7)
    config = model_info(open_checkpoint(str(folder)), "").scheduler
    assert config == {"_class_name": name, **{key: value for key, value in scheduler.config.items() if not key.startswith("_")}}
    schedule = make_schedule(config, 7)
    np.testing.assert_array_equal(schedule.timesteps, scheduler.timesteps.numpy())
    sigmas = -schedule.coefficients[:, 1]
    np.testing.assert_allclose(sigmas, scheduler.sigmas[:-1].numpy(), rtol=1e-6)


def test_a_bundle_of_such_configs_gives_the_images_of_diffusers(folder: Path, tmp_path: Path) -> None:
    """The whole way but for ONNX: another scheduler in the index, and keys left out in every config."""
    edit_config(folder, "index", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    edit_config(folder, "transformer", **left_out("norm_eps", "in_channels", "out_channels", "timestep_scale"))
    edit_config(folder, "text_encoder", **left_out("attn_logit_softcapping", "rope_parameters", "sliding_window"))
    edit_config(folder, "vae", **left_out("decoder_act_fns", "decoder_norm_types"))
    context = PartContext(tmp_path, "cpu", lambda found: None)
    bundle = without_onnx(context, open_checkpoint(str(folder)), "left-out", "fp32")
    pipeline = diffusers.SanaPipeline.from_pretrained(folder)
    pipeline.text_encoder.set_attn_implementation("eager")
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"height": 96, "width": 160, "use_resolution_binning": False, "num_inference_steps": 3}
    wanted = pipeline("a fox", generator=torch.Generator().manual_seed(4), output_type="latent", **options).images
    found = SanaRuntime.from_pretrained(bundle, backend="torch")("a fox", seed=4, output_type="latent", **options)
    assert error(torch.from_numpy(np.asarray(found.images)), wanted) <= 1e-4
