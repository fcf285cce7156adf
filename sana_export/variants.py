"""The checkpoints that sana_export knows by name (data only).

A row says only how a checkpoint differs from the others. Schedule and configs follow from its architecture and native size.
Source: the model cards of Efficient-Large-Model on the hub.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sana_export.architectures import ARCHITECTURES, INTERPOLATION_SCALE, Architecture, Config, identity
from sana_export.errors import UsageError

NVIDIA_LICENSE = "weights: NVIDIA's terms on the model card; text encoder: Google's Gemma terms"
TRAINED_LICENSE = "Apache-2.0: trained by sana_export on images of Noto Color Emoji (SIL Open Font License 1.1)"
SYNTHETIC_LICENSE = "Apache-2.0: seeded random weights made by sana_export"
#: The default steps of diffusers' SanaPipeline and SanaSprintPipeline.
STEPS, SPRINT_STEPS = 20, 2
#: The file that makes a folder a checkpoint in diffusers' format.
INDEX = "model_index.json"


@dataclass(frozen=True)
class Variant:
    """One checkpoint: published, part of the package, or synthetic (seeded random weights, made on first use)."""

    #: Its name on the command line.
    alias: str
    #: Height and width in pixels that it was trained for.
    native_size: int
    #: Whether it was trained in fp16 with self-attention outputs clipped to +-65504 (docs/numerics.md).
    clamp: bool
    #: Its transformer.
    architecture: Architecture
    #: The hub id of the published folder in diffusers' format. None if it is not published.
    repo: str | None = None
    #: The default guidance scale.
    guidance_scale: float = 4.5
    #: Whether its weights are part of the package.
    embedded: bool = False

    @property
    def recipe(self) -> str | None:
        """The synthetic recipe that makes its weights. None if it was trained."""
        return None if self.repo or self.embedded else self.alias

    @property
    def source(self) -> str:
        """Where its weights come from, for the user."""
        return self.repo or (f"embedded: {self.alias}" if self.embedded else f"synthetic: {self.recipe}")

    @property
    def weights_variant(self) -> str | None:
        """The variant in the names of the published weight files, which is the dtype of training: "fp16" or "bf16"."""
        return ("fp16" if self.clamp else "bf16") if self.repo else None

    @property
    def transformer(self) -> Config:
        """transformer/config.json."""
        return self.architecture.transformer(self.native_size)

    @property
    def scheduler(self) -> Config:
        """scheduler/scheduler_config.json: its `_class_name`, and the values that differ from the class's defaults."""
        return self.architecture.scheduler(self.native_size)

    @property
    def flow_shift(self) -> float | None:
        """The shift of the flow's timesteps. None for SANA-Sprint, whose scheduler has none."""
        return self.scheduler.get("flow_shift")

    @property
    def interpolation_scale(self) -> float | None:
        """Scale of the position table. None if the transformer has no such table."""
        return INTERPOLATION_SCALE.get(self.native_size)

    @property
    def steps(self) -> int:
        """Default sampling steps."""
        return SPRINT_STEPS if self.architecture.guidance_embeds else STEPS

    @property
    def license(self) -> str:
        """The terms of its weights."""
        return NVIDIA_LICENSE if self.repo else TRAINED_LICENSE if self.embedded else SYNTHETIC_LICENSE


def _published(name: str, native_size: int, architecture: str, *, clamp: bool = False) -> Variant:
    return Variant(
        alias=name.lower().replace(".", "-").replace("_", "-"),
        native_size=native_size,
        clamp=clamp,
        architecture=ARCHITECTURES[architecture],
        repo=f"Efficient-Large-Model/{name}_diffusers",
    )


def _synthetic(name: str, native_size: int) -> Variant:
    return Variant(name, native_size, clamp=False, architecture=ARCHITECTURES[name])


def _embedded(name: str, native_size: int) -> Variant:
    return Variant(name, native_size, clamp=False, architecture=ARCHITECTURES[name], embedded=True)


VARIANTS: dict[str, Variant] = {
    variant.alias: variant
    for variant in (
        _embedded("tiny", 128),
        _synthetic("tiny-random", 512),
        _synthetic("tiny-sprint", 1024),
        _synthetic("mid", 512),
        _published("Sana_600M_512px", 512, "Sana 600M", clamp=True),
        _published("Sana_600M_1024px", 1024, "Sana 600M", clamp=True),
        _published("Sana_1600M_512px", 512, "Sana 1600M", clamp=True),
        _published("Sana_1600M_512px_MultiLing", 512, "Sana 1600M", clamp=True),
        _published("Sana_1600M_1024px", 1024, "Sana 1600M", clamp=True),
        _published("Sana_1600M_1024px_MultiLing", 1024, "Sana 1600M", clamp=True),
        _published("Sana_1600M_1024px_BF16", 1024, "Sana 1600M"),
        _published("Sana_1600M_2Kpx_BF16", 2048, "Sana 1600M"),
        _published("Sana_1600M_4Kpx_BF16", 4096, "Sana 1600M"),
        _published("SANA1.5_1.6B_1024px", 1024, "SANA-1.5 1.6B"),
        _published("SANA1.5_4.8B_1024px", 1024, "SANA-1.5 4.8B"),
        _published("Sana_Sprint_0.6B_1024px", 1024, "Sprint 0.6B"),
        _published("Sana_Sprint_1.6B_1024px", 1024, "Sprint 1.6B"),
    )
}


def find_variant(model: str) -> Variant | None:
    """The row whose alias, hub id or hub id without "_diffusers" is `model`. None if there is none."""
    for variant in VARIANTS.values():
        repo = variant.repo or variant.alias
        if model in (variant.alias, repo, repo.removesuffix("_diffusers")):
            return variant
    return None


def recognize(transformer: Mapping[str, Any], scheduler: Mapping[str, Any] | None = None) -> tuple[Variant, ...]:
    """The published and embedded rows with the same configs as a local folder or a fine-tune.

    `transformer` and `scheduler` are the contents of config.json and scheduler_config.json. Without `scheduler`, any schedule will
    do. There may be several rows, and they may differ in `clamp`, which no config says (Sana_1600M_1024px and its BF16 twin).
    """

    def fits(row: Variant) -> bool:
        return identity(row.transformer, row.scheduler if scheduler is not None else {}) == identity(transformer, scheduler or {})

    return tuple(row for row in VARIANTS.values() if not row.recipe and fits(row))


def unknown_alias(model: str) -> UsageError:
    """The error for a name that is neither an alias, a folder nor a hub id. It lists similar aliases."""
    near = difflib.get_close_matches(model.lower(), VARIANTS, n=4, cutoff=0.5)
    return UsageError(
        f"unknown model {model!r}",
        found="not an alias, a folder or a hub id (owner/name)",
        wanted="one of " + ", ".join(near or VARIANTS),
        fix="sana-export variants",
    )
