"""The table of checkpoints: the exact published configs, parameter counts of the real classes, and recognition."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch
from transformers import Gemma2Config, Gemma2Model

from sana_export.architectures import (
    AUTOENCODER,
    AUTOENCODER_DEFAULTS,
    LITE,
    SCHEDULER_DEFAULTS,
    TEXT_ENCODER,
    TRANSFORMER_DEFAULTS,
)
from sana_export.supported import SUPPORTED
from sana_export.variants import VARIANTS, recognize

QK = "rms_norm_across_heads"
#: The values of KEYS, and the flow shift (None: SCMScheduler).
PUBLISHED: dict[str, tuple[tuple[Any, ...], float | None]] = {
    "Sana_600M_512px": ((36, 28, 16, 72, 16, None, None, False), 3.0),
    "Sana_600M_1024px": ((36, 28, 16, 72, 32, None, None, False), 3.0),
    "Sana_1600M_512px": ((70, 20, 20, 112, 16, None, None, False), 3.0),
    "Sana_1600M_512px_MultiLing": ((70, 20, 20, 112, 16, None, None, False), 3.0),
    "Sana_1600M_1024px": ((70, 20, 20, 112, 32, None, None, False), 3.0),
    "Sana_1600M_1024px_MultiLing": ((70, 20, 20, 112, 32, None, None, False), 3.0),
    "Sana_1600M_1024px_BF16": ((70, 20, 20, 112, 32, None, None, False), 3.0),
    "Sana_1600M_2Kpx_BF16": ((70, 20, 20, 112, 64, 1.0, None, False), 3.0),
    "Sana_1600M_4Kpx_BF16": ((70, 20, 20, 112, 128, 2.0, None, False), 6.0),
    "SANA1.5_1.6B_1024px": ((70, 20, 20, 112, 32, None, QK, False), 3.0),
    "SANA1.5_4.8B_1024px": ((70, 60, 20, 112, 32, None, QK, False), 3.0),
    "Sana_Sprint_0.6B_1024px": ((36, 28, 16, 72, 32, None, QK, True), None),
    "Sana_Sprint_1.6B_1024px": ((70, 20, 20, 112, 32, None, QK, True), None),
}
KEYS = (
    *("num_attention_heads", "num_layers", "num_cross_attention_heads", "cross_attention_head_dim", "sample_size"),
    *("interpolation_scale", "qk_norm", "guidance_embeds"),
)
CLAMPED = {name for name in PUBLISHED if not name.endswith("BF16") and name.startswith("Sana_") and "Sprint" not in name}
BY_NAME = {
    (variant.repo or "").removeprefix("Efficient-Large-Model/").removesuffix("_diffusers"): variant for variant in VARIANTS.values()
}


def test_the_table_has_the_published_checkpoints() -> None:
    assert {name for name in BY_NAME if name} == set(PUBLISHED)
    assert {name for name in PUBLISHED if BY_NAME[name].clamp} == CLAMPED
    assert len(CLAMPED) == 6
    for name, variant in BY_NAME.items():
        if name:
            assert variant.weights_variant == ("fp16" if name in CLAMPED else "bf16")
            assert (variant.steps, variant.guidance_scale) == ((2, 4.5) if "Sprint" in name else (20, 4.5))


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformer_configs_are_the_published_ones(name: str) -> None:
    values, _ = PUBLISHED[name]
    config = BY_NAME[name].transformer
    assert tuple(config[key] for key in KEYS) == values
    width = config["num_attention_heads"] * 32
    same = {
        **{"in_channels": 32, "out_channels": 32, "attention_head_dim": 32, "caption_channels": 2304, "mlp_ratio": 2.5},
        **{"dropout": 0.0, "attention_bias": False, "patch_size": 1, "norm_elementwise_affine": False, "norm_eps": 1e-6},
        **{"timestep_scale": 1.0, "guidance_embeds_scale": 0.1, "cross_attention_dim": width},
    }
    assert config == {**dict(zip(KEYS, values, strict=True)), **same}
    with torch.device("meta"):
        made = diffusers.SanaTransformer2DModel(**config)
    assert {key: value for key, value in made.config.items() if not key.startswith("_")} == config
    assert (made.patch_embed.pos_embed is not None) == (values[5] is not None)


@pytest.mark.parametrize("name", PUBLISHED)
def test_schedulers_are_the_published_ones(name: str) -> None:
    config = dict(BY_NAME[name].scheduler)
    scheduler = getattr(diffusers, config.pop("_class_name"))(**config)
    shift = PUBLISHED[name][1]
    assert BY_NAME[name].flow_shift == shift
    if shift is None:
        assert isinstance(scheduler, diffusers.SCMScheduler)
        assert (scheduler.config.prediction_type, scheduler.config.sigma_data) == ("trigflow", 0.5)
    else:
        assert isinstance(scheduler, diffusers.DPMSolverMultistepScheduler)
        scheduler.set_timesteps(20)
        # sigma of step i of N at shift s: s a / (1 + (s - 1) a) with a = (1 - 1/1000) (N - i) / N.
        steps = [(1 - 1 / 1000) * (20 - i) / 20 for i in range(20)]
        expected = [int(1000 * shift * a / (1 + (shift - 1) * a)) for a in steps]
        assert scheduler.timesteps.tolist() == expected


def test_defaults_are_those_of_the_installed_classes() -> None:
    signature = inspect.signature(diffusers.SanaTransformer2DModel.__init__).parameters
    assert {name: value.default for name, value in signature.items() if name != "self"} == TRANSFORMER_DEFAULTS
    vae = inspect.signature(diffusers.AutoencoderDC.__init__).parameters
    assert {name: value.default for name, value in vae.items() if name != "self"} == AUTOENCODER_DEFAULTS
    assert set(AUTOENCODER_DEFAULTS) == set(AUTOENCODER) >= set(LITE)
    assert Gemma2Config(**TEXT_ENCODER).to_dict() == Gemma2Config().to_dict()  # the class's defaults are Gemma-2-2B's
    for name, defaults in SCHEDULER_DEFAULTS.items():
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
        assert {key: parameters[key].default for key in defaults} == defaults
        assert SUPPORTED[name].keys() <= defaults.keys()
    for name, steps in (("SanaPipeline", 20), ("SanaSprintPipeline", 2)):
        call = inspect.signature(getattr(diffusers, name).__call__).parameters
        assert (call["num_inference_steps"].default, call["guidance_scale"].default) == (steps, 4.5)


def millions(network: torch.nn.Module) -> float:
    return round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 2)


def test_parameter_counts_in_the_real_classes() -> None:
    stated = {
        **{"Sana 600M": 591.75, "Sana 1600M": 1604.46, "SANA-1.5 1.6B": 1604.64, "SANA-1.5 4.8B": 4721.83},
        **{"Sprint 0.6B": 593.5, "Sprint 1.6B": 1610.24},
    }
    counted = {}
    for variant in VARIANTS.values():
        with torch.device("meta"):
            made = diffusers.SanaTransformer2DModel(**variant.transformer)
        assert sum(parameter.numel() for parameter in made.parameters()) == variant.architecture.parameters, variant.alias
        if variant.repo:
            counted[variant.architecture.name] = millions(made)
    assert counted == stated
    with torch.device("meta"):
        vae, text_encoder = diffusers.AutoencoderDC(**AUTOENCODER), Gemma2Model(Gemma2Config(**TEXT_ENCODER))
    assert millions(vae.decoder) == 159.22
    assert millions(text_encoder) == 2614.34


def found(transformer: dict[str, Any], scheduler: dict[str, Any]) -> set[str]:
    return {(variant.repo or "").split("/")[1].removesuffix("_diffusers") for variant in recognize(transformer, scheduler)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_recognized(name: str) -> None:
    variant = BY_NAME[name]
    twins = {other for other in PUBLISHED if PUBLISHED[other] == PUBLISHED[name]}
    full = dict(getattr(diffusers, variant.scheduler["_class_name"]).from_config(variant.scheduler).config)
    stored = {"_class_name": variant.scheduler["_class_name"], "_diffusers_version": "0.32.0", **full}
    written = {**variant.transformer, "_class_name": "SanaTransformer2DModel", "_diffusers_version": "0.32.0"}
    assert found(written, stored) == twins
    # Files of the first release have fewer keys.
    if not variant.architecture.qk_norm:
        old = {key: value for key, value in written.items() if key not in {"qk_norm", "guidance_embeds", "timestep_scale"}}
        assert found(old, stored) == twins


def test_configs_identify_a_checkpoint_except_for_its_clamp() -> None:
    def family(name: str) -> set[bool]:
        return {variant.clamp for variant in recognize(BY_NAME[name].transformer, BY_NAME[name].scheduler)}

    assert family("Sana_600M_1024px") == {True}
    assert family("Sana_1600M_512px") == {True}
    assert family("Sana_1600M_1024px") == {True, False}
    assert family("Sana_1600M_2Kpx_BF16") == {False}


@pytest.mark.parametrize(
    ("component", "change"),
    [
        ("transformer", {"num_layers": 21}),
        ("transformer", {"num_attention_heads": 35, "attention_head_dim": 64}),
        ("transformer", {"num_cross_attention_heads": 40, "cross_attention_head_dim": 56}),
        ("transformer", {"caption_channels": 2048}),
        ("transformer", {"sample_size": 48}),
        ("transformer", {"interpolation_scale": 1.0}),
        ("transformer", {"guidance_embeds": True}),
        ("transformer", {"qk_norm": "rms_norm"}),
        ("scheduler", {"flow_shift": 4.0}),
        ("scheduler", {"_class_name": "FlowMatchEulerDiscreteScheduler"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_another_network_or_schedule_is_not_recognized(component: str, change: dict[str, Any]) -> None:
    variant = BY_NAME["Sana_1600M_1024px"]
    configs = {"transformer": variant.transformer, "scheduler": variant.scheduler}
    assert len(recognize(**configs)) == 3
    configs[component] = {**configs[component], **change}
    assert recognize(**configs) == ()


def test_small_synthetic_checkpoints_are_not_published_ones() -> None:
    for alias in ("tiny-random", "tiny-sprint", "mid"):
        assert recognize(VARIANTS[alias].transformer, VARIANTS[alias].scheduler) == ()
    assert recognize({}, {}) == ()
