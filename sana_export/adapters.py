"""LoRA files: what they add to each layer. The one reader for `export --lora`, `generate --lora` and the runtime. Needs no PyTorch.

A layer's weight W becomes

    W + scale * (alpha / r) * B A

With use_rslora, alpha / sqrt(r) replaces alpha / r. If a file has no alpha, alpha / r is 1. lora_names.py knows the tensor names of
each program that writes LoRAs, and lora_config.py reads configs.

Source: arXiv 2106.09685; the formats of diffusers (`SanaLoraLoaderMixin`) and PEFT.
"""

from __future__ import annotations

import hashlib
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sana_export.errors import ArtifactError, UsageError
from sana_export.files import hash_file
from sana_export.formats.arrays import Float32
from sana_export.formats.dtypes import SAFETENSORS_WEIGHT_DTYPES
from sana_export.formats.recognize import refuse_pickle
from sana_export.formats.safetensors_file import StoredTensor, TensorFile
from sana_export.lora_config import METADATA, LoraConfig, config_in_file, config_in_text
from sana_export.lora_names import PEFT_PREFIX, Parts, find_parts
from sana_export.numeric import MOST_SCALE, real
from sana_export.user_paths import user_path

DIFFUSERS_FILE, PEFT_FILE, PEFT_CONFIG = "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"
_SAVE_AGAIN = "load it with diffusers and save it again: pipeline.save_lora_weights(folder, ..., safe_serialization=True)"
_MOST_ALPHA_BYTES = 64


