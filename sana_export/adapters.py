"""LoRA files: their formats, what they may contain, and what they add to each layer. Needs no PyTorch.

A layer's weight W becomes

    W + scale * (alpha / r) * B A

With use_rslora, alpha / sqrt(r) replaces alpha / r. If a file of diffusers has no alpha, alpha / r is 1. The caller reads the
tensors: `checkpoint/` with torch, `runtime/` with numpy.

Source: arXiv 2106.09685; the formats of diffusers (`SanaLoraLoaderMixin`) and PEFT.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from sana_export.errors import ArtifactError, UsageError
from sana_export.files import hash_file
from sana_export.formats.dtypes import SAFETENSORS_WEIGHT_DTYPES
from sana_export.formats.safetensors_file import PICKLES
from sana_export.numeric import MOST_SCALE, real
from sana_export.user_paths import user_path

DIFFUSERS_FILE, PEFT_FILE, PEFT_CONFIG = "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"
#: The prefix of the transformer's layer names: True in PEFT's format, False in the format of diffusers.
PREFIXES = {True: "base_model.model.", False: "transformer."}
#: Suffixes of tensor names, and the role of such a tensor in its layer.
ROLES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".alpha": "alpha",
}
#: The key of a safetensors file's metadata under which diffusers stores the adapter's config. Its keys start with "transformer.".
METADATA = "lora_adapter_metadata"
#: PEFT's default of lora_alpha.
PEFT_ALPHA = 8
#: Keys of a config that make an adapter more than a product B A added to W.
UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
    "target_parameters",
    "use_bdlora",
)
#: Values of init_lora_weights that do not change the base weights.
PLAIN_INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
#: The depthwise convolution of every block. No graph supports a LoRA on it.
DEPTHWISE = "ff.conv_depth"

#: The shape of a layer's weight, [out, in] or [out, in / groups, kh, kw]; None if the model has no such layer.
ShapeOf = Callable[[str], tuple[int, ...] | None]


class Matrix(Protocol):
    """A tensor of a safetensors file. Its values are read on demand."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self) -> Any: ...


M = TypeVar("M", bound=Matrix)


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
    def sha256(self) -> str:
        """Hash of everything that is read."""
        files = (self.weights, self.weights.with_name(PEFT_CONFIG)) if self.peft else (self.weights,)
        return hashlib.sha256("".join(map(hash_file, files)).encode()).hexdigest()


@dataclass(frozen=True)
class Fold(Generic[M]):
    """What one adapter adds to one weight: `factor` * up down."""

    #: The matrix A, [r, in, ...].
    down: M
    #: The matrix B, [out, r, ...].
    up: M
    #: The adapter's scale times alpha / r.
    factor: float


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


def read_folds(lora: Lora, tensors: Mapping[str, M], metadata: Mapping[str, str], shape_of: ShapeOf) -> dict[str, Fold[M]]:
    """What the adapter adds to each layer, by the layer's name.

    `tensors` and `metadata` are those of `lora.weights`; `shape_of` gives the shapes of the model's weights. No matrix is read.
    Raises ArtifactError, naming the tensor, if the adapter's format or kind is not supported or it does not fit the model.
    """
    checked_scale(lora.scale, lora.path)
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
            f"there is no LoRA at {path}",
            found="no such file or folder",
            wanted="a .safetensors file, or a folder that contains one",
        )
    for name in (PEFT_FILE, DIFFUSERS_FILE):
        if (path / name).is_file():
            return path / name
    names = sorted(entry.name for entry in path.iterdir())
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        raise _pickle(path, pickles[0])
    raise ArtifactError(
        f"{path} contains no LoRA",
        found=", ".join(names[:8]) or "an empty folder",
        wanted=f"{DIFFUSERS_FILE}, or {PEFT_FILE} with {PEFT_CONFIG}",
        fix="name the .safetensors file itself",
    )


def _pickle(path: Path, name: str) -> ArtifactError:
    return ArtifactError(
        f"the LoRA {path} is not stored as safetensors",
        found=f"{name}, which can run code when it is loaded",
        wanted="a .safetensors file",
        fix="load it with diffusers and save it again: pipeline.save_lora_weights(folder, ..., safe_serialization=True)",
    )


