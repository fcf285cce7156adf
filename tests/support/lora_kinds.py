"""Adapters of every supported kind with random numbers, and what they do to a weight, in float64 and apart from the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

#: The rank and alpha of the adapters.
RANK, ALPHA = 3, 2.0


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return 0.3 * torch.randn(shape, generator=generator)


def _factors(number: int) -> tuple[int, int]:
    """`number` as a product of two, the smaller one first."""
    first = max(size for size in range(1, math.isqrt(number) + 1) if number % size == 0)
    return first, number // first


def low_rank(shape: Sequence[int], generator: torch.Generator) -> dict[str, Tensor]:
    out, *inner = shape
    ones = [1] * (len(inner) - 1)
    down, up = _random(generator, RANK, *inner), _random(generator, out, RANK, *ones)
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(ALPHA)}


def hadamard(shape: Sequence[int], generator: torch.Generator) -> dict[str, Tensor]:
    out, flat = shape[0], math.prod(shape[1:])
    pairs = {f"hada_w{index}_{side}": (out, RANK) if side == "a" else (RANK, flat) for index in (1, 2) for side in "ab"}
    return {name: 2 * _random(generator, *size) for name, size in pairs.items()} | {"alpha": torch.tensor(ALPHA)}


def kronecker(first: bool, second: bool) -> Callable[[Sequence[int], torch.Generator], dict[str, Tensor]]:
    """LoKr, whose first and second factor may be whole matrices or products."""

    def make(shape: Sequence[int], generator: torch.Generator) -> dict[str, Tensor]:
        (a, b), (c, d) = _factors(shape[0]), _factors(shape[1])
        kernel = shape[2:]
        flat = d * math.prod(kernel)
        one = {"lokr_w1": (a, c)} if first else {"lokr_w1_a": (a, RANK), "lokr_w1_b": (RANK, c)}
        two = {"lokr_w2": (b, d, *kernel)} if second else {"lokr_w2_a": (b, RANK), "lokr_w2_b": (RANK, flat)}
        return {name: _random(generator, *size) for name, size in (one | two).items()} | {"alpha": torch.tensor(ALPHA)}

    return make


def difference(shape: Sequence[int], generator: torch.Generator) -> dict[str, Tensor]:
    return {"diff": _random(generator, *shape)}


def with_norms(
    make: Callable[[Sequence[int], torch.Generator], dict[str, Tensor]], name: str, rows: bool = True
) -> Callable[[Sequence[int], torch.Generator], dict[str, Tensor]]:
    """A DoRA of the adapters of `make`, with the norms of rows or of columns."""

    def made(shape: Sequence[int], generator: torch.Generator) -> dict[str, Tensor]:
        ones = [1] * (len(shape) - 2)
        size = [shape[0], 1, *ones] if rows else [1, shape[1], *ones]
        if name == "lora_magnitude_vector":  # PEFT has its own shapes
            size = [1, shape[0], *ones] if ones else [shape[0]]
        return {**make(shape, generator), name: 0.5 + torch.rand(size, generator=generator)}

    return made


#: Functions that make one layer's tensors from the shape of its weight, by kind.
KINDS: dict[str, Callable[[Sequence[int], torch.Generator], dict[str, Tensor]]] = {
    "LoRA": low_rank,
    "LoHa": hadamard,
    "LoKr": kronecker(True, False),
    "LoKr, both factors products": kronecker(False, False),
    "LoKr, whole matrices": kronecker(True, True),
    "diff": difference,
    "DoRA of PEFT": with_norms(low_rank, "lora_magnitude_vector"),
    "DoRA of rows": with_norms(low_rank, "dora_scale"),
    "DoRA of columns": with_norms(low_rank, "dora_scale", rows=False),
    "LoHa with norms": with_norms(hadamard, "dora_scale"),
    "LoKr with norms": with_norms(kronecker(True, False), "dora_scale", rows=False),
}


def adapter(kind: str, shapes: Mapping[str, Sequence[int]], seed: int = 0) -> dict[str, Tensor]:
    """An adapter of `kind` for the layers with weights of `shapes`, with names like transformer.LAYER.lokr_w1."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"transformer.{layer}.{end}": value
        for layer, shape in shapes.items()
        for end, value in KINDS[kind](shape, generator).items()
    }


def applied(weight: Tensor, base: Tensor, tensors: Mapping[str, Tensor], scale: float) -> Tensor:
    """`weight` with one layer's tensors, in float64. `base` is the weight without any adapter. Both have the layer's shape."""
    value = {end: tensor.double() for end, tensor in tensors.items()}
    flat = {end: tensor.flatten(1) if tensor.ndim > 1 else tensor for end, tensor in value.items()}
    if "diff" in value:
        return weight.double() + scale * value["diff"].reshape(base.shape)
    delta = ALPHA / RANK * _product(flat)
    if "lokr_w1" in value and "lokr_w2" in value:
        delta = _product(flat)  # LyCORIS ignores alpha then
    own, now = base.double().flatten(1), weight.double().flatten(1)
    if "lora_magnitude_vector" in value:
        changed = own + scale * delta
        norms = changed.norm(dim=1, keepdim=True)
        result = value["lora_magnitude_vector"].reshape(-1, 1) / norms * (now + scale * delta)
    elif "dora_scale" in value:
        norms = value["dora_scale"].reshape(value["dora_scale"].shape[:2])
        changed = own + delta
        own_norms = changed.norm(dim=1 if len(norms) > 1 else 0, keepdim=True) + torch.finfo(torch.float32).eps  # as LyCORIS does
        result = now + scale * (norms * changed / own_norms - own)
    else:
        result = now + scale * delta
    return result.reshape(base.shape)


def _product(flat: Mapping[str, Tensor]) -> Tensor:
    if "lora_up.weight" in flat:
        return flat["lora_up.weight"] @ flat["lora_down.weight"]
    if "hada_w1_a" in flat:
        return (flat["hada_w1_a"] @ flat["hada_w1_b"]) * (flat["hada_w2_a"] @ flat["hada_w2_b"])
    first, second = (flat[name] if name in flat else flat[f"{name}_a"] @ flat[f"{name}_b"] for name in ("lokr_w1", "lokr_w2"))
    return torch.kron(first, second)
