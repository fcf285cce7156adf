"""Tensors of PyTorch's pickles (.pth, .pt, .ckpt), converted once to a safetensors file in the cache.

PyTorch reads them with `weights_only`: a pickle that contains anything but tensors and plain values is refused, so no code of it
runs.
"""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_export.environment import cache_folder, import_digest
from sana_export.errors import ArtifactError
from sana_export.files import disk_errors, hash_file, locked, partial_path, require_free
from sana_export.formats.dtypes import WEIGHT_DTYPES
from sana_export.formats.recognize import not_what_was_wanted
from sana_export.formats.safetensors_header import read_header

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

#: The key of the tensors in what a trainer saves.
STATE = "state_dict"
WANTED = "a PyTorch file of weights"
AGAIN = "download the file again"


def safetensors_of(path: Path, source: str, wanted: Callable[[str], bool]) -> Path:
    """A safetensors file with those tensors of the pickle `path` whose names are `wanted`. `source` is what errors call it.

    It is in the user's cache, under the hash of the pickle and of the code that chooses the tensors. Raises ArtifactError if the
    pickle is damaged, contains objects that are not tensors of weights, or no tensors that are wanted, and DependencyError if the
    disk is full.
    """
    target = cache_folder() / "converted" / f"{hash_file(path)}-{import_digest(wanted.__module__)[:12]}.safetensors"
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.with_suffix(".lock"), lambda: log.warning("another process converts %s: waiting for it", source)):
            if not _is_whole(target):
                _convert(path, source, wanted, target)
    return target


def _is_whole(target: Path) -> bool:
    """Whether an earlier conversion is there and not truncated. A damaged one is made again."""
    try:
        return target.is_file() and bool(read_header(target, fix=None).entries)
    except ArtifactError as error:
        log.warning("converting again: %s", error.message)
        return False


def _convert(path: Path, source: str, wanted: Callable[[str], bool], target: Path) -> None:
    from safetensors.torch import save_file

    found = {name: value for name, value in _tensors(path, source).items() if wanted(name)}
    if not found:
        raise ArtifactError(f"{source} has no weights that are read", found="tensors of another network", wanted="a ControlNet's")
    for name, value in found.items():
        _check_tensor(name, value, source)
    size, stored = sum(value.numel() * value.element_size() for value in found.values()), path.stat().st_size
    if size > stored:  # a tensor that repeats a few numbers could claim any size
        raise ArtifactError(
            f"{source} claims more numbers than it has",
            found=f"{size} bytes of tensors in {stored} bytes",
            wanted=WANTED,
            fix=AGAIN,
        )
    require_free(target.parent, size, f"the weights of {source}")
    log.info("converting %s to safetensors: %s", source, target)
    partial = partial_path(target)
    try:
        save_file({name: value.contiguous() for name, value in _apart(found).items()}, partial)
        partial.chmod(0o644)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _check_tensor(name: str, value: Tensor, source: str) -> None:
    """Raise ArtifactError unless this is a plain tensor of a dtype that weights can have."""
    import torch

    kind = str(value.dtype).removeprefix("torch.")
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_nested
    if not plain or kind not in WEIGHT_DTYPES or not name.isprintable():
        raise ArtifactError(
            f"{source} has a tensor that cannot be weights",
            found=f"{name!r:.80}, {kind}" + ("" if plain else " in a form of its own"),
            wanted="dense tensors of " + ", ".join(WEIGHT_DTYPES),
            fix="use the weights before they were quantized or compressed",
        )


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those that share memory with an earlier one as copies: safetensors stores no shared tensors."""
    seen: set[int] = set()
    result = {}
    for name, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        result[name] = value.clone() if place in seen else value
        seen.add(place)
    return result


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
            raise not_what_was_wanted(path, WANTED, error, fix=AGAIN) from error
        raise ArtifactError(
            f"{source} contains more than tensors, so loading it could run code",
            found=refused[1] or refused[2],
            wanted="tensors by name",
            fix="ask its author for a .safetensors file",
        ) from error
    except Exception as error:  # whatever a damaged file makes PyTorch raise
        raise not_what_was_wanted(path, WANTED, error, fix=AGAIN) from error
    content = content.get(STATE, content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping):
        raise ArtifactError(f"{source} has no weights", found=f"a {type(content).__name__}", wanted="tensors by name")
    return {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