def _config(lora: Lora, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The adapter's LoraConfig, from adapter_config.json or the file's metadata. None if a diffusers file has none."""
    if lora.peft:
        path = lora.weights.with_name(PEFT_CONFIG)
        if not path.is_file():
            raise ArtifactError(
                f"the LoRA {lora.path} is incomplete",
                found=f"no {PEFT_CONFIG} next to {PEFT_FILE}",
                wanted=f"both files of PEFT's format: {PEFT_CONFIG} contains alpha",
                fix=f"put {PEFT_CONFIG} next to it",
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
    unsupported = [key for key in UNSUPPORTED if config.get(key)]
    if config.get("peft_type", "LORA") != "LORA":
        unsupported.append("peft_type")
    if config.get("init_lora_weights") not in PLAIN_INITIALIZATIONS:
        unsupported.append("init_lora_weights")
    if unsupported:
        raise ArtifactError(
            f"the LoRA {lora.path} is of a kind that is not supported",
            found=f"{unsupported[0]} = {config[unsupported[0]]!r}",
            wanted="a plain LoRA: a product B A added to each weight",
            fix="merge it with PEFT and export the merged checkpoint",
        )


def _parse(name: str, lora: Lora) -> tuple[str, str]:
    """The layer that a tensor belongs to, and the tensor's role in it."""
    if "lora_magnitude_vector" in name or "dora_scale" in name:
        raise ArtifactError(
            f"the LoRA {lora.path} is a DoRA, which is not supported",
            found=name,
            wanted="only lora_A and lora_B",
            fix="train with use_dora=False, or merge it with PEFT and export the merged checkpoint",
        )
    prefix = PREFIXES[lora.peft]
    role = next((end for end in ROLES if name.endswith(end)), None)
    if not name.startswith(prefix) or role is None:
        raise ArtifactError(
            f"the LoRA {lora.path} contains a tensor that does not belong to Sana's transformer",
            found=name,
            wanted=f"names like {prefix}transformer_blocks.0.attn1.to_q.lora_A.weight",
            fix="use a LoRA in the format of diffusers or PEFT that was trained on this transformer",
        )
    return name.removeprefix(prefix).removesuffix(role), ROLES[role]


def _check_layer(
    lora: Lora, layer: str, parts: Mapping[str, str], tensors: Mapping[str, Matrix], shape: tuple[int, ...] | None
) -> None:
    """Raise ArtifactError unless the model has the layer and its matrices fit a weight of `shape`."""
    if shape is None and not layer.endswith(DEPTHWISE):
        raise ArtifactError(
            f"the LoRA {lora.path} belongs to another model",
            found=f"{layer}, which this transformer does not have",
            wanted="layers of this checkpoint's transformer",
            fix="use a LoRA that was trained on this checkpoint",
        )
    if missing := [role for role in ("down", "up") if role not in parts]:
        raise ArtifactError(
            f"the LoRA {lora.path} is incomplete",
            found=f"no {'lora_A' if missing == ['down'] else 'lora_B'} of {layer}",
            wanted="lora_A and lora_B of each layer",
            fix="download the LoRA again",
        )
    if shape is None or (len(shape) == 4 and shape[1] == 1 < shape[0]):
        raise ArtifactError(
            f"the LoRA {lora.path} changes a depthwise convolution, which is not supported",
            found=parts["down"],
            wanted="linear layers and convolutions without groups",
            fix=f"train without {layer.rpartition('.')[2]}: a LoRA on it mixes channels, which a depthwise weight cannot",
        )
    rank = tensors[parts["down"]].shape[:1] or (0,)
    for role, wanted in (("down", (*rank, *shape[1:])), ("up", (*shape[:1], *rank, *(1 for _ in shape[2:])))):
        name, part = parts[role], tensors[parts[role]]
        if part.shape != wanted or not rank[0]:
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
            )


def _alpha(layer: str, config: Mapping[str, Any] | None) -> float | None:
    """The layer's alpha: that of the first matching pattern of the config (matched as in PEFT), or else the config's own."""
    if config is None:
        return None
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return float(value)
    return float(config.get("lora_alpha", PEFT_ALPHA))
