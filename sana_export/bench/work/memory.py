"""How much GPU memory an image takes: computed from configs and from the builder's activations, before anything is exported.

`variants --memory` prints it. The plan of a bundle with engines, from its manifest, is in runtime/memory.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from sana_export.bench.work.activations import activations
from sana_export.bench.work.networks import MetaCheckpoint
from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.contract import DECODERS
from sana_export.export.quantize.plan import stored_bytes
from sana_export.manifest import Options
from sana_export.profiles import DECODER_TILE
from sana_export.quantization.layers import PARTS, part_of
from sana_export.quantization.schemes import SCHEMES
from sana_export.synth.recipes import RECIPES

#: Label to the recipe with the model's widths.
MODELS = {"600M": "sana-600m-1024px", "1600M": "sana-1600m-1024px", "4.8B": "sana1-5-4-8b-1024px"}
#: Height and width of an image, and the side of a decoder tile, in pixels. 0: the decoder runs in one piece. The first of each
#: size is what happens without `--decoder-tile`.
SIZES = ((1024, 0), (1024, 512), (2048, 0), (2048, DECODER_TILE), (4096, DECODER_TILE))
#: What is quantized: label to the scheme of each part.
QUANTIZED: dict[str, dict[str, str]] = {
    "fp16": {},
    **{name: dict.fromkeys(PARTS, name) for name in SCHEMES},
    "int8-weight, text encoder int4-weight": dict.fromkeys(PARTS, "int8-weight") | {"text_encoder": "int4-weight"},
}
MODES = ("resident", "staged")
#: Memory of cards, in GiB.
CARDS = (6, 8, 12, 16, 24)
#: An assumption: what CUDA and the driver need for one process.
CUDA_BYTES = 400 * 10**6
#: Guidance branches, and the most tokens of a prompt.
BRANCHES, TOKENS = 2, 300
#: Tensors of the size of the latents, float32, that a step reads and writes.
_LATENTS = 10
#: The graphs that differ from model to model, and those that do not.
_TRANSFORMER, _SHARED = ("context", "denoiser"), ("text_encoder", "vae_decoder", "vae_decoder_head", "vae_decoder_tail")
_ANY = next(iter(MODELS.values()))


@dataclass(frozen=True)
class StageMemory:
    """What one stage needs, in bytes."""

    #: The weights of its graphs.
    weights: int
    #: The activations of the graph that needs the most. Its graphs run one after the other, in the same memory.
    activations: int
    #: The tensors between graphs: prompt, context, latents, features and image.
    tensors: int

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.tensors


@dataclass(frozen=True)
class MemoryPlan:
    """The GPU memory of one image."""

    #: A key of `MODELS`.
    model: str
    #: Height and width in pixels.
    side: int
    #: Side of a decoder tile in pixels, without its halo. 0: the decoder runs in one piece.
    tile: int
    #: A key of `QUANTIZED`.
    scheme: str
    #: "text", "denoising" and "decoding" to what that stage needs.
    stages: Mapping[str, StageMemory]

    def bytes(self, mode: str) -> int:
        """The most that memory mode `mode` needs at a time, with CUDA's own."""
        stages = self.stages.values()
        if mode == "staged":
            return max(stage.total for stage in stages) + CUDA_BYTES
        return sum(stage.weights for stage in stages) + max(stage.activations + stage.tensors for stage in stages) + CUDA_BYTES

    def card(self, mode: str) -> int | None:
        """The smallest of `CARDS` that has as much, in GiB. None if none has."""
        return next((card for card in CARDS if self.bytes(mode) <= card * 2**30), None)

    def as_json(self) -> dict[str, Any]:
        return {
            "computed": True,
            "model": self.model,
            "side": self.side,
            "tile": self.tile,
            "scheme": self.scheme,
            "stages": {name: dataclasses.asdict(stage) for name, stage in self.stages.items()},
            "cuda_bytes": CUDA_BYTES,
            "modes": {mode: {"bytes": self.bytes(mode), "card_gib": self.card(mode)} for mode in MODES},
        }


def memory_plans() -> Iterator[MemoryPlan]:
    """Every model at every size with every scheme: one image with guidance, a prompt of the longest length, fp16 activations."""
    for model, name in MODELS.items():
        recipe = RECIPES[name]
        for scheme, parts in QUANTIZED.items():
            for side, tile in SIZES:
                weights = {
                    # The text encoder and the decoder are those of every model.
                    graph: _weight_bytes(graph, name if graph in _TRANSFORMER else _ANY, parts.get(part_of(graph)))
                    for graph in (*_TRANSFORMER, *_SHARED)
                }
                yield MemoryPlan(model, side, tile, scheme, _stages(recipe.transformer, side, tile, weights, parts))


@cache
def _weight_bytes(graph: str, model: str, scheme: str | None) -> int:
    """Bytes of the weights of `graph`, as they are stored."""
    recipe = RECIPES[model]
    checkpoint = MetaCheckpoint({"transformer": recipe.transformer, "vae": recipe.vae, "text_encoder": recipe.text_encoder})
    options = Options("fp16", clamp=False, quantize={} if scheme is None else {part_of(graph): scheme})
    return stored_bytes(graph, cast(SanaCheckpoint, checkpoint), options)


def _stages(
    transformer: Mapping[str, Any], side: int, tile: int, weights: Mapping[str, int], schemes: Mapping[str, str]
) -> dict[str, StageMemory]:
    """The stages. `weights`: the bytes of each graph's. `schemes`: the quantization scheme of each part that has one."""
    channels = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    cross = transformer["num_cross_attention_heads"] * transformer["cross_attention_head_dim"]
    decoders = tuple(sorted(DECODERS[tile > 0]))
    context = transformer["num_layers"] * 2 * BRANCHES * TOKENS * cross * 2
    prompt = BRANCHES * TOKENS * transformer["caption_channels"] * 4
    latents = transformer["in_channels"] * (side // 32) ** 2 * 4
    features = 512 * (side // 8) ** 2 * 2
    image = 3 * side**2 * 4 + 3 * side**2

    def work(graph: str) -> int:
        shown = tile if graph == "vae_decoder_tail" else side
        return activations(graph, shown, channels, transformer["num_layers"], quantized=part_of(graph) in schemes).bytes

    def stage(graphs: tuple[str, ...], tensors: int) -> StageMemory:
        return StageMemory(sum(weights[graph] for graph in graphs), max(map(work, graphs)), tensors)

    return {
        "text": stage(("text_encoder", "context"), prompt + context),
        "denoising": stage(("denoiser",), context + _LATENTS * latents),
        # Tiles are put together on the host, when the features have been freed.
        "decoding": stage(decoders, latents + (max(features, image) if tile else image)),
    }
