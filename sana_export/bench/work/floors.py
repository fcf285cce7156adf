"""The least time of an image, computed from counted work and published rates: the page benchmarks/floors.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sana_export.bench.stages import END_TO_END
from sana_export.bench.work.call_shape import CallShape, decoder_work, padded_runs, stage_work
from sana_export.bench.work.count import Rates, Work
from sana_export.bench.work.networks import Configs, MetaWeights, reference_decoder_work, reference_work, restated_work
from sana_export.checkpoint.configs import expected_shapes
from sana_export.checkpoint.vae_config import read_decoder
from sana_export.graphs.numerics import NUMERICS
from sana_export.graphs.vae_decoder import VaeDecoderTail, tile_halo, tile_scale
from sana_export.manifest import Options
from sana_export.profiles import DECODER_TILE, UNTILED_AREA
from sana_export.runtime.decoding import plan_windows
from sana_export.synth.recipes import AUTOENCODER_RECIPES, RECIPES, Config

#: Rates of dense fp16 products with fp32 accumulation, and memory bandwidth, as NVIDIA publishes them (see `_SOURCES`).
CARDS = {
    "H100 SXM": Rates(989.4e12, 3.35e12, "fp16", "published"),
    "RTX 5090": Rates(209.5e12, 1.792e12, "fp16", "published"),
    "RTX 4090": Rates(165.2e12, 1.008e12, "fp16", "published"),
    "RTX 4090 Laptop, 16 GB": Rates(85.8e12, 0.576e12, "fp16", "derived from published figures"),
}
#: Label to the recipe with the model's widths. Published for 512 and 1024 px (600M) and up to 4096 px (1600M).
MODELS = {"600M": "sana-600m-1024px", "1600M": "sana-1600m-1024px"}
SIDES = (512, 1024, 2048, 4096)
STEPS, BRANCHES = 20, 2
#: Tokens of a prompt of about one sentence, of the instruction before it, and of diffusers' padded text.
PROMPT_TOKENS, INSTRUCTION_TOKENS, TEXT_LENGTH = 20, 200, 300
#: Label to an alias of autoencoders.py. The first one is in the tables of whole images.
DECODERS = {"DC-AE": "dc-ae", "DC-AE-Lite": "dc-ae-lite"}
STAGES = ("text_encoder", "context", "denoise_loop", "vae_decoder")


@dataclass(frozen=True)
class Floor:
    """The work of one image of one model at one size."""

    #: A key of `MODELS`.
    model: str
    #: Height and width in pixels.
    side: int
    #: Stage to the work of our graphs.
    ours: dict[str, Work]
    #: Stage to the work of diffusers' modules.
    reference: dict[str, Work]


@dataclass(frozen=True)
class DecoderFloor:
    """The work of one decoder for one image."""

    #: A key of `DECODERS`.
    decoder: str
    #: Height and width in pixels.
    side: int
    #: The work of our graphs.
    ours: Work
    #: The work of diffusers' module, in one piece.
    reference: Work


def floors() -> Iterator[Floor]:
    """Every model at every size: one image with CFG."""
    for label, recipe_name in MODELS.items():
        recipe = RECIPES[recipe_name]
        configs: Configs = {"transformer": recipe.transformer, "vae": recipe.vae, "text_encoder": recipe.text_encoder}
        graph_work = restated_work(configs, Options("fp16", clamp=True))
        for side in SIDES:
            shape = image_shape(side, recipe.vae)
            half = {"transformer": "float16", "vae": "bfloat16", "text_encoder": "bfloat16"}
            yield Floor(label, side, stage_work(shape, graph_work), reference_work(configs, shape, half))


def decoder_floors() -> Iterator[DecoderFloor]:
    """Every decoder at every size."""
    recipe = RECIPES[next(iter(MODELS.values()))]
    for label, alias in DECODERS.items():
        vae = AUTOENCODER_RECIPES[alias]
        graph_work = restated_work(
            {"transformer": recipe.transformer, "vae": vae, "text_encoder": recipe.text_encoder}, Options("fp16", clamp=True)
        )
        for side in SIDES:
            shape = image_shape(side, vae)
            theirs = reference_decoder_work(vae, (1, shape.latent_height, shape.latent_width), torch.bfloat16)
            yield DecoderFloor(label, side, decoder_work(shape, graph_work), theirs)


def image_shape(side: int, vae: Config) -> CallShape:
    """The sizes of one square image of `side` pixels, as the runtime samples it and decodes it with the autoencoder `vae`."""
    scale, halo = tile_scale(vae), tail_halo(vae)
    latent, feature = side // read_decoder(vae).stride, side // scale
    tiled = side * side > UNTILED_AREA
    windows = plan_windows(feature, feature, DECODER_TILE // scale, halo) if tiled else ()
    return CallShape(
        1,
        BRANCHES,
        BRANCHES,
        STEPS,
        latent,
        latent,
        ((1, PROMPT_TOKENS, INSTRUCTION_TOKENS - 1),),
        1 + PROMPT_TOKENS,
        padded_runs(INSTRUCTION_TOKENS, TEXT_LENGTH, negative=True),
        (feature, feature) if tiled else (0, 0),
        tuple((len(window.rows.index), len(window.columns.index)) for window in windows),
    )


def tail_halo(vae: Config) -> int:
    """The halo of the autoencoder's tiles, in features."""
    with torch.device("meta"):
        return tile_halo(VaeDecoderTail(vae, MetaWeights(expected_shapes("vae", vae)), NUMERICS["float16"]))


