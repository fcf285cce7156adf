"""The tensors of each deployment graph for a given checkpoint, and example inputs to trace and check the graph with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.checkpoint.vae_config import read_decoder
from sana_export.contract import ENCODERS, FEATURE_TENSORS, GraphSpec, TensorSpec, resolve
from sana_export.graphs.vae_decoder import feature_channels
from sana_export.graphs.vae_encoder import encoder_feature_channels, encoder_tile_scale
from sana_export.manifest import Options

ENCODER_GRAPHS: frozenset[str] = frozenset().union(*ENCODERS.values())


def graph_spec(name: str, checkpoint: SanaCheckpoint, options: Options) -> GraphSpec:
    """The graph's inputs and outputs with this checkpoint's dimensions."""
    transformer, text = checkpoint.config("transformer"), checkpoint.config("text_encoder")
    dimensions = {
        "latent_channels": transformer["in_channels"],
        "layers": transformer["num_layers"],
        "cross_attention_heads": transformer["num_cross_attention_heads"],
        "cross_attention_head_dim": transformer["cross_attention_head_dim"],
        "text_channels": text["hidden_size"],
        "text_layers": text["num_hidden_layers"],
        "text_kv_heads": text["num_key_value_heads"],
        "text_head_dim": text["head_dim"],
        "feature_channels": feature_channels(checkpoint.config("vae")),
    }
    if name in ENCODER_GRAPHS:  # the config of an encoder that is not exported need not be supported
        dimensions["encoder_feature_channels"] = encoder_feature_channels(checkpoint.config("vae"))
    controlled = checkpoint.controlnet is not None
    if controlled:
        dimensions["controlnet_layers"] = checkpoint.config("controlnet")["num_layers"]
        dimensions["channels"] = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    switches = {**transformer, "pag_layers": options.pag_layers, "controlnet": controlled}
    return resolve(name, dimensions, options.dtype, features=[key for key in FEATURE_TENSORS.values() if switches[key]])


class AxisSizes(Protocol):
    """The sizes of the dynamic axes for one set of inputs."""

    def of(self, axis: str) -> int:
        """The size of the dynamic axis `axis`."""
        ...

    def least(self, spec: GraphSpec) -> dict[str, int]:
        """The shortest lengths of axes of the graph's inputs, if not 1."""
        ...


@dataclass(frozen=True)
class Sizes:
    """The sizes of the deployment graphs' dynamic axes for one set of inputs."""

    #: Images per batch.
    batch: int
    #: Guidance branches.
    branches: int
    #: Guidance branches with a prompt of their own.
    text_branches: int
    #: Prompt tokens that the denoiser attends to.
    tokens: int
    #: Tokens of the instruction before the prompt.
    prefix_tokens: int
    #: Tokens that the text encoder reads after the instruction.
    text_tokens: int
    #: Height of the latents.
    latent_height: int
    #: Width of the latents.
    latent_width: int
    #: Height of the decoder head's features.
    feature_height: int
    #: Width of the decoder head's features.
    feature_width: int
    #: Feature rows in a tile.
    tile_height: int
    #: Feature columns in a tile.
    tile_width: int
    #: Height of the final image in pixels.
    output_height: int
    #: Width of the final image in pixels.
    output_width: int
    #: Feature rows in a window of the encoder.
    window_height: int = 13
    #: Feature columns in a window of the encoder.
    window_width: int = 14
    #: Image pixels per latent pixel, in height and in width.
    spatial_ratio: int = 32
    #: Image pixels per feature of the encoder, in height and in width.
    encoder_scale: int = 8

    def of(self, axis: str) -> int:
        """The size of the contract's dynamic axis `axis`."""
        kind, _, side = axis.rpartition("_")
        if kind == "image":
            return self.spatial_ratio * int(getattr(self, f"latent_{side}"))
        if kind == "encoded":
            return self.of(f"image_{side}") // self.encoder_scale
        if kind == "window_image":
            return self.encoder_scale * int(getattr(self, f"window_{side}"))
        return int(getattr(self, axis))

    def least(self, spec: GraphSpec) -> dict[str, int]:
        """The shortest lengths of the axes of an encoder's inputs, which each stage halves."""
        if spec.name not in ENCODER_GRAPHS:
            return {}
        lengths = {
            "image": self.spatial_ratio,
            "encoded": self.spatial_ratio // self.encoder_scale,
            "window_image": self.encoder_scale,
        }
        return {f"{kind}_{side}": length for kind, length in lengths.items() for side in ("height", "width")}


#: The sizes to trace with. All differ and are at least 2, so that the tracer cannot take one for a constant or for another axis.
TRACE_SIZES = Sizes(2, 3, 10, 5, 9, 7, 4, 6, 12, 15, 8, 11, 100, 170)
#: The sizes to check with. They differ from the traced ones, so that a traced constant or a swapped axis fails the check.
CHECK_SIZES = Sizes(3, 2, 4, 8, 1, 11, 5, 3, 14, 9, 10, 6, 64, 131, 4, 2)
#: For the axis of an index tensor, the axis that its values index into.
_INDEXED = {
    "branches": "text_branches",
    "output_height": "image_height",
    "output_width": "image_width",
    "tile_height": "feature_height",
    "tile_width": "feature_width",
    "sequence_length": "vocabulary",
}


def fitting(sizes: Sizes, name: str, checkpoint: SanaCheckpoint) -> Sizes:
    """`sizes` for the graph `name` of a checkpoint: an encoder's layers halve the size, so its inputs must be multiples."""
    if name not in ENCODER_GRAPHS:
        return sizes
    vae = checkpoint.config("vae")
    return replace(sizes, spatial_ratio=read_decoder(vae).stride, encoder_scale=encoder_tile_scale(vae))


def random_inputs(spec: GraphSpec, sizes: AxisSizes, seed: int) -> dict[str, Tensor]:
    """Random inputs for a graph by name, drawn with `seed`. Each is in the range that the runtime feeds."""
    generator = torch.Generator().manual_seed(seed)
    return {tensor.name: _random_input(tensor, sizes, generator) for tensor in spec.inputs}


def _random_input(tensor: TensorSpec, sizes: AxisSizes, generator: torch.Generator) -> Tensor:
    shape = [axis if isinstance(axis, int) else sizes.of(axis) for axis in tensor.shape]
    uniform = torch.rand(shape, generator=generator)
    special: dict[str, Callable[[], Tensor]] = {
        "timestep": lambda: uniform * 999.0,
        "guidance": lambda: uniform * 10.0,
        "perturbed": lambda: torch.arange(shape[0]).remainder(2).float(),
        **dict.fromkeys(
            ("context_mask", "attention_mask", "encoder_attention_mask"),
            lambda: (torch.arange(shape[-1]) <= uniform[..., :1] * shape[-1]).to(getattr(torch, tensor.dtype)),
        ),
        **dict.fromkeys(
            ("source", "row_index", "column_index", "input_ids"),
            lambda: (uniform * sizes.of(_INDEXED[str(tensor.shape[-1])])).long(),
        ),
        "row_weight": lambda: uniform / uniform.sum(0, keepdim=True),
        "column_weight": lambda: uniform / uniform.sum(0, keepdim=True),
        "mask": lambda: (uniform > 0.5).float(),
        "noise_level": lambda: uniform,
    }
    if tensor.name in special:
        return special[tensor.name]()
    return torch.randn(shape, generator=generator).to(getattr(torch, tensor.dtype))
