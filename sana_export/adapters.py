"""LoRA files: what they are, what they may hold, and what each of them adds to which layer. Read without PyTorch.

Source: arXiv 2106.09685; the formats of diffusers (`SanaLoraLoaderMixin`) and of PEFT. A layer's weight W becomes
W + scale * (alpha / r) * B A. For alpha / r stands alpha / sqrt(r) under use_rslora, and 1 where a file of diffusers says
nothing of alpha. Who reads the tensors is left open: `export` folds them with torch, `runtime` with numpy.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from sana_export.errors import ArtifactError, UsageError
from sana_export.files import hash_file
from sana_export.formats.dtypes import SAFETENSORS_WEIGHT_DTYPES
from sana_export.formats.safetensors_file import PICKLES

DIFFUSERS_FILE, PEFT_FILE, PEFT_CONFIG = "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"
#: What stands before the names of the transformer's layers, in PEFT's file and in any other.
PREFIXES = {True: "base_model.model.", False: "transformer."}
#: Ends of a tensor's name, and what it is of the layer before it.
ROLES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".alpha": "alpha",
}
#: Where diffusers keeps the adapter's config in a safetensors file's own metadata, with "transformer." before each key.
METADATA = "lora_adapter_metadata"
#: lora_alpha of a config that does not say it.
PEFT_ALPHA = 8
#: Keys of a config under which an adapter is more than B A beside W.
BEYOND = ("use_dora", "use_qalora", "lora_bias", "layer_replication", "alora_invocation_tokens", "target_parameters", "use_bdlora")
#: Values of init_lora_weights that leave the base weights as they were.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
#: The depthwise convolution of every block, which no graph takes a LoRA for.
DEPTHWISE = "ff.conv_depth"

#: The shape of a layer's weight, [out, in] or [out, in / groups, kh, kw]; None where the model has no such layer.
ShapeOf = Callable[[str], tuple[int, ...] | None]


class Matrix(Protocol):
    """A tensor of a safetensors file, read when it is asked for."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self) -> Any: ...


M = TypeVar("M", bound=Matrix)


@dataclass(frozen=True)
class Lora:
    """An adapter that the user named: a file or folder, and the factor on all of it."""

    path: Path
    scale: float = 1.0

    @property
    def peft(self) -> bool:
        """Whether this is PEFT's format, and not that of diffusers."""
        return self.weights.name == PEFT_FILE

    @property
    def weights(self) -> Path:
        """The safetensors file. Raises UsageError where there is nothing, ArtifactError where there is something else."""
        return _weights_file(self.path)

    @property
    def sha256(self) -> str:
        """Hash over all that is read."""
        files = (self.weights, self.weights.with_name(PEFT_CONFIG)) if self.peft else (self.weights,)
        return hashlib.sha256("".join(map(hash_file, files)).encode()).hexdigest()


@dataclass(frozen=True)
class Fold(Generic[M]):
    """What one adapter adds to one weight: `factor` * up down, with the shapes [r, in, ...] of down and [out, r, ...] of up."""

    down: M
    up: M
    factor: float


def parse_lora(text: str) -> Lora:
    """The adapter that PATH or PATH:SCALE names."""
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return Lora(Path(text))
    try:
        factor = float(scale)
    except ValueError:
        return Lora(Path(text))  # a colon in the path, which then will not be found or is one of Windows
    if not path or not math.isfinite(factor):
        raise UsageError(
            "a LoRA is a path and a scale", found=text, wanted="PATH or PATH:SCALE", fix="--lora style.safetensors:0.7"
        )
    return Lora(Path(path), factor)


def read_folds(lora: Lora, tensors: Mapping[str, M], metadata: Mapping[str, str], shape_of: ShapeOf) -> dict[str, Fold[M]]:
    """What the adapter adds, by the layer that it is added to, once all of it is known to fit.

    `tensors` and `metadata` are those of `lora.weights`. Reads no matrix. Raises ArtifactError naming the tensor for an adapter of
    another format, kind or model.
    """
    config = _config(lora, metadata)
    if config is not None:
        _check_config(lora, config)
    layers: dict[str, dict[str, str]] = {}
    for name in tensors:
        layer, role = _parse(name, lora)
        layers.setdefault(layer, {})[role] = name
    if not layers:
        raise ArtifactError(f"the LoRA {lora.path} is empty", found="no tensors", wanted="lora_A and lora_B of at least one layer")
    folds = {}
    for layer, parts in layers.items():
        _check_layer(lora, layer, parts, tensors, shape_of(layer))
        down, up = tensors[parts["down"]], tensors[parts["up"]]
        rank = down.shape[0]
        given = float(tensors[parts["alpha"]].read()) if "alpha" in parts else _alpha(layer, config)
        alpha = float(rank) if given is None else given
        spread = math.sqrt(rank) if config and config.get("use_rslora") else rank
        folds[layer] = Fold(down, up, lora.scale * alpha / spread)
    return folds


def _weights_file(path: Path) -> Path:
    if path.is_file():
        if path.suffix in PICKLES:
            raise _pickle(path, path.name)
        return path
    if not path.is_dir():
        raise UsageError(
            f"there is no LoRA at {path}", found="no such file or folder", wanted="a .safetensors file or a folder of one"
        )
    for name in (PEFT_FILE, DIFFUSERS_FILE):
        if (path / name).is_file():
            return path / name
    names = sorted(entry.name for entry in path.iterdir())
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        raise _pickle(path, pickles[0])
    raise ArtifactError(
        f"{path} holds no LoRA",
        found=", ".join(names[:8]) or "an empty folder",
        wanted=f"{DIFFUSERS_FILE}, or {PEFT_FILE} with {PEFT_CONFIG}",
        fix="name the .safetensors file itself",
    )