def markdown() -> str:
    """The text of benchmarks/floors.md."""
    found = list(floors())
    lines = [_HEAD.format(steps=STEPS, prompt=PROMPT_TOKENS, instruction=INSTRUCTION_TOKENS)]
    lines += ["## Work of one image", "", *_work_table(found)]
    lines += ["", *_decoder_table(list(decoder_floors()))]
    for card, rates in CARDS.items():
        lines += ["", f"## {card}", ""]
        lines += [f"{rates.flop / 1e12:g} TFLOP/s, {rates.bytes / 1e9:g} GB/s ({rates.source}).", "", *_card_table(found, rates)]
    return "\n".join(lines) + "\n" + _SOURCES


def as_json() -> list[dict[str, object]]:
    """An entry for each model, size and card."""
    return [
        {
            "computed": True,
            "model": floor.model,
            "side": floor.side,
            "card": card,
            "rates": rates.as_json(),
            "floor_ms": {stage: 1e3 * work.floor_seconds(rates) for stage, work in floor.ours.items()},
            "reference_floor_ms": {stage: 1e3 * work.floor_seconds(rates) for stage, work in floor.reference.items()},
            "flop": {stage: work.flop for stage, work in floor.ours.items()},
            "bytes": {stage: work.bytes for stage, work in floor.ours.items()},
        }
        for floor in floors()
        for card, rates in CARDS.items()
    ]


_SOURCES = """
## The rates

Rates are for dense fp16 products with fp32 accumulation.

- H100 SXM: NVIDIA's white paper "H100 Tensor Core GPU Architecture", peak rates (989.4 TFLOP/s), and the data sheet (3.35 TB/s).
- RTX 5090: NVIDIA's white paper "NVIDIA RTX Blackwell GPU Architecture", appendix A (209.5 TFLOP/s, 1792 GB/s).
- RTX 4090: NVIDIA's white paper "Ada GPU Architecture", appendix A (165.2 TFLOP/s, 1008 GB/s): 128 multiprocessors with 512
  operations per clock at 2.52 GHz.
- RTX 4090 Laptop, 16 GB: NVIDIA does not publish this rate. 85.8 TFLOP/s is 165.2 scaled by "AI TOPS": 686 for this GPU, 1321 for
  the RTX 4090. That equals its 76 multiprocessors at 2.2 GHz, which is above its published boost clock of 1.46 to 2.04 GHz (57 to
  79 TFLOP/s). Power limits differ between laptops, and most are slower than this floor. 256 bits at 18 Gbit/s give 576 GB/s.
"""


