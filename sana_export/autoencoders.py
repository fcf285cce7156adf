"""The autoencoders that sana_export knows by name (data only): those that replace a checkpoint's own, and synthetic ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Autoencoder:
    """One autoencoder: published, or synthetic (seeded random weights, made on first use)."""

    #: Its name on the command line.
    alias: str
    #: A row of `DECODERS`.
    decoder: str
    #: The hub id of the published folder in diffusers' format. None if it is not published.
    repo: str | None = None


AUTOENCODERS: dict[str, Autoencoder] = {
    row.alias: row
    for row in (
        Autoencoder("dc-ae", "dc-ae", "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"),
        Autoencoder("dc-ae-lite", "dc-ae-lite", "mit-han-lab/dc-ae-lite-f32c32-diffusers"),
        Autoencoder("tiny-dc-ae", "dc-ae"),
        Autoencoder("tiny-dc-ae-lite", "dc-ae-lite"),
        Autoencoder("mid-dc-ae", "dc-ae"),
        Autoencoder("mid-dc-ae-lite", "dc-ae-lite"),
    )
}

#: The decoders that autoencoders of any width can have, with what is said about each.
DECODERS = {
    "dc-ae": "f32c32, sana-1.1: the one of every published checkpoint",
    "dc-ae-lite": "f32c32 without attention and without the stage at full resolution: less work, the same latents",
}


def find_autoencoder(name: str) -> Autoencoder | None:
    """The row whose alias or hub id is `name`. None if there is none."""
    return next((row for row in AUTOENCODERS.values() if name in (row.alias, row.repo)), None)
