"""An autoencoder that replaces a checkpoint's own: found by name, in a folder or on the hub, and compared with the transformer."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from sana_export.architectures import LATENT_STRIDE
from sana_export.autoencoders import AUTOENCODERS, find_autoencoder
from sana_export.checkpoint.hub import fetch, read_json
from sana_export.checkpoint.model_names import from_url
from sana_export.checkpoint.network_folder import (
    CONFIG,
    check_class,
    find_folder,
    hash_files,
    is_synthetic,
    places,
    repository_files,
    synthetic_folder,
    weight_files,
)
from sana_export.errors import ArtifactError, UsageError
from sana_export.hub.client import Hub
from sana_export.hub.names import may_be_hub_id
from sana_export.synth.checkpoint import make_autoencoder
from sana_export.user_paths import at_home

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Vae:
    """The folder of an autoencoder in diffusers' format: config.json and the weights."""

    #: The alias, hub id or folder that the user gave.
    source: str
    #: The folder.
    folder: Path
    #: The variant of the weight files that is preferred: "fp16" means files such as *.fp16.safetensors.
    weights_variant: str | None = None

    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return read_json(self.folder / CONFIG)

    @property
    def weight_files(self) -> list[Path]:
        """Its safetensors files: one, or the shards that its index lists."""
        return weight_files("vae", self.folder, self.weights_variant, self.source)

    @cached_property
    def sha256(self) -> str:
        """Hash of its config and weights."""
        return hash_files((self.folder / CONFIG, *self.weight_files))

    @property
    def synthetic(self) -> bool:
        """Whether its weights are random."""
        return is_synthetic(self.folder)


def open_vae(name: str, weights_variant: str | None, hub: Hub) -> Vae:
    """Find the autoencoder `name`: an alias of autoencoders.py, a local folder, a hub id (also as "owner/name@revision") or its
    address.

    The folder or repository is an autoencoder itself or a pipeline with one. Raises UsageError for an unknown name, ArtifactError
    if it is no AutoencoderDC, and DependencyError if the hub cannot be reached.
    """
    name, revision = from_url(at_home(name, "--vae"), None, "--vae")
    name = name if revision is None else f"{name}@{revision}"
    row = find_autoencoder(name)
    if row is None and name.strip() and Path(name).is_dir():
        top = Path(name)
    elif row is not None and row.repo is None:
        top = synthetic_folder(row.alias, CONFIG, make_autoencoder)
    elif row is None and name.strip() and Path(name).is_file():
        raise UsageError(
            f"{name} is a file, not an autoencoder",
            found="a file",
            wanted=f"the folder that contains {CONFIG} and the weights, a hub id (owner/name), or one of {', '.join(AUTOENCODERS)}",
            fix=shlex.join(["--vae", str(Path(name).parent)]) if Path(name).with_name(CONFIG).is_file() else "--vae dc-ae-lite",
        )
    elif row is not None or may_be_hub_id(name):
        repo, _, commit = (row.repo if row and row.repo else name).partition("@")
        select = partial(repository_files, component="vae", weights_variant=weights_variant, source=name)
        top = fetch(repo, commit or None, hub, partial(_check, source=name), select, first=places("vae"))
    else:
        raise UsageError(
            f"unknown autoencoder {name!r}",
            found="not an alias, a folder or a hub id (owner/name)",
            wanted="a folder or hub id of an AutoencoderDC, or one of " + ", ".join(AUTOENCODERS),
            fix="--vae dc-ae-lite",
        )
    folder = find_folder("vae", top)
    if folder is None:
        raise ArtifactError(
            f"{name} has no autoencoder",
            found=", ".join(sorted(path.name for path in top.iterdir())[:8]) or "an empty folder",
            wanted=" or ".join(places("vae")) + ", and the weights beside it",
            fix="use the folder that AutoencoderDC.from_pretrained loads, or --vae dc-ae-lite",
        )
    vae = Vae(name, folder, weights_variant)
    _check(vae.config(), name)
    return vae


def _check(config: Mapping[str, Any], source: str) -> None:
    check_class("vae", config, source, "is not an autoencoder of Sana", "omit --vae, or use --vae dc-ae-lite")


def fit_problems(
    vae: Vae, config: Mapping[str, Any], transformer: Mapping[str, Any], own: Mapping[str, Any] | None, model: str
) -> Iterator[ArtifactError]:
    """Why `vae`, whose complete config is `config`, does not fit the checkpoint `model`, if it does not.

    `transformer` is the config of its transformer, `own` the complete one of the autoencoder that it was trained with. None:
    unknown, so its stride is that of every Sana.
    """
    found = (config["latent_channels"], _stride(config))
    wanted = (transformer["in_channels"], LATENT_STRIDE if own is None else _stride(own))
    if found != wanted:
        yield ArtifactError(
            f"the autoencoder {vae.source} does not fit the transformer of {model}",
            found=f"{vae.source} decodes latents of {found[0]} channels, {found[1]} image pixels per latent pixel",
            wanted=f"{wanted[0]} channels and {wanted[1]} pixels, as {model} has",
            fix="omit --vae, or use --vae dc-ae-lite" if wanted == (32, LATENT_STRIDE) else "omit --vae",
        )


def _stride(config: Mapping[str, Any]) -> int:
    """Image pixels per latent pixel, in each direction."""
    return int(2 ** (len(config["encoder_block_out_channels"]) - 1))
