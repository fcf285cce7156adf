"""The layers of a Sana transformer in the original code, and the layers of diffusers that they are.

Source: diffusers' `scripts/convert_sana_to_diffusers.py`, which splits the rows of `qkv` and `kv_linear` in this order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_BLOCK, _ORIGINAL_BLOCK = "transformer_blocks.{}.", "blocks.{}."
#: The layers of diffusers by their names in the original code. Those of one row are parts of its rows, from top to bottom.
_IN_BLOCKS = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.inverted_conv.conv": ("ff.conv_inverted",),
    "mlp.depth_conv.conv": ("ff.conv_depth",),
    "mlp.point_conv.conv": ("ff.conv_point",),
}
#: The same outside blocks. The names of some depend on the model, and a model has one of them.
_OUTSIDE = (
    ("x_embedder.proj", "patch_embed.proj"),
    ("y_embedder.y_proj.fc1", "caption_projection.linear_1"),
    ("y_embedder.y_proj.fc2", "caption_projection.linear_2"),
    ("t_embedder.mlp.0", "time_embed.emb.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_embed.emb.timestep_embedder.linear_2"),
    ("t_embedder.mlp.0", "time_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_embed.timestep_embedder.linear_2"),
    ("cfg_embedder.mlp.0", "time_embed.guidance_embedder.linear_1"),
    ("cfg_embedder.mlp.2", "time_embed.guidance_embedder.linear_2"),
    ("t_block.1", "time_embed.linear"),
    ("final_layer.linear", "proj_out"),
)


def original_layers(layers: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The `layers` of a transformer of diffusers, by their names in the original code."""
    known = set(layers)
    found: dict[str, tuple[str, ...]] = {original: (layer,) for original, layer in _OUTSIDE if layer in known}
    for block in sorted({match[1] for layer in known if (match := re.match(r"transformer_blocks\.(\d+)\.", layer))}, key=int):
        for original, parts in _IN_BLOCKS.items():
            names = tuple(_BLOCK.format(block) + part for part in parts)
            if known.issuperset(names):
                found[_ORIGINAL_BLOCK.format(block) + original] = names
    return found
