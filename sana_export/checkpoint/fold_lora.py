"""LoRAs folded into a transformer's weights, one tensor at a time and on demand (adapters.py has the formats)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sana_export.adapters import Fold, Lora, read_folds
from sana_export.checkpoint.weights import Stored, Weights, read_headers

if TYPE_CHECKING:
    from torch import Tensor


class FoldedWeights(Weights):
    """The tensors of `base` with LoRAs folded in. Those that a LoRA changes are float32."""

    def __init__(self, base: Weights, folds: Mapping[str, Sequence[Fold[Stored]]]) -> None:
        super().__init__(base.stored)
        self.folds = folds

    def __getitem__(self, name: str) -> Tensor:
        value = super().__getitem__(name)
        for fold in self.folds.get(name, ()):
            value = value.float() + delta(fold, value.shape)
        return value


def delta(fold: Fold[Stored], shape: Sequence[int]) -> Tensor:
    """What `fold` adds to a linear layer [out, in] or a convolution [out, in, kh, kw], in float32."""
    product = fold.up.read().float().flatten(1) @ fold.down.read().float().flatten(1)
    return (product * fold.factor).reshape(tuple(shape))


def fold_loras(base: Weights, loras: Sequence[Lora]) -> Weights:
    """`base` with all of `loras` folded in. This checks that they fit; weights are read on demand.

    Raises UsageError if a path does not exist. Raises ArtifactError, naming the tensor, if a LoRA's format or kind is not supported
    or it does not fit the model.
    """

    def shape_of(layer: str) -> tuple[int, ...] | None:
        name = f"{layer}.weight"
        return base.shape(name) if name in base else None

    folds: dict[str, list[Fold[Stored]]] = {}
    for lora in loras:
        tensors = read_headers([lora.weights], fix="download the LoRA again")
        for layer, fold in read_folds(lora, tensors, read_metadata(lora), shape_of).items():
            folds.setdefault(f"{layer}.weight", []).append(fold)
    return FoldedWeights(base, folds) if folds else base


def read_metadata(lora: Lora) -> Mapping[str, str]:
    """The metadata of the LoRA's safetensors file."""
    from safetensors import safe_open

    with safe_open(lora.weights, framework="pt") as file:
        return file.metadata() or {}
