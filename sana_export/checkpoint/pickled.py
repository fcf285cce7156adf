"""Tensors of PyTorch's pickles (.pth, .pt, .ckpt), converted once to a safetensors file in the cache.

PyTorch reads them with `weights_only`: a pickle that contains anything but tensors and plain values is refused, so no code of it
runs.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_export.environment import cache_folder
from sana_export.errors import ArtifactError
from sana_export.files import disk_errors, hash_file, require_free
from sana_export.formats.recognize import not_what_was_wanted

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

#: The key of the tensors in what a trainer saves.
STATE = "state_dict"
WANTED = "a PyTorch file of weights"


def safetensors_of(path: Path, source: str, wanted: Callable[[str], bool]) -> Path:
    """A safetensors file with those tensors of the pickle `path` whose names are `wanted`. `source` is what errors call it.

    It is in the user's cache, under the hash of the pickle. Raises ArtifactError if the pickle is damaged, contains objects that
    are not tensors, or no tensors that are wanted, and DependencyError if the disk is full.
    """
    target = cache_folder() / "converted" / f"{hash_file(path)}.safetensors"
    if target.is_file():
        return target
    from safetensors.torch import save_file

    found = {name: value for name, value in _tensors(path, source).items() if wanted(name)}
    if not found:
        raise ArtifactError(f"{source} has no weights that are read", found="tensors of another network", wanted="a ControlNet's")
    size = sum(value.numel() * value.element_size() for value in found.values())
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        require_free(target.parent, size, f"the weights of {source}")
        log.info("converting %s to safetensors: %s", source, target)
        try:
            save_file({name: value.contiguous().clone() for name, value in found.items()}, partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return target


def _tensors(path: Path, source: str) -> Mapping[str, Tensor]:
    import torch

    try:
        try:
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)  # PyTorch's format before 1.6
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)|Trying to (?:instantiate|call) [\w. ]*?([\w.]+\.\w+)", str(error))
        if refused is None:
            raise not_what_was_wanted(path, WANTED, error, fix="download the file again") from error
        raise ArtifactError(
            f"{source} contains more than tensors, so loading it could run code",
            found=refused[1] or refused[2],
            wanted="tensors by name",
            fix="ask its author for a .safetensors file",
        ) from error
    except Exception as error:  # whatever a damaged file makes PyTorch raise
        raise not_what_was_wanted(path, WANTED, error, fix="download the file again") from error
    content = content.get(STATE, content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping):
        raise ArtifactError(f"{source} has no weights", found=f"a {type(content).__name__}", wanted="tensors by name")
    return {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
