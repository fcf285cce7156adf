"""Whether the tensors of a LoRA file fit the weights that they are for: shapes, dtypes, ranks and values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sana_export.errors import ArtifactError
from sana_export.formats.dtypes import BY_SAFETENSORS, SAFETENSORS_WEIGHT_DTYPES
from sana_export.formats.safetensors_file import TensorFile
from sana_export.lora_names import Parts

#: The highest rank. The widest weight of Sana has 11200 rows, and a LoRA of a higher rank is larger than the weight.
MOST_RANK = 16_384
#: Values that are checked at a time.
_CHUNK = 1 << 18
#: The exponent bits of a bfloat16. They are all set in infinities and NaN.
_BFLOAT16_EXPONENT = 0x7F80

Shape = tuple[int, ...]
#: The tensors whose first axis is the rank. The first that the layer has counts.
_RANKS = ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")


def rank_of(file: TensorFile, part: Parts) -> int | None:
    """The rank of a layer's matrices, 0 for a tensor without axes. None if it has none: two whole matrices, or a difference."""
    shapes = (file.entries[part.names[role]].shape for role in _RANKS if role in part.names)
    return next((max((0, *shape[:1])) for shape in shapes), None)


def check_tensors(path: Path, file: TensorFile, part: Parts, shapes: Mapping[str, Shape | None]) -> None:
    """Raise ArtifactError, naming the tensor, unless the tensors of `part` fit the weights of its layers.

    `shapes` has the weights of the layers from top to bottom, or None for one that cannot take an adapter.
    """
    roles = {role: name for role, name in part.names.items() if role != "alpha"}
    for layer, shape in shapes.items():
        if shape is None or (len(shape) == 4 and shape[1] == 1 < shape[0]):
            raise ArtifactError(
                f"the LoRA {path} changes a depthwise convolution, which is not supported",
                found=next(iter(roles.values())),
                wanted="linear layers and convolutions without groups",
                fix=f"train without {layer.rpartition('.')[2]}: a LoRA on it mixes channels, which a depthwise weight cannot",
            )
    known = [shape for shape in shapes.values() if shape is not None]
    whole = (sum(shape[0] for shape in known), *known[0][1:])
    if any(shape[1:] != known[0][1:] for shape in known):
        raise _unfit(path, next(iter(roles.values())), [list(shape) for shape in known], "weights of one width", part, whole)
    wanted = _wanted_shapes(path, file, part, whole)
    for role, name in roles.items():
        entry = file.entries[name]
        if role in wanted and not any(_fits(entry.shape, shape) for shape in wanted[role]):
            raise _unfit(path, name, list(entry.shape), " or ".join(str(list(shape)) for shape in wanted[role]), part, whole)
        if entry.dtype not in SAFETENSORS_WEIGHT_DTYPES:
            raise ArtifactError(
                f"{name} in the LoRA {path} has an unsupported dtype",
                found=entry.dtype,
                wanted=", ".join(SAFETENSORS_WEIGHT_DTYPES),
                fix="save it in float16, bfloat16 or float32",
            )
    for name in roles.values():
        _check_finite(path, file, name)


def _wanted_shapes(path: Path, file: TensorFile, part: Parts, whole: Shape) -> dict[str, tuple[Shape, ...]]:
    """The shapes that the layer's tensors may have, by role, for a weight of the shape `whole` [out, in, ...]."""
    out, kernel = whole[0], whole[2:]
    flat = math.prod(whole[1:])
    rank = max(1, rank_of(file, part) or 0)
    if rank > MOST_RANK:
        name = next(part.names[role] for role in _RANKS if role in part.names)
        raise ArtifactError(
            f"{name} in the LoRA {path} has too high a rank",
            found=rank,
            wanted=f"at most {MOST_RANK}",
            fix="download the LoRA again",
        )
    wanted: dict[str, tuple[Shape, ...]] = {
        "down": ((rank, *whole[1:]),),
        "up": ((out, rank, *(1 for _ in kernel)),),
        "diff": (whole,),
        "magnitude": ((out,), (out, 1), (1, out, *(1 for _ in kernel))),
    }
    for index in (1, 2):
        wanted[f"hada_w{index}_a"] = ((out, rank, *(1 for _ in kernel)),)
        wanted[f"hada_w{index}_b"] = ((rank, *whole[1:]), (rank, flat))
    ones = tuple(1 for _ in whole[1:])
    # The norms of columns cannot be split among the layers of a fused one.
    wanted["dora_scale"] = ((out, *ones),) if len(part.layers) > 1 else ((out, *ones), (1, whole[1], *ones[1:]))
    if part.kind == "LoKr":
        wanted |= _kronecker_shapes(file, part, whole, rank)
    return wanted


def _kronecker_shapes(file: TensorFile, part: Parts, whole: Shape, rank: int) -> dict[str, tuple[Shape, ...]]:
    """The shapes of a LoKr's tensors. The first factor, [a, c], may have any a and c that divide the weight's out and in."""

    def side(whole_name: str, part_name: str, axis: int) -> int:
        name = part.names.get(whole_name, part.names.get(part_name, ""))
        shape = file.entries[name].shape
        return shape[axis] if len(shape) > axis else 0

    a, c = side("lokr_w1", "lokr_w1_a", 0), side("lokr_w1", "lokr_w1_b", 1)
    out, width = whole[:2]
    # Without a remainder, or a shape that no tensor has.
    b, d = (total // size if size and total % size == 0 else -1 for total, size in ((out, a), (width, c)))
    flat = d * math.prod(whole[2:])
    return {
        "lokr_w1": ((a, c),),
        "lokr_w1_a": ((a, rank),),
        "lokr_w1_b": ((rank, c),),
        "lokr_w2": ((b, d, *whole[2:]),),
        "lokr_w2_a": ((b, rank),),
        "lokr_w2_b": ((rank, flat), (rank, d, *whole[2:])),
    }


def _unfit(path: Path, name: str, found: object, wanted: str, part: Parts, whole: Sequence[int]) -> ArtifactError:
    return ArtifactError(
        f"{name} in the LoRA {path} does not fit this checkpoint",
        found=found,
        wanted=f"{wanted}, for {part.module}.weight of {list(whole)}",
        fix="use a LoRA that was trained on this checkpoint",
    )


def _fits(shape: Shape, wanted: Shape) -> bool:
    """Whether both are equal, or differ only in dimensions of 1 at the end: some programs store a 1x1 convolution as a matrix."""
    return shape == wanted or (len(shape) >= 2 and shape[:2] == wanted[:2] and all(size == 1 for size in (*shape[2:], *wanted[2:])))


def _check_finite(path: Path, file: TensorFile, name: str) -> None:
    """Raise ArtifactError if a value of the tensor is infinite or not a number."""
    tensor = file[name]
    values = tensor.stored.reshape(-1)
    for start in range(0, values.size, _CHUNK):
        chunk = values[start : start + _CHUNK]
        if BY_SAFETENSORS[tensor.dtype].name == "bfloat16":
            bad = (chunk & _BFLOAT16_EXPONENT) == _BFLOAT16_EXPONENT
        else:
            bad = ~np.isfinite(chunk)
        if bad.any():
            index = [int(position) for position in np.unravel_index(start + int(bad.argmax()), tensor.shape)]
            raise ArtifactError(
                f"{name} in the LoRA {path} has values that are infinite or not numbers",
                found=f"one at {index} of {list(tensor.shape)}",
                wanted="finite values",
                fix="use another checkpoint of its training, from before the loss became NaN",
            )
