"""LoRAs folded into a transformer's weights, one tensor at a time and on demand (adapters.py reads the files)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sana_export.adapters import Lora, read_lora
from sana_export.checkpoint.weights import Weights
from sana_export.errors import ArtifactError
from sana_export.lora_kinds import Fold, folded

if TYPE_CHECKING:
    from torch import Tensor

_WEIGHT = ".weight"


class FoldedWeights(Weights):
    """The tensors of `base` with LoRAs folded in. Those that a LoRA changes are float32."""

    def __init__(self, base: Weights, folds: Mapping[str, Sequence[Fold]]) -> None:
        super().__init__(base.stored)
        self.folds = folds

    def __getitem__(self, name: str) -> Tensor:
        import torch

        value = super().__getitem__(name)
        if name not in self.folds:
            return value
        weight = folded(value.float().flatten(1).numpy(), self.folds[name])
        value = torch.from_numpy(weight).reshape(value.shape)
        if not torch.isfinite(value).all():
            raise ArtifactError(
                f"{name} with the LoRAs leaves the range of float32",
                found="values that are infinite or not numbers",
                wanted="finite weights",
                fix="use a smaller scale, or a LoRA with finite values",
            )
        return value


def fold_loras(base: Weights, loras: Sequence[Lora]) -> Weights:
    """`base` with all of `loras` folded in. This checks that they fit; weights are read on demand.

    Raises UsageError if a path does not exist. Raises ArtifactError, naming the tensor, if a LoRA's format or kind is not supported
    or it does not fit the model.
    """
    shapes = {
        name.removesuffix(_WEIGHT): entry.shape
        for name, entry in base.stored.items()
        if name.endswith(_WEIGHT) and len(entry.shape) in (2, 4)
    }
    folds: dict[str, list[Fold]] = {}
    for lora in loras:
        for layer, fold in read_lora(lora, shapes).items():
            folds.setdefault(layer + _WEIGHT, []).append(fold)
    return FoldedWeights(base, folds) if folds else base