def _pickle(path: Path, name: str) -> ArtifactError:
    return ArtifactError(
        f"the LoRA {path} is not stored as safetensors",
        found=f"{name}, which runs code when it is read",
        wanted="a .safetensors file",
        fix="load it with diffusers and save it again: pipeline.save_lora_weights(folder, ..., safe_serialization=True)",
    )


def _config(lora: Lora, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The adapter's LoraConfig as a dict, out of adapter_config.json or the file's metadata; None where diffusers wrote none."""
    if lora.peft:
        path = lora.weights.with_name(PEFT_CONFIG)
        if not path.is_file():
            raise ArtifactError(
                f"the LoRA {lora.path} says nothing of its alpha",
                found=f"no {PEFT_CONFIG} beside {PEFT_FILE}",
                wanted="both files of PEFT's format",
                fix=f"put {PEFT_CONFIG} beside it",
            )
        text: str | bytes = path.read_bytes()
    elif METADATA in metadata:
        text = metadata[METADATA]
    else:
        return None
    try:
        return {key.removeprefix("transformer."): value for key, value in json.loads(text).items()}
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ArtifactError(f"the config of the LoRA {lora.path} is damaged", found=str(error), wanted="a JSON object") from error


def _check_config(lora: Lora, config: Mapping[str, Any]) -> None:
    strange = [key for key in BEYOND if config.get(key)]
    if config.get("peft_type", "LORA") != "LORA":
        strange.append("peft_type")
    if config.get("init_lora_weights") not in PLAIN_STARTS:
        strange.append("init_lora_weights")
    if strange:
        raise ArtifactError(
            f"the LoRA {lora.path} is of a kind that cannot be folded in",
            found=f"{strange[0]} = {config[strange[0]]!r}",
            wanted="a plain LoRA: a product B A beside each weight",
            fix="merge it with PEFT and export the merged checkpoint",
        )


def _parse(name: str, lora: Lora) -> tuple[str, str]:
    """The layer that a tensor belongs to, and its role there."""
    if "lora_magnitude_vector" in name or "dora_scale" in name:
        raise ArtifactError(
            f"the LoRA {lora.path} is a DoRA, which cannot be folded in",
            found=name,
            wanted="lora_A and lora_B alone",
            fix="train with use_dora=False, or merge it with PEFT and export the merged checkpoint",
        )
    prefix = PREFIXES[lora.peft]
    role = next((end for end in ROLES if name.endswith(end)), None)
    if not name.startswith(prefix) or role is None:
        raise ArtifactError(
            f"the LoRA {lora.path} holds a tensor that is none of Sana's transformer",
            found=name,
            wanted=f"names like {prefix}transformer_blocks.0.attn1.to_q.lora_A.weight",
            fix="name a LoRA in the format of diffusers or PEFT that was trained on this transformer",
        )
    return name.removeprefix(prefix).removesuffix(role), ROLES[role]


def _check_layer(
    lora: Lora, layer: str, parts: Mapping[str, str], tensors: Mapping[str, Matrix], shape: tuple[int, ...] | None
) -> None:
    """Raise ArtifactError unless the model has the layer, with a weight of `shape`, and its matrices fit."""
    if shape is None and not layer.endswith(DEPTHWISE):
        raise ArtifactError(
            f"the LoRA {lora.path} belongs to another model",
            found=f"{layer}, which this transformer does not have",
            wanted="layers of this checkpoint's transformer",
            fix="name a LoRA that was trained on this checkpoint",
        )
    if lacking := [role for role in ("down", "up") if role not in parts]:
        raise ArtifactError(
            f"the LoRA {lora.path} is not whole",
            found=f"no {'lora_A' if lacking == ['down'] else 'lora_B'} of {layer}",
            wanted="lora_A and lora_B of each layer",
            fix="download the LoRA again",
        )
    if shape is None or (len(shape) == 4 and shape[1] == 1 < shape[0]):
        raise ArtifactError(
            f"the LoRA {lora.path} changes a depthwise convolution, which cannot be folded in",
            found=parts["down"],
            wanted="linear layers and convolutions without groups",
            fix=f"train without {layer.rpartition('.')[2]}: a LoRA there mixes channels, which no depthwise weight does",
        )
    rank = tensors[parts["down"]].shape[:1] or (0,)
    for role, wanted in (("down", (*rank, *shape[1:])), ("up", (*shape[:1], *rank, *(1 for _ in shape[2:])))):
        name, part = parts[role], tensors[parts[role]]
        if part.shape != wanted or not rank[0]:
            raise ArtifactError(
                f"{name} in the LoRA {lora.path} does not fit this checkpoint",
                found=list(part.shape),
                wanted=f"{list(wanted)}, for {layer}.weight of {list(shape)}",
                fix="name a LoRA that was trained on this checkpoint",
            )
        if part.dtype not in SAFETENSORS_WEIGHT_DTYPES:
            raise ArtifactError(
                f"{name} in the LoRA {lora.path} is stored in a dtype that is not read",
                found=part.dtype,
                wanted=", ".join(SAFETENSORS_WEIGHT_DTYPES),
            )


def _alpha(layer: str, config: Mapping[str, Any] | None) -> float | None:
    """alpha of a layer: the value of the config's first pattern that fits it (as PEFT matches), or the config's."""
    if config is None:
        return None
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return float(value)
    return float(config.get("lora_alpha", PEFT_ALPHA))
