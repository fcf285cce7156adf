"""The checkpoints that sana_export knows by name, and what follows from each.

A row states what cannot be read from the checkpoint's own configs. Source: the model cards of Efficient-Large-Model on the hub.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from sana_export.errors import UsageError

NVIDIA_LICENSE = "weights: NVIDIA's terms on the model card; text encoder: Google's Gemma terms"


@dataclass(frozen=True)
class Variant:
    """One checkpoint. `clamp`: trained in fp16 under a clip of self-attention outputs to +-65504 (docs/numerics.md).

    `repo` is the hub id of the diffusers folder; `recipe` names a synthetic checkpoint that sana_export makes itself.
    """

    alias: str
    native_size: int
    clamp: bool
    repo: str | None = None
    recipe: str | None = None
    weights_variant: str | None = None
    flow_shift: float = 3.0
    steps: int = 20
    guidance_scale: float = 4.5
    license: str = NVIDIA_LICENSE

    @property
    def source(self) -> str:
        return self.repo or f"synthetic: {self.recipe}"


def _published(name: str, native_size: int, *, clamp: bool, weights_variant: str, **other: float | int) -> Variant:
    return Variant(
        alias=name.lower().replace(".", "-").replace("_", "-"),
        native_size=native_size,
        clamp=clamp,
        repo=f"Efficient-Large-Model/{name}_diffusers",
        weights_variant=weights_variant,
        **other,  # type: ignore[arg-type]
    )


SYNTHETIC = "Apache-2.0: seeded random weights made by sana_export"

VARIANTS: dict[str, Variant] = {
    variant.alias: variant
    for variant in (
        Variant("tiny", 512, clamp=False, recipe="tiny", license=SYNTHETIC),
        Variant("mid", 512, clamp=False, recipe="mid", license=SYNTHETIC),
        _published("Sana_600M_512px", 512, clamp=True, weights_variant="fp16"),
        _published("Sana_600M_1024px", 1024, clamp=True, weights_variant="fp16"),
        _published("Sana_1600M_512px", 512, clamp=True, weights_variant="fp16"),
        _published("Sana_1600M_512px_MultiLing", 512, clamp=True, weights_variant="fp16"),
        _published("Sana_1600M_1024px", 1024, clamp=True, weights_variant="fp16"),
        _published("Sana_1600M_1024px_MultiLing", 1024, clamp=True, weights_variant="fp16"),
        _published("Sana_1600M_1024px_BF16", 1024, clamp=False, weights_variant="bf16"),
        _published("Sana_1600M_2Kpx_BF16", 2048, clamp=False, weights_variant="bf16"),
        _published("Sana_1600M_4Kpx_BF16", 4096, clamp=False, weights_variant="bf16", flow_shift=6.0),
        _published("SANA1.5_1.6B_1024px", 1024, clamp=False, weights_variant="bf16"),
        _published("SANA1.5_4.8B_1024px", 1024, clamp=False, weights_variant="bf16"),
        _published("Sana_Sprint_0.6B_1024px", 1024, clamp=False, weights_variant="bf16", steps=2),
        _published("Sana_Sprint_1.6B_1024px", 1024, clamp=False, weights_variant="bf16", steps=2),
    )
}


def find_variant(model: str) -> Variant | None:
    """The row whose alias, hub id or hub id without "_diffusers" is `model`; None where there is none."""
    for variant in VARIANTS.values():
        names = (variant.alias, variant.repo, (variant.repo or "").removesuffix("_diffusers"))
        if model in names:
            return variant
    return None


def unknown_alias(model: str) -> UsageError:
    """The error for a name that is no alias, no folder and no hub id; it lists the aliases near to it."""
    near = difflib.get_close_matches(model.lower(), VARIANTS, n=4, cutoff=0.5)
    return UsageError(
        f"unknown model {model!r}",
        found="no such alias or folder, and not a hub id (owner/name)",
        wanted="one of " + ", ".join(near or VARIANTS),
        fix="sana-export variants",
    )
