"""What each way to quantize a layer costs: the error of its outputs, for the layers of a transformer of published width.

python benchmarks/quantization_layers.py -o benchmarks/out/quantization-layers.md

Two blocks of each transformer with the weights of `sana-export synth --hot`, and inputs from diffusers' network: latents between
smooth images and noise at several timesteps. What a method learns comes from other latents than those it is measured on.
"""

from __future__ import annotations

import argparse
import math
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import SanaTransformer2DModel

from sana_export.export.quantize.compensation import round_with_compensation
from sana_export.export.quantize.grids import round_fp8
from sana_export.export.quantize.low_rank import low_rank_branch
from sana_export.export.quantize.ranges import activation_scale, input_importance, quantized
from sana_export.export.quantize.rescaling import rescaling
from sana_export.export.quantize.rounding import round_to_nearest, round_with_search
from sana_export.formats.arrays import Float32
from sana_export.formats.dtypes import WEIGHT_DTYPES
from sana_export.machine import describe_machine, describe_versions
from sana_export.synth.weights import fill
from sana_export.variants import VARIANTS

VARIANT_NAMES = ("sana-600m-1024px", "sana-1600m-1024px")
BLOCKS, ROWS, RANK = 2, 512, 32
#: So many output channels of a layer at most, at equal distances. Scales belong to output channels, so the others change little.
OUTPUTS = 1120
#: Latent pixels along each side: 512 px.
SIDE = 16
#: The timesteps of what methods learn from, and of what they are measured on.
TIMESTEPS = {"calibration": tuple(range(50, 1000, 100)), "test": (200, 400, 600, 800)}
#: Our name of each kind of layer, and diffusers' names in a block of the layers that it consists of.
KINDS = {
    "qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "out": ("attn1.to_out.0",),
    "cross_query": ("attn2.to_q",),
    "cross_out": ("attn2.to_out.0",),
    "inverted": ("ff.conv_inverted",),
    "point": ("ff.conv_point",),
}
HALF = WEIGHT_DTYPES["float16"]


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer, with what methods may know of its inputs."""

    #: [in, out].
    weight: Float32
    #: [R, in].
    rows: Float32
    #: The largest magnitude of each input [in].
    maximum: Float32


#: Gives the outputs [R, out] of a quantized layer for inputs [R, in].
Outputs = Callable[[Float32], Float32]
Weights = Callable[[Layer], Float32]
Inputs = Callable[[Layer, Float32], Float32]


def near(layer: Layer, bits: int) -> Float32:
    return round_to_nearest(layer.weight, f"int{bits}", *_layout(bits), HALF).numbers


def searched(layer: Layer, bits: int) -> Float32:
    importance = np.square(layer.rows).mean(axis=0)
    return round_with_search(layer.weight, f"int{bits}", *_layout(bits), HALF, importance).numbers


def compensated(layer: Layer, bits: int) -> Float32:
    return round_with_compensation(layer.weight, layer.rows, f"int{bits}", _layout(bits)[1], HALF).numbers


def _layout(bits: int) -> tuple[int, int]:
    """The axis and the block of the scales."""
    return (1, 0) if bits == 8 else (0, 32)


def fp8_weight(layer: Layer) -> Float32:
    scales = np.maximum(np.abs(layer.weight).max(axis=0), 1e-30) / 448
    return round_fp8(layer.weight / scales) * scales


def nvfp4(values: Float32) -> Float32:
    """`values` [in, n] as FP4 (E2M1) in blocks of 16 along the first axis, with FP8 scales and one float32 scale for all."""
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    blocks = values.reshape(-1, 16, values.shape[1])
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    whole = max(float(largest.max()), 1e-30) / (6 * 448)
    scales = round_fp8(largest / (6 * whole)) * whole
    scaled = np.abs(blocks) / np.where(scales > 0, scales, 1)
    found = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, scaled)] * scales
    return (np.sign(blocks) * found).astype(np.float32).reshape(values.shape)


def ranged(layer: Layer, inputs: Float32, dtype: str, method: str) -> Float32:
    return quantized(inputs, activation_scale(layer.rows, float(layer.maximum.max()), dtype, method), dtype)


def ranged_for_outputs(layer: Layer, inputs: Float32) -> Float32:
    importance = input_importance(layer.weight, layer.rows)
    return quantized(inputs, activation_scale(layer.rows, float(layer.maximum.max()), "int8", "mse", importance), "int8")


def fp8_exact(layer: Layer, inputs: Float32) -> Float32:
    """Without the headroom of `activation_scale`."""
    return quantized(inputs, float(layer.maximum.max()) / 448, "fp8")


def each_row(layer: Layer, inputs: Float32) -> Float32:
    scales = np.maximum(np.abs(inputs).max(axis=1, keepdims=True), 1e-30) / 127
    return (np.rint(inputs / scales) * scales).astype(np.float32)


def plain(weights: Weights, inputs: Inputs | None = None) -> Callable[[Layer], Outputs]:
    def prepare(layer: Layer) -> Outputs:
        numbers = weights(layer)
        return lambda rows: (rows if inputs is None else inputs(layer, rows)) @ numbers

    return prepare


def low_rank(weights: Weights) -> Callable[[Layer], Outputs]:
    def prepare(layer: Layer) -> Outputs:
        down, up = low_rank_branch(layer.weight, layer.rows, RANK)
        numbers = down @ up + weights(Layer(layer.weight - down @ up, layer.rows, layer.maximum))
        return lambda rows: rows @ numbers

    return prepare


def rescaled(method: Callable[[Layer], Outputs], weights: Weights, inputs: Inputs | None = None) -> Callable[[Layer], Outputs]:
    """`method` after a rescaling that is chosen for `weights` and `inputs`."""

    def prepare(layer: Layer) -> Outputs:
        factors = chosen_factors(layer, weights, inputs)
        outputs = method(Layer(layer.weight * factors[:, None], layer.rows / factors, layer.maximum / factors))
        return lambda rows: outputs(rows / factors)

    return prepare


@lru_cache(maxsize=8)
def chosen_factors(layer: Layer, weights: Weights, inputs: Inputs | None) -> Float32:
    def quantize_rows(rows: Float32, maximum: Float32) -> Float32:
        assert inputs is not None
        return inputs(Layer(layer.weight, rows, maximum), rows)

    return rescaling(
        layer.weight,
        layer.maximum,
        layer.rows,
        lambda weight: weights(Layer(weight, layer.rows, layer.maximum)),
        None if inputs is None else quantize_rows,
    )


near8, near4 = partial(near, bits=8), partial(near, bits=4)
int8_max, int8_mse = partial(ranged, dtype="int8", method="max"), partial(ranged, dtype="int8", method="mse")
fp8_max = partial(ranged, dtype="fp8", method="max")
METHODS: dict[str, Callable[[Layer], Outputs]] = {
    "INT8 weights": plain(near8),
    "INT8 weights, searched scales": plain(partial(searched, bits=8)),
    "INT8 weights, compensated": plain(partial(compensated, bits=8)),
    "W8A8, largest magnitude": plain(near8, int8_max),
    "W8A8, 99.99th percentile": plain(near8, partial(ranged, dtype="int8", method="percentile")),
    "W8A8, least error": plain(near8, int8_mse),
    "W8A8, least error of the outputs": plain(near8, ranged_for_outputs),
    "W8A8, rescaled": rescaled(plain(near8, int8_max), near8, int8_max),
    "W8A8, rescaled, least error": rescaled(plain(near8, int8_mse), near8, int8_max),
    "W8A8, rescaled, least error of the outputs": rescaled(plain(near8, ranged_for_outputs), near8, int8_max),
    "W8A8, a range for each row": plain(near8, each_row),
    "W8A8, rescaled, a range for each row": rescaled(plain(near8, each_row), near8, each_row),
    "FP8": plain(fp8_weight, fp8_max),
    "FP8, rescaled": rescaled(plain(fp8_weight, fp8_max), fp8_weight, fp8_max),
    "FP8, no headroom": plain(fp8_weight, fp8_exact),
    "FP8, rescaled, no headroom": rescaled(plain(fp8_weight, fp8_exact), fp8_weight, fp8_exact),
    "INT4 weights": plain(near4),
    "INT4, searched scales": plain(partial(searched, bits=4)),
    "INT4, rescaled": rescaled(plain(near4), near4),
    "INT4, compensated": plain(partial(compensated, bits=4)),
    "INT4, rescaled, compensated": rescaled(plain(partial(compensated, bits=4)), near4),
    f"INT4, rank {RANK}": low_rank(near4),
    f"INT4, rank {RANK}, compensated": low_rank(partial(compensated, bits=4)),
    "NVFP4 weights": plain(lambda layer: nvfp4(layer.weight)),
    "NVFP4 weights and inputs": plain(lambda layer: nvfp4(layer.weight), lambda layer, rows: nvfp4(rows.T).T),
}


@torch.no_grad()
def build(alias: str) -> Any:
    """The first blocks of a hot transformer, in float32."""
    with init_empty_weights(include_buffers=False):
        model = SanaTransformer2DModel(**{**VARIANTS[alias].transformer, "num_layers": BLOCKS}).eval()
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.empty(value.shape), requires_grad=False))
    fill(model, "transformer", 0, hot=True)
    return model


@torch.no_grad()
def collect(model: Any, timesteps: tuple[int, ...], seed: int) -> dict[str, list[Float32]]:
    """The inputs [n, in] of each kind of layer in the last block, one array for each timestep."""
    found: dict[str, list[Float32]] = {kind: [] for kind in KINDS}
    generator = torch.Generator().manual_seed(seed)

    def watch(kind: str) -> Any:
        def hook(_module: Any, inputs: Any, _output: Any) -> None:
            rows = inputs[0] if inputs[0].ndim == 3 else inputs[0].flatten(2).transpose(1, 2)
            found[kind].append(rows.flatten(0, 1).numpy())

        return hook

    block = model.transformer_blocks[-1]
    hooks = [block.get_submodule(names[0]).register_forward_hook(watch(kind)) for kind, names in KINDS.items()]
    for timestep in timesteps:
        coarse = torch.randn(1, 32, SIDE // 8, SIDE // 8, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic")
        noise, share = torch.randn(1, 32, SIDE, SIDE, generator=generator), timestep / 1000
        prompt = torch.randn(1, 40, model.config.caption_channels, generator=generator)
        model((1 - share) * smooth + share * noise, prompt, torch.tensor([timestep]))
    for hook in hooks:
        hook.remove()
    return found


def layers(alias: str) -> Iterator[tuple[str, Layer, Float32]]:
    """Each kind of layer, and the rows that it is measured on."""
    model = build(alias)
    seen, fresh = (collect(model, timesteps, seed) for seed, timesteps in enumerate(TIMESTEPS.values()))
    for kind, names in KINDS.items():
        parts = [model.transformer_blocks[-1].get_submodule(name).weight.flatten(1).T for name in names]
        maximum = np.concatenate([np.abs(part).max(axis=0, keepdims=True) for part in seen[kind]]).max(axis=0)
        rows, test = (_sample(np.concatenate(found[kind])) for found in (seen, fresh))
        weight = torch.cat(parts, dim=1)
        weight = weight[:, :: -(-weight.shape[1] // OUTPUTS)]
        yield kind, Layer(np.ascontiguousarray(weight.numpy()), rows, maximum), test


def _sample(rows: Float32) -> Float32:
    chosen = np.random.default_rng(0).choice(len(rows), ROWS, replace=False)
    return np.ascontiguousarray(rows[np.sort(chosen)])


def decibels(found: Float32, wanted: Float32) -> float:
    """The mean over the output channels of the squared error over the square, in dB below 0."""
    shares = np.square(found - wanted).sum(axis=0, dtype=np.float64) / np.square(wanted).sum(axis=0, dtype=np.float64)
    return -10 * math.log10(shares.mean())


def measure(alias: str) -> str:
    """The table of one transformer."""
    cells: dict[str, list[str]] = {name: [] for name in METHODS}
    for kind, layer, rows in layers(alias):
        wanted = rows @ layer.weight
        for name, method in METHODS.items():
            cells[name].append(f"{decibels(method(layer)(rows), wanted):.1f}")
        print(alias, kind, layer.weight.shape, f"{process_time():.0f} s", [row[-1] for row in cells.values()], flush=True)
    header = f"| {alias} | {' | '.join(KINDS)} |\n|---|{'---:|' * len(KINDS)}\n"
    return header + "".join(f"| {name} | {' | '.join(row)} |\n" for name, row in cells.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="the Markdown file to write")
    parser.add_argument("--variants", nargs="+", default=VARIANT_NAMES, choices=VARIANT_NAMES)
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    tables = "\n".join(measure(alias) for alias in options.variants)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    machine, versions = describe_machine(), describe_versions()
    options.output.write_text(
        f"# Errors of quantized layers\n\n{tables}\n"
        f"**Conditions.** {machine['cores']} cores of an {machine['cpu']}, one thread, Python {machine['python']}, "
        f"{', '.join(f'{name} {versions[name]}' for name in ('numpy', 'torch', 'diffusers'))}. "
        f"{process_time():.0f} CPU seconds, peak {peak:.1f} GB.\n"
    )


if __name__ == "__main__":
    main()
