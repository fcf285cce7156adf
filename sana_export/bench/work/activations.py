"""The GPU memory that engines work in, as TensorRT-RTX's builder states it for one image (data only).

Made without a GPU by `sana-export build BUNDLE --backend tensorrt-rtx --profile static-SIDE`, which records the figure of each
engine in the manifest as `activation_bytes`. To repeat it, see docs/full-size.md. fp16 graphs, portable engines.
"""

from __future__ import annotations

from dataclasses import dataclass

BUILDER = "TensorRT-RTX 1.7.1.116"


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
    #: Where the figure comes from.
    source: str = BUILDER


#: The number of blocks does not matter: they run one after the other. So some rows are those of models with two blocks.
ACTIVATIONS = (
    Activations("text_encoder", 0, 100 * 10**6, source="computed: the widest tensors of one layer, two prompts of 520 tokens"),
    Activations("context", 0, 24 * 10**6, source=f"{BUILDER}, that of a ControlNet"),
    Activations("denoiser", 1024, 121 * 10**6, 2240, f"{BUILDER}, two blocks, with the inputs of a ControlNet"),
    Activations("denoiser", 4096, 864 * 2**20, 1152, "an earlier build of TensorRT-RTX, version not recorded"),
    Activations("vae_decoder", 1024, 813_498_368),
    Activations("vae_decoder", 2048, 3_229_417_472),
    Activations("vae_decoder_head", 4096, 2_296_385_536, source=f"{BUILDER}, with bands of rows only"),
    Activations("vae_decoder_tail", 1024, 999_292_928),
)


def activations(graph: str, side: int, channels: int) -> Activations:
    """The row of `graph` for an image of `side` pixels and a transformer of `channels`; 0 bytes for a graph without one.

    If no row is for this size and width, the nearest one, with its bytes multiplied by the ratio of pixels and of channels.
    """
    rows = [row for row in ACTIVATIONS if row.graph == graph]
    if not rows:
        return Activations(graph, side, 0, channels, "computed: less than the tensors that it reads and writes")
    row = min(rows, key=lambda row: (row.channels not in (0, channels), abs(row.side - side)))
    ratio = 1.0
    if row.side:
        ratio *= (side / row.side) ** 2
    if row.channels:
        ratio *= channels / row.channels
    if ratio == 1.0:
        return row
    return Activations(graph, side, round(row.bytes * ratio), channels, f"{row.source}, scaled by pixels and channels")
