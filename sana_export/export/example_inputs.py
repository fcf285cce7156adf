"""What the exporter knows of each deployment graph: its tensors for a checkpoint, and inputs to trace and check it with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.contract import FEATURE_TENSORS, GraphSpec, TensorSpec, resolve
from sana_export.graphs.vae_decoder import feature_channels
from sana_export.manifest import Options


def graph_spec(name: str, checkpoint: SanaCheckpoint, options: Options) -> GraphSpec:
    """The graph's tensors with this checkpoint's dimensions."""
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
    return resolve(name, dimensions, options.dtype, features=[key for key in FEATURE_TENSORS.values() if transformer.get(key)])


@dataclass(frozen=True)
class Sizes:
    """Values of the dynamic axes for one set of inputs; `spatial_ratio` is image pixels per latent pixel."""

    batch: int
    branches: int
    tokens: int
    prefix_tokens: int
    text_tokens: int
    latent_height: int
    latent_width: int
    feature_height: int
    feature_width: int
    tile_height: int
    tile_width: int
    output_height: int
    output_width: int
    spatial_ratio: int = 32

    def of(self, axis: str) -> int:
        if axis.startswith("image_"):
            return self.spatial_ratio * int(getattr(self, axis.replace("image", "latent")))
        return int(getattr(self, axis))


#: No two alike and none below 2, so that the tracer takes no size for a constant or for another's.
TRACE_SIZES = Sizes(2, 3, 5, 9, 7, 4, 6, 12, 15, 8, 11, 100, 170)
#: Others, to check with: what a traced constant or a swapped axis would fail on.
CHECK_SIZES = Sizes(3, 2, 8, 1, 11, 5, 3, 14, 9, 10, 6, 64, 131)
#: Axis of an index: the axis that it points into.
_INDEXED = {
    "output_height": "image_height",
    "output_width": "image_width",
    "tile_height": "feature_height",
    "tile_width": "feature_width",
}


def random_inputs(spec: GraphSpec, sizes: Sizes, seed: int) -> dict[str, Tensor]:
    """Fresh seeded inputs for a graph, each in the range that the runtime feeds."""
    generator = torch.Generator().manual_seed(seed)
    return {tensor.name: _random_input(tensor, sizes, generator) for tensor in spec.inputs}


def _random_input(tensor: TensorSpec, sizes: Sizes, generator: torch.Generator) -> Tensor:
    shape = [axis if isinstance(axis, int) else sizes.of(axis) for axis in tensor.shape]
    uniform = torch.rand(shape, generator=generator)
    special: dict[str, Callable[[], Tensor]] = {
        "timestep": lambda: uniform * 999.0,
        "guidance": lambda: uniform * 10.0,
        "perturbed": lambda: torch.arange(shape[0]).remainder(2).float(),
        "context_mask": lambda: (torch.arange(shape[-1]) <= uniform[..., :1] * shape[-1]).float(),
        "row_index": lambda: (uniform * sizes.of(_INDEXED[str(tensor.shape[-1])])).long(),
        "column_index": lambda: (uniform * sizes.of(_INDEXED[str(tensor.shape[-1])])).long(),
        "row_weight": lambda: uniform / uniform.sum(0, keepdim=True),
        "column_weight": lambda: uniform / uniform.sum(0, keepdim=True),
    }
    if tensor.name in special:
        return special[tensor.name]()
    return torch.randn(shape, generator=generator).to(getattr(torch, tensor.dtype))
