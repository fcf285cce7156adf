"""Weights that are not a Sana component's own: under other names, in fewer bits, or of another network."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

from sana_export.errors import ArtifactError
from sana_export.formats.network_names import NETWORKS, QUANTIZED, WRAPPERS, find_first, without_wrappers
from sana_export.lora_names import is_lora

#: Modules that contain a transformer. All names of a file have such a prefix, or none.
CONTAINERS = ("module.", "model.diffusion_model.", "diffusion_model.", "base_model.model.", "transformer.", "model.", "net.")
#: The container of the transformer in files that contain a VAE and a text encoder too.
ALL_IN_ONE = "model.diffusion_model."

#: How to fix quantized weights.
BEFORE_QUANTIZED = "use the weights before they were quantized"

T = TypeVar("T")


def plain_names(tensors: Mapping[str, T], owner: str) -> dict[str, T]:
    """`tensors` without the prefixes of wrappers and containers in their names.

    Raises ArtifactError, with `owner` as the file, if two tensors then have one name.
    """
    chosen = {name: value for name, value in tensors.items() if ALL_IN_ONE in name} or dict(tensors)
    found: dict[str, tuple[str, T]] = {}
    for name, value in chosen.items():
        plain = without_wrappers(name)
        if plain in found:
            raise ArtifactError(
                f"{owner} has two tensors of one name",
                found=f"{found[plain][0]} and {name}",
                wanted="one tensor of each name",
                fix="save the weights of the module without its wrapper",
            )
        found[plain] = name, value
    while (prefix := next((one for one in CONTAINERS if found and all(name.startswith(one) for name in found)), None)) is not None:
        found = {name.removeprefix(prefix): pair for name, pair in found.items()}
    return {name: value for name, (_, value) in found.items()}


def quantized(names: Iterable[str], owner: str) -> ArtifactError | None:
    """The error for quantized weights, with `owner` as what contains them. None if no name is one of quantized weights."""
    if (found := find_first(QUANTIZED, names)) is None:
        return None
    return ArtifactError(
        f"{owner} has {found[0].what}, which are not supported",
        found=found[1],
        wanted="weights in float32, float16 or bfloat16",
        fix=BEFORE_QUANTIZED,
    )


def missing_tensors(
    names: Collection[str], wanted: Mapping[str, tuple[int, ...]], missing: Collection[str], owner: str
) -> ArtifactError:
    """The error for weights with the tensors `names`, of which `missing` are missing. It says what the weights are instead."""
    first = next(iter(missing))
    found, fix = f"no {first}", "download the checkpoint again, or use weights that match its config"
    foreign = [name for name in names if name not in wanted]
    plain = {without_wrappers(name) for name in names}
    if plain != set(names) and plain.issuperset(missing):
        found += f", but {next(name for name in names if without_wrappers(name) != name)}"
        fix = f"save the weights of the module without its wrapper, so that no name contains {' or '.join(WRAPPERS)}"
    elif len(missing) == len(wanted) and foreign:
        found += f", but {foreign[0]}"
        if is_lora(foreign):
            fix = "if it is a LoRA, use --lora"
        elif (other := find_first(NETWORKS, foreign)) is not None:
            found = f"no {first}, but {other[1]}: the weights of {other[0].what}"
            fix = "use weights of a Sana checkpoint (sana-export variants lists them)"
    return ArtifactError(
        f"{owner} is missing {len(missing)} of {len(wanted)} tensors",
        found=found,
        wanted=f"{first} of shape {list(wanted[first])}",
        fix=fix,
    )
