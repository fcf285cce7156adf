"""What the deployment graphs and the sampler implement of the classes in a checkpoint: a rule for each key of their configs.

The rules are for complete configs, with a value for every key (checkpoint/configs.py). A key without a rule may have any value
that its class accepts: the graphs read it, or it has no effect on sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sana_export.contract import MAX_TOKENS


@dataclass(frozen=True)
class ConfigRule:
    """The values of a key that are supported."""

    #: What they are, for an error.
    wanted: str
    #: Whether a value is one of them.
    accepts: Callable[[Any], bool]


@dataclass(frozen=True)
class Unsupported:
    """A key whose value is not supported."""

    #: The key.
    key: str
    #: Its value, and where that comes from if it is not in the file.
    found: str
    #: What is supported.
    wanted: str


def one_of(*values: object) -> ConfigRule:
    """Only `values`."""
    return ConfigRule(" or ".join(map(repr, values)), lambda value: value in values)


def each_of(*names: str) -> ConfigRule:
    """One of `names`, or a list of them with an item for each stage."""
    return ConfigRule(" or ".join(names), lambda value: set([value] if isinstance(value, str) else value) <= set(names))


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _stages(least: int) -> ConfigRule:
    """A whole number for each of several stages."""
    wanted = f"a list of at least two whole numbers, each {least} or more"
    return ConfigRule(wanted, lambda value: len(value) > 1 and all(_whole(item, least) for item in value))


def _kernels(value: Sequence[Sequence[int]]) -> bool:
    """Whether these are lists of kernel sizes that keep the size of an image."""
    return all(_whole(size, 1) and size % 2 for row in value for size in row)


NUMBER = ConfigRule("a number", _number)
POSITIVE = ConfigRule("a positive number", lambda value: _number(value) and value > 0)
POSITIVE_OR_NONE = ConfigRule("a positive number or null", lambda value: value is None or (_number(value) and value > 0))
WHOLE = ConfigRule("a whole number, 1 or more", lambda value: _number(value) and isinstance(value, int) and value > 0)
OFF = one_of(False, None)
#: Blocks, norms, activations, upsamplings and downsamplings of an autoencoder (graphs/vae_blocks.py has a table for each).
VAE_BLOCKS = ("ResBlock", "EfficientViTBlock")
VAE_NORMS = ("rms_norm", "batch_norm")
VAE_ACTIVATIONS = ("silu", "swish", "relu")
VAE_UPSAMPLES = ("interpolate", "pixel_shuffle")
VAE_DOWNSAMPLES = ("Conv", "pixel_unshuffle")

TRAIN_STEPS = ConfigRule("a positive whole number, at most 1000000", lambda value: _whole(value, 1) and value <= 10**6)
TERMINAL = ConfigRule("a number from 0 to below 1, or null", lambda value: value is None or (_number(value) and 0 <= value < 1))
FRACTION = ConfigRule("a number between 0 and 1", lambda value: _number(value) and 0 < value < 1)

#: Solvers that came from diffusion, as they sample a flow.
_FLOW_PREDICTION: Mapping[str, ConfigRule] = {
    "solver_order": ConfigRule("1 or 2 or 3", lambda value: _whole(value, 1) and value <= 3),
    "prediction_type": one_of("flow_prediction"),
    "use_flow_sigmas": one_of(True),
    "final_sigmas_type": one_of("zero", "sigma_min"),
    "thresholding": OFF,
    "num_train_timesteps": TRAIN_STEPS,
    "flow_shift": POSITIVE,
    **dict.fromkeys(("beta_start", "beta_end"), FRACTION),
}
#: With Karras, exponential or beta sigmas these compute logarithms of negative numbers in diffusers. `use_dynamic_shifting` has no
#: effect on them, because the pipelines do not give them a `mu`.
_DPM_SOLVER: Mapping[str, ConfigRule] = {
    **_FLOW_PREDICTION,
    "algorithm_type": one_of("dpmsolver++"),
    "solver_type": one_of("midpoint", "heun"),
    **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), OFF),
}
_FLOW: Mapping[str, ConfigRule] = {"num_train_timesteps": TRAIN_STEPS, "shift": POSITIVE}
_FLOW_MATCH: Mapping[str, ConfigRule] = {
    "shift_terminal": TERMINAL,
    **dict.fromkeys(("invert_sigmas", "use_dynamic_shifting", "use_beta_sigmas"), OFF),
    **_FLOW,
}

#: The rules for each class, by key.
SUPPORTED: Mapping[str, Mapping[str, ConfigRule]] = {
    "SanaTransformer2DModel": {
        "patch_size": one_of(1),
        "attention_bias": one_of(False),
        "norm_elementwise_affine": one_of(False),
        "qk_norm": one_of(None, "rms_norm_across_heads"),
        "num_cross_attention_heads": WHOLE,
        "cross_attention_head_dim": WHOLE,
        "sample_size": WHOLE,
        "interpolation_scale": POSITIVE_OR_NONE,
        "norm_eps": POSITIVE,
        "timestep_scale": NUMBER,
        "guidance_embeds_scale": NUMBER,
    },
    "SanaControlNetModel": {
        "patch_size": one_of(1),
        "attention_bias": one_of(False),
        "norm_elementwise_affine": one_of(False),
        "num_layers": WHOLE,
        "sample_size": WHOLE,
        "interpolation_scale": POSITIVE_OR_NONE,
        "norm_eps": POSITIVE,
    },
    "AutoencoderDC": {
        "in_channels": one_of(3),
        "latent_channels": WHOLE,
        "attention_head_dim": WHOLE,
        "encoder_block_out_channels": _stages(1),
        "decoder_block_out_channels": _stages(1),
        "decoder_layers_per_block": _stages(0),
        "decoder_block_types": each_of(*VAE_BLOCKS),
        "decoder_norm_types": each_of(*VAE_NORMS),
        "decoder_act_fns": each_of(*VAE_ACTIVATIONS),
        "decoder_qkv_multiscales": ConfigRule("a list of odd kernel sizes for each stage", _kernels),
        "decoder_conv_act_fn": one_of(*VAE_ACTIVATIONS),
        "decoder_in_shortcut": one_of(True, False),
        "upsample_block_type": one_of(*VAE_UPSAMPLES),
        "scaling_factor": POSITIVE,
    },
    "Gemma2Model": {
        "hidden_activation": one_of("gelu_pytorch_tanh"),
        "attention_bias": one_of(False),
        "use_bidirectional_attention": OFF,
        "layer_types": each_of("sliding_attention", "full_attention"),
        "sliding_window": ConfigRule(f"at least {MAX_TOKENS}, or null", lambda value: value is None or value >= MAX_TOKENS),
        "attn_logit_softcapping": POSITIVE_OR_NONE,
        "query_pre_attn_scalar": POSITIVE,
        "rms_norm_eps": POSITIVE,
        "rope_parameters": ConfigRule(
            "a rope_theta without scaling (rope_type 'default')",
            lambda value: value.get("rope_type") == "default" and _number(value.get("rope_theta")) and value["rope_theta"] > 0,
        ),
    },
    "DPMSolverMultistepScheduler": {
        **_DPM_SOLVER,
        "algorithm_type": one_of("dpmsolver++", "sde-dpmsolver++"),
        "use_lu_lambdas": OFF,
    },
    "DPMSolverSinglestepScheduler": _DPM_SOLVER,
    "UniPCMultistepScheduler": {
        **_FLOW_PREDICTION,
        "solver_type": one_of("bh1", "bh2"),
        "predict_x0": one_of(True),
        "solver_p": one_of(None),
        "disable_corrector": ConfigRule("a list of whole numbers", lambda value: all(_whole(item, 0) for item in value or ())),
        "shift_terminal": TERMINAL,
        **dict.fromkeys(("use_exponential_sigmas", "use_beta_sigmas", "use_dynamic_shifting"), OFF),
        **dict.fromkeys(("sigma_min", "sigma_max"), POSITIVE_OR_NONE),
    },
    "FlowMatchEulerDiscreteScheduler": _FLOW_MATCH,
    "FlowMatchHeunDiscreteScheduler": _FLOW,
    "FlowMatchLCMScheduler": {**_FLOW_MATCH, "scale_factors": one_of(None, [])},
    "SCMScheduler": {
        "prediction_type": one_of("trigflow"),
        "num_train_timesteps": TRAIN_STEPS,
        "sigma_data": POSITIVE,
    },
}

#: The rules for an autoencoder's encoder, which only an export with the graph `vae_encoder` reads.
ENCODER: Mapping[str, ConfigRule] = {
    "encoder_block_types": each_of(*VAE_BLOCKS),
    "encoder_layers_per_block": _stages(0),
    "encoder_qkv_multiscales": ConfigRule("a list of odd kernel sizes for each stage", _kernels),
    "downsample_block_type": one_of(*VAE_DOWNSAMPLES),
    "encoder_out_shortcut": one_of(True, False),
}

#: The classes of diffusers whose schedules can be sampled.
SCHEDULERS = tuple(name for name in SUPPORTED if name.endswith("Scheduler"))


def unsupported(class_name: str, config: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[Unsupported]:
    """The keys of the complete `config` of a class that have an unsupported value. `given` is the content of the config's file."""
    yield from _unsupported(SUPPORTED[class_name], TOGETHER.get(class_name, lambda _: iter(())), class_name, config, given)


