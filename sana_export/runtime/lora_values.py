"""A bundle's weights with LoRAs added, computed in numpy.

The manifest says where in the graphs' arrays each layer of the transformer is (`LoraTarget`). An array contains f W, or some rows
of it, for the layer's weight W and a constant f, so a LoRA adds f * scale * (alpha / r) * B A there. The stored values and all
LoRAs are summed in float32, and the sum is rounded once to the array's dtype.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sana_export.adapters import Fold, Lora, read_lora
from sana_export.errors import ArtifactError
from sana_export.formats.arrays import Array, Bytes
from sana_export.formats.dtypes import WEIGHT_DTYPES
from sana_export.manifest import LoraTarget


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA that fits the bundle."""

    lora: Lora
    #: What it adds, by layer. The matrices are memory-mapped and read when they are needed.
    folds: Mapping[str, Fold]


def read_adapter(lora: Lora, targets: Iterable[LoraTarget]) -> Adapter:
    """Read a LoRA, checking that every layer that it changes is among `targets`. Raises the errors of `read_lora`."""
    return Adapter(lora, read_lora(lora, {target.module: target.shape for target in targets}))


def touched(targets: Iterable[LoraTarget], adapters: Sequence[Adapter]) -> set[str]:
    """The initializers among `targets` that contain a layer which one of `adapters` changes."""
    layers = {layer for adapter in adapters for layer in adapter.folds}
    return {target.initializer for target in targets if target.module in layers}


def lora_values(
    base: Mapping[str, Bytes],
    targets: Iterable[LoraTarget],
    adapters: Sequence[Adapter],
    names: Collection[str],
    *,
    fix: str | None = None,
) -> dict[str, Array]:
    """The initializers `names` of a graph with `adapters` added to the bundle's own bytes `base`, by name.

    Arrays have the stored shape and dtype (bfloat16 as uint16). One that no adapter changes is the bundle's own, memory-mapped.
    `fix` is the advice if a target's dtype cannot be changed. Raises ArtifactError for such a dtype, and if a weight leaves its
    range.
    """
    values: dict[str, Array] = {}
    changed = set()
    for target in targets:
        name = target.initializer
        if name not in names:
            continue
        if name not in values:
            values[name] = _stored(base, target, fix)
        folds = [adapter.folds[target.module] for adapter in adapters if target.module in adapter.folds]
        if folds:
            if name not in changed:
                values[name] = values[name].copy()
                changed.add(name)
            _add(values[name], target, folds, adapters)
    return values


def _stored(base: Mapping[str, Bytes], target: LoraTarget, fix: str | None) -> Array:
    """The bundle's own array of a target, memory-mapped."""
    if target.dtype not in WEIGHT_DTYPES:
        raise ArtifactError(
            f"{target.module} of this bundle cannot take a LoRA",
            found=f"weights in {target.dtype}",
            wanted=", ".join(WEIGHT_DTYPES),
            fix=fix,
        )
    return base[target.initializer].view(WEIGHT_DTYPES[target.dtype].numpy).reshape(target.initializer_shape)


def _add(array: Array, target: LoraTarget, folds: Sequence[Fold], adapters: Sequence[Adapter]) -> None:
    """Add `folds` to the target's slice of `array`, in place."""
    first, end = target.source_rows or (0, target.shape[0])
    rows = slice(target.row_offset, target.row_offset + end - first)
    part = array[:, rows] if target.transposed else array[rows]
    dtype = WEIGHT_DTYPES[target.dtype]
    old = dtype.widen(part)
    with np.errstate(over="ignore", invalid="ignore"):  # values that are not finite are found below
        total = sum((fold.product(slice(first, end)) for fold in folds), np.float32(0)) * np.float32(target.factor)
        new = old + (total.T if target.transposed else total).reshape(part.shape)
        rounded = dtype.round(new)
    if not (np.isfinite(new).all() and np.isfinite(dtype.widen(rounded)).all()):
        paths = " and ".join(str(adapter.lora.path) for adapter in adapters)
        raise ArtifactError(
            f"{target.module} with the LoRA {paths} leaves the range of {target.dtype}",
            found=f"a weight of {np.abs(new).max():.3g}, stored {target.factor:g} times",
            wanted=f"finite weights in {target.dtype}",
            fix="load the LoRA with a smaller scale",
        )
    part[...] = rounded
