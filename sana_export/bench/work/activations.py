"""The GPU memory that engines work in, as TensorRT-RTX's builder states it for one image (data only).

Made without a GPU by `sana-export build BUNDLE --backend tensorrt-rtx --profile static-SIDE`, which records the figure of each
engine in the manifest as `activation_bytes`. To repeat it, see docs/full-size.md. fp16 graphs, portable engines, one build each.
"""

from __future__ import annotations

from dataclasses import dataclass

BUILDER = "TensorRT-RTX 1.7.1.116"
_EIGHT = f"{BUILDER}, weights in 8 bits"


@dataclass(frozen=True)
class Activations:
    """What the engine of one graph works in."""

    #: The graph.
    graph: str
    #: Height and width of the image in pixels. For the tail of the decoder: of its window without the halo. 0: any.
    side: int
    #: Bytes.
    bytes: int
    #: Channels of the transformer's stream. 0 for graphs of other components.
    channels: int = 0
    #: Blocks of the transformer. 0 for graphs of other components.
    layers: int = 0
    #: Bytes of it that grow with channels and blocks, not with pixels: mostly a copy of the prompt's keys and values. For the
    #: denoiser, what the figures for 1024 and 4096 px leave for an image without pixels.
    fixed: int = 0
    #: Whether its weights are quantized. A graph without such a row has the same figures in both cases.
    quantized: bool = False
    #: Where the figure comes from.
    source: str = BUILDER


#: Apart from `fixed`, the number of blocks does not matter: they run one after the other.
ACTIVATIONS = (
    Activations("text_encoder", 0, 60_889_600, source=_EIGHT),
    Activations("context", 0, 89_036_800, 1152, 28, fixed=89_036_800),
    Activations("context", 0, 121_088_000, 2240, 20, fixed=121_088_000),
    Activations("denoiser", 1024, 130_563_584, 1152, 28, fixed=83_900_000),
    Activations("denoiser", 2048, 264_076_800, 1152, 28, fixed=83_900_000),
    Activations("denoiser", 4096, 830_307_840, 1152, 28, fixed=83_900_000),
    Activations("denoiser", 1024, 195_006_976, 2240, 20, fixed=103_300_000),
    Activations("denoiser", 4096, 1_571_262_976, 2240, 20, fixed=103_300_000),
    Activations("vae_decoder", 1024, 572_522_496),
    Activations("vae_decoder", 2048, 2_287_992_832),
    Activations("vae_decoder", 1024, 656_934_912, quantized=True, source=_EIGHT),
    Activations("vae_decoder", 2048, 2_577_074_176, quantized=True, source=_EIGHT),
    Activations("vae_decoder_head", 1024, 154_540_032),
    Activations("vae_decoder_head", 2048, 577_769_472),
    Activations("vae_decoder_head", 4096, 2_296_385_536),
    Activations("vae_decoder_tail", 512, 307_232_768),
    Activations("vae_decoder_tail", 1024, 999_292_928),
)


def activations(graph: str, side: int, channels: int, layers: int, *, quantized: bool = False) -> Activations:
    """The row of `graph` for an image of `side` pixels and a transformer of so many `channels` and `layers`.

    `quantized`: whether the graph's weights are. If no row is for this size and width, the nearest one, scaled. A graph without a
    row has 0 bytes.
    """
    rows = [row for row in ACTIVATIONS if row.graph == graph]
    rows = [row for row in rows if row.quantized == quantized] or rows
    if not rows:
        return Activations(graph, side, 0, channels, layers, source="computed: less than the tensors that it reads and writes")
    row = min(rows, key=lambda row: (row.channels not in (0, channels), row.layers not in (0, layers), abs(row.side - side)))
    wide = channels / row.channels if row.channels else 1.0
    work = (row.bytes - row.fixed) * wide * ((side / row.side) ** 2 if row.side else 1.0)
    fixed = row.fixed * wide * (layers / row.layers if row.layers else 1.0)
    if (scaled := round(work + fixed)) == row.bytes:
        return row
    source = f"{row.source}, scaled by pixels, channels and blocks"
    return Activations(graph, side, scaled, channels, layers, round(fixed), row.quantized, source)