def unsupported_encoder(config: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[Unsupported]:
    """The keys of the complete `config` of an AutoencoderDC whose value the graph `vae_encoder` does not support."""
    yield from _unsupported(ENCODER, _encoder_together, "AutoencoderDC", config, given)


def _unsupported(
    rules: Mapping[str, ConfigRule],
    together: Callable[[Mapping[str, Any]], Iterator[Unsupported]],
    class_name: str,
    config: Mapping[str, Any],
    given: Mapping[str, Any],
) -> Iterator[Unsupported]:
    """The keys that break one of `rules`, or if there are none, what `together` finds."""
    found = [key for key, rule in rules.items() if not _accepted(rule, config, key)]
    for key in found:
        source = "" if key in given else f" (the default of {class_name}: the key is missing)"
        yield Unsupported(key, f"{config.get(key)!r}{source}", rules[key].wanted)
    if not found:
        yield from together(config)


def _accepted(rule: ConfigRule, config: Mapping[str, Any], key: str) -> bool:
    try:
        return rule.accepts(config[key])
    except (TypeError, ValueError, AttributeError, KeyError):  # a value of another type
        return False


def _vae_together(config: Mapping[str, Any]) -> Iterator[Unsupported]:
    """Entries of an autoencoder's config that are supported alone but not together."""
    widths, depths = config["decoder_block_out_channels"], config["decoder_layers_per_block"]
    for key in ("decoder_layers_per_block", "decoder_block_types", "decoder_norm_types", "decoder_act_fns"):
        if not isinstance(config[key], str) and len(config[key]) != len(widths):
            yield Unsupported(
                key, f"{len(config[key])} entries", f"{len(widths)}, one for each entry of decoder_block_out_channels"
            )
            return
    if len(stages := config["encoder_block_out_channels"]) != len(widths):
        wanted = f"{len(stages)}, as in encoder_block_out_channels"
        yield Unsupported("decoder_block_out_channels", f"{len(widths)} stages", wanted)
    if 0 in depths[1:-1]:
        yield Unsupported("decoder_layers_per_block", repr(depths), "at least 1 except in the first and the last stage")
    for stage, (upper, lower) in enumerate(pairwise(widths)):
        if depths[stage] and 4 * upper % lower:  # the shortcut moves channels to pixels
            yield Unsupported("decoder_block_out_channels", repr(widths), f"{lower} is a divisor of 4 times {upper}")
    if len(kernels := config["decoder_qkv_multiscales"]) < len(widths):
        yield Unsupported("decoder_qkv_multiscales", f"{len(kernels)} entries", f"{len(widths)}, one for each stage")
    if config["decoder_in_shortcut"] and widths[-1] % config["latent_channels"]:
        yield Unsupported(
            "latent_channels", repr(config["latent_channels"]), f"a divisor of the lowest stage's {widths[-1]} channels"
        )


def _encoder_together(config: Mapping[str, Any]) -> Iterator[Unsupported]:
    """Entries for the encoder that are supported alone but not together. The widths are lists (`SUPPORTED`)."""
    widths, depths = config["encoder_block_out_channels"], config["encoder_layers_per_block"]
    for key in ("encoder_layers_per_block", "encoder_block_types"):
        if not isinstance(config[key], str) and len(config[key]) != len(widths):
            wanted = f"{len(widths)}, one for each entry of encoder_block_out_channels"
            yield Unsupported(key, f"{len(config[key])} entries", wanted)
            return
    if 0 in depths[1:-1]:
        yield Unsupported("encoder_layers_per_block", repr(depths), "at least 1 except in the first and the last stage")
    for stage, (upper, lower) in enumerate(pairwise(widths)):
        if depths[stage] and 4 * upper % lower:  # the shortcut averages groups of channels
            yield Unsupported("encoder_block_out_channels", repr(widths), f"{lower} is a divisor of 4 times {upper}")
    if len(kernels := config["encoder_qkv_multiscales"]) < len(widths):
        yield Unsupported("encoder_qkv_multiscales", f"{len(kernels)} entries", f"{len(widths)}, one for each stage")
    if config["encoder_out_shortcut"] and widths[-1] % config["latent_channels"]:
        yield Unsupported(
            "latent_channels", repr(config["latent_channels"]), f"a divisor of the encoder's lowest stage, {widths[-1]} channels"
        )


def _betas_together(config: Mapping[str, Any], reads: bool) -> Iterator[Unsupported]:
    """Noise schedules of a diffusion that are not implemented, if the scheduler `reads` one."""
    rules = {"beta_schedule": one_of("linear", "scaled_linear"), "trained_betas": one_of(None), "rescale_betas_zero_snr": OFF}
    for key, rule in rules.items() if reads else ():
        if not rule.accepts(config.get(key)):
            yield Unsupported(key, repr(config.get(key)), rule.wanted)


def _dpm_together(config: Mapping[str, Any]) -> Iterator[Unsupported]:
    yield from _betas_together(config, config["final_sigmas_type"] == "sigma_min")


def _unipc_together(config: Mapping[str, Any]) -> Iterator[Unsupported]:
    yield from _betas_together(config, bool(config["use_karras_sigmas"]))
    if config["solver_order"] > 1 and config["final_sigmas_type"] == "zero" and not config["lower_order_final"]:
        yield Unsupported("lower_order_final", repr(config["lower_order_final"]), "True, because the last sigma is 0")


def _flow_together(config: Mapping[str, Any]) -> Iterator[Unsupported]:
    if config["use_karras_sigmas"] and config["use_exponential_sigmas"]:
        yield Unsupported("use_exponential_sigmas", "True", "False, because use_karras_sigmas is True")


#: What is checked of several keys of a class together, if each key alone is supported.
TOGETHER: Mapping[str, Callable[[Mapping[str, Any]], Iterator[Unsupported]]] = {
    "AutoencoderDC": _vae_together,
    "DPMSolverMultistepScheduler": _dpm_together,
    "DPMSolverSinglestepScheduler": _dpm_together,
    "UniPCMultistepScheduler": _unipc_together,
    "FlowMatchEulerDiscreteScheduler": _flow_together,
    "FlowMatchLCMScheduler": _flow_together,
}
