"""Adapters that neither diffusers nor PEFT reads, merged into the reference by their formulas in float64, with PyTorch.

Written apart from lora_kinds.py, so that one checks the other. The formulas are those of its table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sana_export.adapters import Lora, alpha_over_rank, read_config
from sana_export.formats.safetensors_file import TensorFile
from sana_export.lora_names import Parts
from sana_export.lora_scales import scale_of

if TYPE_CHECKING:
    from torch import Tensor


def merge_by_formula(transformer: Any, loras: Iterable[tuple[Lora, TensorFile, Sequence[Parts]]]) -> None:
    """Merge LoRAs into the weights of diffusers' transformer, in place and in their order."""
    base: dict[str, Tensor] = {}
    for lora, file, parts in loras:
        config = read_config(lora, file, parts)
        for part in parts:
            values = {role: _double(file, name) for role, name in part.names.items() if role != "alpha"}
            delta = alpha_over_rank(lora, file, part, config) * _delta(part, values)
            first = 0
            for layer in part.layers:
                weight = transformer.get_submodule(layer).weight
                own = base.setdefault(layer, weight.detach().clone()).double().flatten(1)
                rows = slice(first, first + len(own))
                scale = scale_of(layer, lora.scale, lora.layer_scales)
                merged = _merged(weight.detach().double().flatten(1), own, delta[rows], values, rows, scale)
                weight.data.copy_(merged.reshape(weight.shape))
                first = rows.stop


def _merged(weight: Tensor, own: Tensor, delta: Tensor, values: dict[str, Tensor], rows: slice, scale: float) -> Tensor:
    """`weight` with one adapter more. `own` is the weight without any."""
    import torch

    if "magnitude" in values:
        norms = torch.linalg.vector_norm(own + scale * delta, dim=1)
        return (values["magnitude"].flatten()[rows] / norms)[:, None] * (weight + scale * delta)
    if "dora_scale" in values:
        magnitude = values["dora_scale"]
        axis = 0 if magnitude.shape[0] == 1 else 1
        wanted = magnitude.flatten()[None] if axis == 0 else magnitude.flatten()[rows][:, None]
        norms = torch.linalg.vector_norm(own + delta, dim=axis, keepdim=True) + torch.finfo(torch.float32).eps
        return weight + scale * ((own + delta) * wanted / norms - own)
    return weight + scale * delta


def _delta(part: Parts, values: dict[str, Tensor]) -> Tensor:
    """What the adapter adds without any factor, [out, in * kh * kw]."""
    import torch

    if part.kind == "LoKr":
        first, second = (
            values[name] if name in values else values[f"{name}_a"] @ values[f"{name}_b"] for name in ("lokr_w1", "lokr_w2")
        )
        return torch.einsum("ac,bd->abcd", first, second).reshape(len(first) * len(second), -1)
    if part.kind == "LoHa":
        return (values["hada_w1_a"] @ values["hada_w1_b"]) * (values["hada_w2_a"] @ values["hada_w2_b"])
    return values["diff"] if part.kind == "diff" else values["up"] @ values["down"]


def _double(file: TensorFile, name: str) -> Tensor:
    """The tensor in float64, as a matrix unless it has fewer axes."""
    import torch

    value = torch.from_numpy(file[name].read().copy()).double()
    return value.flatten(1) if value.ndim > 2 else value
