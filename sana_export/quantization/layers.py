"""Which layers take a scheme: a rule says how few bits a layer tolerates, and why not fewer.

An export applies one scheme to each part of a bundle: to a graph, or to the embedding table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from sana_export.contract import WEIGHTS_OF
from sana_export.quantization.schemes import FALLBACK, SCHEMES, Scheme

#: The name of the embedding table among the parts. It belongs to no graph.
EMBEDDINGS = "embeddings"


@dataclass(frozen=True)
class LayerRule:
    """How few bits the layers of some parameters tolerate."""

    #: A regular expression that matches the end of a parameter's name in its graph.
    pattern: str
    #: The fewest bits of its weights: 4 or 8, or 16 for a layer that keeps the bundle's precision.
    bits: int
    #: Why not fewer.
    reason: str
    #: The fewest bits of the layers' inputs.
    inputs: int = 16


_TOLERATES = "published 4-bit Sana stores it in 4 bits (deepcompressor)"
_SMALL = "small, and every step depends on it"
_EVERYTHING_ELSE = LayerRule("", 16, "no matrix: biases, norms and tables are small")
_TRANSFORMER = (
    LayerRule(r"blocks\.\d+\.qkv|\.out\.weight|\.cross_query\.weight|\.cross_out\.weight", 4, _TOLERATES, inputs=4),
    LayerRule(r"\.inverted\.weight", 4, _TOLERATES, inputs=4),
    LayerRule(r"\.point\.weight", 4, f"{_TOLERATES}; its input has outliers of 50 times its root mean square"),
    LayerRule(r"\.depthwise\.weight", 16, "nine weights for each channel: little to save, and published 4-bit Sana keeps it"),
    LayerRule(r"time_embed\..*\.weight", 16, "small: little to save"),
    LayerRule(r"(patch_embed|latents_embed|control_embed|control_in|proj_out|outputs\.\d+)\.weight", 16, _SMALL),
)
_CONTEXT = (LayerRule(r"\.weight", 16, "cross-attention's keys and values: published 4-bit Sana keeps them in 16 bits"),)
_AUTOENCODER = (
    LayerRule(
        r"\.qkv|\.attention\.out|\.inverted\.weight|\.point\.weight|\.conv[12]\.weight",
        8,
        "4 bits were never tried; rounded inputs would make most of it, the 3x3 convolutions, slower on a CPU",
    ),
    LayerRule(r"\.depthwise\.weight|\.aggregations\.\d+\.\w+\.weight", 16, "few weights for each channel"),
    LayerRule(
        r"stages\.\d+\.\d+\.weight",
        16,
        "contains the 1.0 weights of its shortcut, which set a scale too coarse for its other weights",
    ),
    LayerRule(r"conv_(in|out)\.weight", 16, "small, and the whole image depends on it"),
)
#: The rules of each part, the first that matches counts. Graphs that are not here have nothing to quantize.
LAYERS: dict[str, tuple[LayerRule, ...]] = {
    EMBEDDINGS: (LayerRule("embed_tokens", 8, "rows are looked up, not multiplied: 8 bits with a scale for each row"),),
    "text_encoder": (LayerRule(r"\.(qkv|out|gate|up|down)\.weight", 4, "weight-only 4 bits are common for language models"),),
    "context": _CONTEXT,
    "denoiser": _TRANSFORMER,
    "controlnet": _TRANSFORMER,
    "controlnet_context": _CONTEXT,
    "vae_decoder": _AUTOENCODER,
    "vae_encoder": _AUTOENCODER,
}
#: The parts of a bundle that take a scheme.
PARTS = tuple(part for part, rules in LAYERS.items() if any(rule.bits < 16 for rule in rules))
#: The parts whose inputs calibration sees. It makes latents from text, and decodes none.
CALIBRATED_PARTS = ("text_encoder", "denoiser")


def part_of(graph: str) -> str:
    """The part that `graph` belongs to. Graphs that share a weight file share a scheme."""
    return WEIGHTS_OF.get(graph, graph)


def layer_rule(part: str, parameter: str) -> LayerRule:
    """The rule for a parameter of a part's graph."""
    found = (rule for rule in LAYERS.get(part, ()) if re.search(f"({rule.pattern})$", f".{parameter}"))
    return next(found, _EVERYTHING_ELSE)


def layer_scheme(part: str, rule: LayerRule, scheme: Scheme, inputs: int) -> Scheme | None:
    """What a layer of `part` with `rule` and so many `inputs` takes of `scheme`; None if it keeps the bundle's precision.

    A layer takes `FALLBACK` if it does not tolerate the scheme's bits, or if the scheme's blocks do not divide its inputs. If the
    scheme rounds inputs, and the layer does not tolerate that or calibration does not see its inputs, it takes the weights alone.
    """
    if rule.bits > FALLBACK.bits:
        return None
    return scheme_tolerated_by(part, rule, scheme) if not scheme.block or inputs % scheme.block == 0 else FALLBACK


def scheme_tolerated_by(part: str, rule: LayerRule, scheme: Scheme) -> Scheme:
    """What a layer of `part` with `rule` takes of `scheme`."""
    if scheme.bits < rule.bits:
        return FALLBACK
    seen = not scheme.inputs or part in CALIBRATED_PARTS
    if seen and scheme.input_bits >= rule.inputs:
        return scheme
    return FALLBACK if scheme.bits == FALLBACK.bits else replace(scheme, inputs="")


def tolerated_scheme(part: str, name: str) -> str:
    """The scheme `name`, or `FALLBACK` if no layer of `part` takes it."""
    return name if any(scheme_tolerated_by(part, rule, SCHEMES[name]) is not FALLBACK for rule in LAYERS[part]) else FALLBACK.name


def rounds_inputs(part: str, scheme: Scheme) -> bool:
    """Whether a layer of `part` has rounded inputs with `scheme`."""
    return any(scheme_tolerated_by(part, rule, scheme).inputs for rule in LAYERS[part])


def reason_against(part: str, scheme: Scheme) -> str:
    """Why no layer of `part` takes `scheme`."""
    rule = min(LAYERS[part], key=lambda rule: rule.bits)
    if scheme.bits >= rule.bits and scheme.inputs:
        seen = part in CALIBRATED_PARTS
        return (
            "its layers' inputs keep the bundle's precision"
            if seen
            else "calibration, which makes latents from text, does not run it"
        )
    return rule.reason
