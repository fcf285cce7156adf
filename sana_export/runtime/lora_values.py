"""A bundle's weights with LoRAs added, computed in numpy.

The manifest says where in the graphs' arrays each layer of the transformer is (`LoraTarget`). An array contains f W, or some rows
of it, for the layer's weight W and a constant f. A LoRA that changes W by D changes the array by f D. The stored values and the
changes are summed in float32, and the sum is rounded once to the array's dtype. The change of a DoRA depends on W, which is put
together from the arrays then.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sana_export.adapters import Lora, read_lora
from sana_export.errors import ArtifactError
from sana_export.formats.arrays import Array, Bytes, Float32
from sana_export.formats.dtypes import WEIGHT_DTYPES
from sana_export.lora_kinds import Fold, folded
from sana_export.manifest import LoraTarget


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA that fits the bundle."""

    lora: Lora
    #: What it does, by layer. The tensors are memory-mapped and read when they are needed.
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
    known = list(targets)
    values: dict[str, Array] = {}
    changed = set()
    changes: dict[str, Float32] = {}
    for target in known:
        name, module = target.initializer, target.module
        if name not in names:
            continue
        if name not in values:
            values[name] = _stored(base, target, fix)
        folds = [adapter.folds[module] for adapter in adapters if module in adapter.folds]
        if not folds:
            continue
        if name not in changed:
            values[name] = values[name].copy()
            changed.add(name)
        if any(fold.needs_base for fold in folds) and module not in changes:
            changes[module] = _change(_weight(base, known, module, fix), folds)
        rows = slice(*target.source_rows) if target.source_rows else slice(None)
        if module in changes:
            change = changes[module][rows]
        else:
            with np.errstate(over="ignore", invalid="ignore"):  # `_add` finds values that are not finite
                change = sum((fold.product(rows) for fold in folds[1:]), folds[0].product(rows))
        _add(values[name], target, change, adapters)
    return values


def _change(weight: Float32, folds: Sequence[Fold]) -> Float32:
    """By how much `folds` change a layer's weight [out, in * kh * kw]."""
    with np.errstate(over="ignore", invalid="ignore"):
        change: Float32 = folded(weight, folds) - weight
    return change


def _weight(base: Mapping[str, Bytes], targets: Sequence[LoraTarget], module: str, fix: str | None) -> Float32:
    """A layer's own weight [out, in * kh * kw], put together from the arrays that contain parts of it."""
    parts = sorted((target for target in targets if target.module == module), key=lambda target: target.source_rows or (0, 0))
    rows = [target.source_rows or (0, target.shape[0]) for target in parts]
    if [0, *(end for _, end in rows)] != [*(first for first, _ in rows), parts[0].shape[0]]:
        raise ArtifactError(
            f"{module} of this bundle cannot take a DoRA",
            found=f"rows {rows} of its weight",
            wanted=f"all {parts[0].shape[0]} rows in one graph",
            fix=fix,
        )
    return np.concatenate([_part(_stored(base, target, fix), target) / np.float32(target.factor) for target in parts])


def _slice(array: Array, target: LoraTarget) -> Array:
    """The target's slice of `array`, a view."""
    first, end = target.source_rows or (0, target.shape[0])
    rows = slice(target.row_offset, target.row_offset + end - first)
    return array[:, rows] if target.transposed else array[rows]


def _part(array: Array, target: LoraTarget) -> Float32:
    """The target's slice of `array` as rows of the layer's weight, [rows, in * kh * kw], in float32."""
    part = WEIGHT_DTYPES[target.dtype].widen(_slice(array, target))
    part = part.reshape(len(part), -1)
    return part.T if target.transposed else part


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


def _add(array: Array, target: LoraTarget, change: Float32, adapters: Sequence[Adapter]) -> None:
    """Add `change`, of the target's rows of the weight, to its slice of `array`, in place."""
    part = _slice(array, target)
    dtype = WEIGHT_DTYPES[target.dtype]
    with np.errstate(over="ignore", invalid="ignore"):  # values that are not finite are found below
        total = change * np.float32(target.factor)
        new = dtype.widen(part) + (total.T if target.transposed else total).reshape(part.shape)
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