_DECODERS_HEAD = """\
One image in fp16 with each autoencoder (`export --vae`). DC-AE-Lite has the depths and widths that its authors' code gives.
At 4096 px both decode in tiles of 1024 px ([numerics.md](../docs/numerics.md#the-tiled-decoder)).
"""

_HEAD = """# The floor: computed, not measured

The floor is the time of one image if each matrix product and convolution ran at the card's published rate or moved its operands at
the published bandwidth, whichever takes longer, and everything else were free. All numbers here are **computed** from counted work
and published rates; nothing was run. `sana-export bench --floor` prints this page.

The image: {steps} steps, CFG (2 branches), a prompt of {prompt} tokens after an instruction of {instruction}, fp16 graphs. Work is
counted by tracing the deployment graphs and diffusers' modules on PyTorch's meta device. Tests compare the counts with the ONNX
files and with PyTorch's own counter. Above 2048 px the decoder runs in tiles. Kernels that keep one product's result on the chip
for the next product could be faster than this floor. The report of a benchmark says how close the run came to it.

"diffusers" is the floor of diffusers' work for the same image. The last column is our floor divided by it: what the restated graphs
would take of diffusers' time at equal efficiency. A percentage in parentheses is the stage's share of the whole image.
"""


def _work_table(found: list[Floor]) -> list[str]:
    lines = ["| model | px | one step | decoder | whole image | bytes, whole image | diffusers, whole image |", _rule(2, 5)]
    for floor in found:
        step, decoder, whole = (floor.ours[stage] for stage in ("denoise_step", "vae_decoder", END_TO_END))
        lines.append(
            f"| {floor.model} | {floor.side} | {step.flop / 1e12:.2f} TFLOP | {decoder.flop / 1e12:.2f} TFLOP "
            f"| {whole.flop / 1e12:.1f} TFLOP | {whole.bytes / 1e9:.1f} GB | {floor.reference[END_TO_END].flop / 1e12:.1f} TFLOP |"
        )
    return lines


def _decoder_table(found: list[DecoderFloor]) -> list[str]:
    heads = " | ".join(f"{card}, ms" for card in CARDS)
    lines = [
        "## The decoders",
        "",
        _DECODERS_HEAD,
        f"| decoder | px | work | bytes | diffusers | {heads} |",
        _rule(2, 3 + len(CARDS)),
    ]
    for floor in found:
        cards = " | ".join(f"{1e3 * floor.ours.floor_seconds(rates):.2f}" for rates in CARDS.values())
        lines.append(
            f"| {floor.decoder} | {floor.side} | {floor.ours.flop / 1e12:.2f} TFLOP | {floor.ours.bytes / 1e9:.1f} GB "
            f"| {floor.reference.flop / 1e12:.2f} TFLOP | {cards} |"
        )
    return lines


def _card_table(found: list[Floor], rates: Rates) -> list[str]:
    heads = " | ".join(f"{stage} (share)" for stage in STAGES)
    lines = [
        f"| model | px | whole image, ms | one step, ms | {heads} | diffusers, ms | ours / diffusers |",
        _rule(2, 4 + len(STAGES)),
    ]
    for floor in found:
        whole = floor.ours[END_TO_END].floor_seconds(rates)
        theirs = floor.reference[END_TO_END].floor_seconds(rates)
        parts = " | ".join(_part(floor.ours[stage].floor_seconds(rates), whole) for stage in STAGES)
        step = floor.ours["denoise_step"].floor_seconds(rates)
        head = f"| {floor.model} | {floor.side} | {1e3 * whole:.1f} | {1e3 * step:.2f} |"
        lines.append(f"{head} {parts} | {1e3 * theirs:.1f} | {whole / theirs:.0%} |")
    return lines


def _part(seconds: float, whole: float) -> str:
    return f"{1e3 * seconds:.2f} ({seconds / whole:.0%})"


def _rule(text: int, numbers: int) -> str:
    return f"|{'---|' * text}{'---:|' * numbers}"
