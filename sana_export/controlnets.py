"""The ControlNets that sana_export knows by name (data only): the published ones, and synthetic ones."""

from __future__ import annotations

from dataclasses import dataclass

from sana_export.architectures import ARCHITECTURES, Config, controlnet_config


@dataclass(frozen=True)
class NamedControlNet:
    """One ControlNet: published, or synthetic (seeded random weights, made on first use)."""

    #: Its name on the command line.
    alias: str
    #: The transformer that it was trained for, a row of `ARCHITECTURES`.
    architecture: str
    #: Number of its blocks.
    layers: int = 7
    #: Height and width in pixels of the images that it was trained on.
    native_size: int = 1024
    #: The hub id of the published one. None if it is not published.
    repo: str | None = None
    #: Its weights in the repository, in the original code's format.
    file: str = ""

    @property
    def config(self) -> Config:
        """config.json of `SanaControlNetModel`."""
        return controlnet_config(ARCHITECTURES[self.architecture].transformer(self.native_size), self.layers)


#: Source of the names: the ControlNet page of NVlabs/Sana's documentation.
CONTROLNETS: dict[str, NamedControlNet] = {
    row.alias: row
    for row in (
        NamedControlNet(
            "controlnet-hed-600m",
            "Sana 600M",
            repo="Efficient-Large-Model/Sana_600M_1024px_ControlNet_HED",
            file="checkpoints/Sana_600M_1024px_ControlNet_HED.pth",
        ),
        NamedControlNet(
            "controlnet-hed-1600m",
            "Sana 1600M",
            repo="Efficient-Large-Model/Sana_1600M_1024px_BF16_ControlNet_HED",
            file="checkpoints/Sana_1600M_1024px_BF16_ControlNet_HED.pth",
        ),
        NamedControlNet("tiny-random-controlnet", "tiny-random", layers=2, native_size=512),
        NamedControlNet("mid-controlnet", "mid", layers=4, native_size=512),
    )
}


def fitting(cross_heads: int, cross_head_dim: int) -> list[str]:
    """The aliases of the ControlNets for a transformer with these heads of cross-attention, the published ones first."""
    wanted = {"num_cross_attention_heads": cross_heads, "cross_attention_head_dim": cross_head_dim}
    rows = [row for row in CONTROLNETS.values() if wanted.items() <= row.config.items()]
    return [row.alias for row in sorted(rows, key=lambda row: row.repo is None)]


def find_controlnet(name: str) -> NamedControlNet | None:
    """The row whose alias or hub id is `name`. None if there is none."""
    return next((row for row in CONTROLNETS.values() if name in (row.alias, row.repo)), None)
