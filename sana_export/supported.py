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


def _widths(value: Sequence[int]) -> bool:
    """Whether each stage's shortcut can move the channels of the stage below it to pixels."""
    return len(value) == VAE_STAGES and all(4 * upper % lower == 0 for upper, lower in pairwise(value))


NUMBER = ConfigRule("a number", _number)
POSITIVE = ConfigRule("a positive number", lambda value: _number(value) and value > 0)
POSITIVE_OR_NONE = ConfigRule("a positive number or null", lambda value: value is None or (_number(value) and value > 0))
WHOLE = ConfigRule("a whole number, 1 or more", lambda value: _number(value) and isinstance(value, int) and value > 0)
OFF = one_of(False, None)
#: The stages of an autoencoder with 32 image pixels per latent pixel.
VAE_STAGES = 6

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
    "AutoencoderDC": {
        "in_channels": one_of(3),
        "encoder_block_out_channels": ConfigRule(f"{VAE_STAGES} stages", lambda value: len(value) == VAE_STAGES),
        "decoder_block_out_channels": ConfigRule(
            f"the widths of {VAE_STAGES} stages, each a divisor of 4 times the width before it", _widths
        ),
        "decoder_layers_per_block": ConfigRule("at least 1 layer in every stage", lambda value: min(value) > 0),
        "decoder_block_types": each_of("ResBlock", "EfficientViTBlock"),
        "decoder_norm_types": each_of("rms_norm"),
        "decoder_act_fns": each_of("silu"),
        "decoder_conv_act_fn": one_of("relu"),
        "upsample_block_type": one_of("interpolate"),
        "decoder_in_shortcut": one_of(True),
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
        "algorithm_type": one_of("dpmsolver++"),
        "solver_type": one_of("midpoint"),
        "solver_order": one_of(1, 2),
        "prediction_type": one_of("flow_prediction"),
        "use_flow_sigmas": one_of(True),
        "final_sigmas_type": one_of("zero"),
        **dict.fromkeys(("thresholding", "use_lu_lambdas", "use_dynamic_shifting"), OFF),
        **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), OFF),
        **dict.fromkeys(("num_train_timesteps", "flow_shift"), POSITIVE),
    },
    "FlowMatchEulerDiscreteScheduler": {
        "shift_terminal": one_of(None),
        **dict.fromkeys(("invert_sigmas", "use_dynamic_shifting"), OFF),
        **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), OFF),
        **dict.fromkeys(("num_train_timesteps", "shift"), POSITIVE),
    },
    "SCMScheduler": {
        "prediction_type": one_of("trigflow"),
        **dict.fromkeys(("num_train_timesteps", "sigma_data"), POSITIVE),
    },
}

#: The classes of diffusers whose schedules can be sampled.
SCHEDULERS = tuple(name for name in SUPPORTED if name.endswith("Scheduler"))


def unsupported(class_name: str, config: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[Unsupported]:
    """The keys of the complete `config` of a class that have an unsupported value. `given` is the content of the config's file."""
    for key, rule in SUPPORTED[class_name].items():
        try:
            accepted = rule.accepts(config[key])
        except (TypeError, ValueError, AttributeError, KeyError):  # a value of another type
            accepted = False
        if not accepted:
            source = "" if key in given else f" (the default of {class_name}: the key is missing)"
            yield Unsupported(key, f"{config.get(key)!r}{source}", rule.wanted)
