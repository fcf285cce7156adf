"""LoRA files: what they do to each layer. The one reader for `export --lora`, `generate --lora` and the runtime. Needs no PyTorch.

lora_names.py knows the tensor names of each program that writes LoRAs, lora_config.py reads configs, and lora_kinds.py computes
what each kind of adapter does to a weight. All kinds share the factor

    scale * alpha / r

With use_rslora, alpha / sqrt(r) replaces alpha / r. If a file has no alpha, alpha / r is 1.

Source: arXiv 2106.09685; the formats of diffusers (`SanaLoraLoaderMixin`), PEFT and LyCORIS.
"""

from __future__ import annotations

import hashlib
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sana_export.errors import ArtifactError, UsageError
from sana_export.files import hash_file
from sana_export.formats.recognize import refuse_pickle
from sana_export.formats.safetensors_file import TensorFile
from sana_export.lora_config import METADATA, LoraConfig, config_in_file, config_in_text
from sana_export.lora_kinds import Delta, Difference, Fold, Hadamard, Kronecker, LowRank, LycorisMagnitude, Magnitude, PeftMagnitude
from sana_export.lora_names import PEFT_PREFIX, Parts, find_parts
from sana_export.lora_scales import OTHERS, LayerScales, check_patterns, parse_scales, scale_of, split_scale
from sana_export.lora_tensors import check_tensors, rank_of
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
    #: Other factors for some layers, by pattern (lora_scales.py).
    layer_scales: LayerScales = ()

    @property
    def scales(self) -> float | dict[str, float]:
        """All scales, as `lora_at` and `load_lora` take them."""
        return {**dict(self.layer_scales), OTHERS: self.scale} if self.layer_scales else self.scale

    def as_json(self) -> dict[str, Any]:
        """Its path and scales, for reports."""
        layers = {"layer_scales": dict(self.layer_scales)} if self.layer_scales else {}
        return {"path": str(self.path), "scale": self.scale, **layers}

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


_DELTAS: dict[str, type[Delta]] = {"LoRA": LowRank, "LoHa": Hadamard, "LoKr": Kronecker, "diff": Difference}


def lora_at(path: str | Path, scale: float | Mapping[str, float] = 1.0) -> Lora:
    """The LoRA at `path` with one scale, or with scales by pattern. Raises UsageError for a wrong scale or pattern."""
    return Lora(user_path(path, "the LoRA"), *split_scale(scale, path))


def parse_lora(text: str) -> Lora:
    """Parse PATH or PATH:SCALE. SCALE may have scales of some layers: NUMBER,PATTERN=NUMBER,... (lora_scales.py)."""
    path, colon, scale = text.rpartition(":")
    if not colon or user_path(text, "the LoRA").exists():
        return Lora(user_path(text, "the LoRA"))
    if re.fullmatch(r"[+-]?\d*,\d+", scale):
        point = shlex.quote(f"{path}:{scale.replace(',', '.')}")
        raise UsageError(f"the scale of the LoRA {path} has a comma", found=text, wanted="a decimal point", fix=f"--lora {point}")
    scales = parse_scales(scale, path)
    if scales is None:
        return Lora(user_path(text, "the LoRA"))  # the colon is part of the path, such as that of a Windows drive
    if not path:
        raise UsageError(
            "a LoRA is given as a path and a scale", found=text, wanted="PATH or PATH:SCALE", fix="--lora style.safetensors:0.7"
        )
    return Lora(user_path(path, "the LoRA"), *scales)


def read_lora(lora: Lora, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Fold]:
    """What the LoRA does to each layer, by the layer's name.

    `shapes` are those of the weights that it may change, [out, in] or [out, in / groups, kh, kw], by layer. Every tensor is
    checked, one at a time; the result reads them again when it needs them. Raises UsageError if there is no such file or if a scale
    is for no layer, and ArtifactError, naming the tensor, if the file is damaged or something else, if its kind is not supported,
    or if it does not fit the model.
    """
    lora_at(lora.path, lora.scales)
    file = TensorFile(lora.weights, fix="download the LoRA again")
    parts = find_parts(lora.path, file, shapes)
    check_patterns(lora.layer_scales, (layer for part in parts for layer in part.layers), lora.path)
    config = read_config(lora, file, parts)
    folds: dict[str, Fold] = {}
    for part in parts:
        check_tensors(lora.path, file, part, {layer: shapes.get(layer) for layer in part.layers})
        folds.update(_folds(lora, file, part, alpha_over_rank(lora, file, part, config), shapes))
    return folds


def _folds(
    lora: Lora, file: TensorFile, part: Parts, factor: float, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Fold]]:
    """What `part` does to each of its layers, with `factor` for alpha / r."""
    tensors = {role: file[name] for role, name in part.names.items()}
    first = 0
    for layer in part.layers:
        rows = slice(first, first + shapes[layer][0])
        scale = scale_of(layer, lora.scale, lora.layer_scales)
        magnitude: Magnitude | None = None
        if "magnitude" in tensors:
            magnitude = PeftMagnitude(tensors["magnitude"], True)
        elif "dora_scale" in tensors:
            norms = tensors["dora_scale"]
            magnitude, scale = LycorisMagnitude(norms, norms.shape[0] != 1, scale), 1.0
        yield layer, Fold(_DELTAS[part.kind](tensors, scale * factor), rows, magnitude)
        first = rows.stop


def alpha_over_rank(lora: Lora, file: TensorFile, part: Parts, config: LoraConfig | None) -> float:
    """alpha / r of a layer, or what stands for it."""
    if part.kind == "diff":
        return 1.0
    rank = rank_of(file, part)
    if rank is None:  # a LoKr of two whole matrices: LyCORIS ignores alpha, PEFT does not
        return 1.0 if "alpha" in part.names or config is None else config.alpha_of(part.module) / config.rank_of(part.module)
    alpha = float(rank) if config is None else config.alpha_of(part.module)
    if "alpha" in part.names:
        alpha = _alpha(lora, part.names["alpha"], file)
    return alpha / (math.sqrt(rank) if config and config.rslora else rank)


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


def read_config(lora: Lora, file: TensorFile, parts: Iterable[Parts]) -> LoraConfig | None:
    """The config of a LoRA, from its file's metadata or adapter_config.json. None if it has none and needs none.

    Raises ArtifactError if the config is damaged, of a kind that is not supported, or missing although alpha is known only there.
    """
    if not lora.peft and METADATA in file.metadata:
        return config_in_text(file.metadata[METADATA], lora.path)
    if lora.peft or any(name.startswith(PEFT_PREFIX) for name in file):
        if lora.config_file.is_file():
            return config_in_file(lora.config_file, lora.path)
        if lora.peft or any(_needs_alpha(part) for part in parts):
            raise ArtifactError(
                f"the LoRA {lora.path} is incomplete",
                found=f"no {PEFT_CONFIG} next to {lora.weights.name}",
                wanted=f"both files of PEFT's format: {PEFT_CONFIG} contains alpha",
                fix=f"put {PEFT_CONFIG} next to it",
            )
    return None


def _needs_alpha(part: Parts) -> bool:
    return part.kind != "diff" and "alpha" not in part.names


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