@dataclass(frozen=True)
class Lora:
    """A LoRA that the user asked for."""

    #: The file, or the folder that contains it.
    path: Path
    #: The factor on everything that it adds.
    scale: float = 1.0

    @property
    def peft(self) -> bool:
        """Whether it is in PEFT's format rather than that of diffusers."""
        return self.weights.name == PEFT_FILE

    @property
    def weights(self) -> Path:
        """The safetensors file. Raises UsageError if `path` does not exist, ArtifactError if it is something else."""
        return _weights_file(self.path)

    @property
    def config_file(self) -> Path:
        """Where PEFT's config is, if there is one."""
        return self.weights.with_name(PEFT_CONFIG)

    @property
    def sha256(self) -> str:
        """Hash of everything that is read."""
        files = [self.weights, *([self.config_file] if self.config_file.is_file() else [])]
        return hashlib.sha256("".join(map(hash_file, files)).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Fold:
    """What one adapter adds to one weight: `factor` * up down."""

    #: The matrix A, [r, in, ...].
    down: StoredTensor
    #: The matrix B, [out, r, ...].
    up: StoredTensor
    #: The adapter's scale times alpha / r.
    factor: float

    def product(self, rows: slice = slice(None)) -> Float32:
        """These rows of the product [out, in * kh * kw], times the factor. The matrices are read now."""
        up, down = (part.read().reshape(part.shape[0], -1) for part in (self.up, self.down))
        with np.errstate(over="ignore", invalid="ignore"):  # the caller finds values that are not finite
            product: Float32 = (up[rows] @ down) * np.float32(self.factor)
        return product


def parse_lora(text: str) -> Lora:
    """Parse PATH or PATH:SCALE."""
    path, colon, scale = text.rpartition(":")
    if not colon or user_path(text, "the LoRA").exists():
        return Lora(user_path(text, "the LoRA"))
    if re.fullmatch(r"[+-]?\d*,\d+", scale):
        point = shlex.quote(f"{path}:{scale.replace(',', '.')}")
        raise UsageError(f"the scale of the LoRA {path} has a comma", found=text, wanted="a decimal point", fix=f"--lora {point}")
    try:
        factor = float(scale)
    except ValueError:
        return Lora(user_path(text, "the LoRA"))  # the colon is part of the path, such as that of a Windows drive
    if not path:
        raise UsageError(
            "a LoRA is given as a path and a scale", found=text, wanted="PATH or PATH:SCALE", fix="--lora style.safetensors:0.7"
        )
    return Lora(user_path(path, "the LoRA"), checked_scale(factor, path))


def checked_scale(scale: Any, path: str | Path) -> float:
    """The scale of the LoRA at `path`. Raises UsageError unless it is a number within +-`MOST_SCALE`."""
    return real(f"the scale of the LoRA {path}", scale, -MOST_SCALE, MOST_SCALE)


def read_lora(lora: Lora, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Fold]:
    """What the LoRA adds to each layer, by the layer's name.

    `shapes` are those of the weights that it may change, [out, in] or [out, in / groups, kh, kw], by layer. No matrix is read.
    Raises UsageError if there is no such file, and ArtifactError, naming the tensor, if the file is damaged or something else, if
    its kind is not supported, or if it does not fit the model.
    """
    checked_scale(lora.scale, lora.path)
    file = TensorFile(lora.weights, fix="download the LoRA again")
    parts = find_parts(lora.path, file, shapes)
    config = read_config(lora, file, parts)
    folds = {}
    for layer, names in parts.items():
        _check_layer(lora, file, layer, names, shapes.get(layer))
        down, up = file[names.down], file[names.up]
        rank = down.shape[0]
        alpha = float(rank) if config is None else config.alpha_of(layer)
        if names.alpha is not None:
            alpha = _alpha(lora, names.alpha, file)
        factor = lora.scale * alpha / (math.sqrt(rank) if config and config.rslora else rank)
        folds[layer] = Fold(down, up, factor)
    return folds


def _download(path: Path) -> str:
    """What to do if there is nothing at `path`: it may be a hub id, and LoRAs are not downloaded."""
    if len(path.parts) != 2 or path.is_absolute() or path.suffix or path.parts[0] in (".", ".."):
        return "check the path"
    return f"{shlex.join(['hf', 'download', str(path), '--local-dir', path.name])}, then use {path.name} as the path"


def _weights_file(path: Path) -> Path:
    if path.is_file():
        refuse_pickle(path, fix=_SAVE_AGAIN)
        return path
    if not path.is_dir():
        raise UsageError(
            f"there is no LoRA at {path}",
            found="no such file or folder",
            wanted="a .safetensors file, or a folder that contains one",
            fix=_download(path),
        )
    for name in (PEFT_FILE, DIFFUSERS_FILE):
        if (path / name).is_file():
            return path / name
    names = sorted(entry.name for entry in path.iterdir())
    for name in names:
        refuse_pickle(path / name, fix=_SAVE_AGAIN)
    raise ArtifactError(
        f"{path} contains no LoRA",
        found=", ".join(names[:8]) or "an empty folder",
        wanted=f"{DIFFUSERS_FILE}, or {PEFT_FILE} with {PEFT_CONFIG}",
        fix="name the .safetensors file itself",
    )


def read_config(lora: Lora, file: TensorFile, parts: Mapping[str, Parts]) -> LoraConfig | None:
    """The config of a LoRA, from its file's metadata or adapter_config.json. None if it has none and needs none.

    Raises ArtifactError if the config is damaged, of a kind that is not supported, or missing although alpha is known only there.
    """
    if not lora.peft and METADATA in file.metadata:
        return config_in_text(file.metadata[METADATA], lora.path)
    if lora.peft or any(name.startswith(PEFT_PREFIX) for name in file):
        if lora.config_file.is_file():
            return config_in_file(lora.config_file, lora.path)
        if lora.peft or any(names.alpha is None for names in parts.values()):
            raise ArtifactError(
                f"the LoRA {lora.path} is incomplete",
                found=f"no {PEFT_CONFIG} next to {lora.weights.name}",
                wanted=f"both files of PEFT's format: {PEFT_CONFIG} contains alpha",
                fix=f"put {PEFT_CONFIG} next to it",
            )
    return None


def _check_layer(lora: Lora, file: TensorFile, layer: str, names: Parts, shape: tuple[int, ...] | None) -> None:
    """Raise ArtifactError unless the layer's matrices fit a weight of `shape`."""
    if shape is None or (len(shape) == 4 and shape[1] == 1 < shape[0]):
        raise ArtifactError(
            f"the LoRA {lora.path} changes a depthwise convolution, which is not supported",
            found=names.down,
            wanted="linear layers and convolutions without groups",
            fix=f"train without {layer.rpartition('.')[2]}: a LoRA on it mixes channels, which a depthwise weight cannot",
        )
    rank = (max((1, *file.entries[names.down].shape[:1])),)
    for name, wanted in ((names.down, (*rank, *shape[1:])), (names.up, (*shape[:1], *rank, *(1 for _ in shape[2:])))):
        part = file.entries[name]
        if not _fits(part.shape, wanted):
            raise ArtifactError(
                f"{name} in the LoRA {lora.path} does not fit this checkpoint",
                found=list(part.shape),
                wanted=f"{list(wanted)}, for {layer}.weight of {list(shape)}",
                fix="use a LoRA that was trained on this checkpoint",
            )
        if part.dtype not in SAFETENSORS_WEIGHT_DTYPES:
            raise ArtifactError(
                f"{name} in the LoRA {lora.path} has an unsupported dtype",
                found=part.dtype,
                wanted=", ".join(SAFETENSORS_WEIGHT_DTYPES),
                fix="save it in float16, bfloat16 or float32",
            )


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether both are equal, or differ only in dimensions of 1 at the end: some programs store a 1x1 convolution as a matrix."""
    return (shape[:2] == wanted[:2] and all(size == 1 for size in (*shape[2:], *wanted[2:]))) or shape == wanted


def _alpha(lora: Lora, name: str, file: TensorFile) -> float:
    """The number in an alpha tensor, of any shape with one value."""
    values = file[name].read() if file.entries[name].bytes <= _MOST_ALPHA_BYTES else np.zeros(0)
    if values.size != 1 or not np.isfinite(values).all():
        raise ArtifactError(
            f"{name} in the LoRA {lora.path} is not a number",
            found=f"shape {list(file.entries[name].shape)}, values {values.reshape(-1)[:4].tolist()}",
            wanted="one finite number",
            fix="download the LoRA again",
        )
    return float(values.reshape(-1)[0])
