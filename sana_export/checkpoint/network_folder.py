"""A single network in diffusers' format that replaces or joins a checkpoint's own: config.json and weights, in a folder or a hub
repository, at its top or in the folder that a pipeline has for it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sana_export.checkpoint.components import COMPONENTS, select_weights
from sana_export.checkpoint.hub import ReadJson, read_json
from sana_export.environment import cache_folder, import_digest
from sana_export.errors import ArtifactError
from sana_export.files import hash_file
from sana_export.synth.checkpoint import MARKER

log = logging.getLogger(__name__)

CONFIG = "config.json"


def places(component: str) -> tuple[str, str]:
    """Where the config of a `component` may be: in a pipeline, whose top may have a config of something else, or alone."""
    return f"{component}/{CONFIG}", CONFIG


def find_folder(component: str, top: Path) -> Path | None:
    """The folder of the `component` in `top`, or `top` itself. None if neither has a config."""
    return next(((top / place).parent for place in places(component) if (top / place).is_file()), None)


def weight_files(component: str, folder: Path, weights_variant: str | None, source: str) -> list[Path]:
    """The safetensors files in `folder`: one, or the shards that its index lists."""
    names = [path.name for path in folder.iterdir()]
    found = _select_in("", component, names, lambda name: read_json(folder / name), weights_variant, source)
    return [folder / name for name in found]


def repository_files(
    names: Collection[str], read: ReadJson, *, component: str, weights_variant: str | None, source: str
) -> list[str]:
    """The files of a hub repository that are read, from the names of all."""
    place = next((place for place in places(component) if place in names), CONFIG)
    marker = [MARKER] if MARKER in names else []
    return [place, *marker, *_select_in(place.removesuffix(CONFIG), component, names, read, weights_variant, source)]


def check_class(component: str, config: Mapping[str, Any], source: str, message: str, fix: str) -> None:
    """Raise ArtifactError if `config` is that of another class. `message` follows `source` in the error."""
    classes = COMPONENTS[component].classes
    if (found := config.get("_class_name", classes[0])) not in classes:
        raise ArtifactError(f"{source} {message}", found=f"config.json of {found}", wanted=" or ".join(classes), fix=fix)


def hash_files(paths: Iterable[Path]) -> str:
    """One hash of the contents of several files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hash_file(path).encode())
    return digest.hexdigest()


def is_synthetic(folder: Path) -> bool:
    """Whether the weights in `folder`, which may be that of a pipeline's network, are random."""
    return any((place / MARKER).is_file() for place in (folder, folder.parent))


def synthetic_folder(name: str, last: str, make: Callable[[str, Path], object]) -> Path:
    """The folder in the cache of the synthetic network or checkpoint `name`. `make` writes it if its file `last` is not there."""
    folder = cache_folder() / "checkpoints" / f"{name}-{import_digest('sana_export.synth.checkpoint')[:12]}"
    if not (folder / last).is_file():
        log.info("making %s with random weights in %s", name, folder)
        make(name, folder)
    return folder


def _select_in(
    folder: str, component: str, names: Collection[str], read: ReadJson, weights_variant: str | None, source: str
) -> list[str]:
    """The weight files in `folder` ("" or "vae/") among `names`, as `select_weights` chooses them."""
    prefix = f"{component}/"
    inside = {prefix + PurePosixPath(name).name for name in names if name == folder + PurePosixPath(name).name}

    def own(name: str) -> str:
        return folder + name.removeprefix(prefix)

    return [own(name) for name in select_weights(component, inside, weights_variant, lambda name: read(own(name)), source)]
