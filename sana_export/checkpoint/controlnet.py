"""A ControlNet for a checkpoint: in diffusers' format or in the original code's, in a folder, in one file or on the hub."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from sana_export.architectures import controlnet_config
from sana_export.checkpoint.foreign_weights import plain_names, quantized
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
from sana_export.checkpoint.pickled import safetensors_of
from sana_export.checkpoint.weights import Stored, Weights, read_headers
from sana_export.controlnets import CONTROLNETS, find_controlnet
from sana_export.errors import ArtifactError, UsageError
from sana_export.formats.recognize import PICKLES
from sana_export.hub.client import Hub, download
from sana_export.hub.names import may_be_hub_id
from sana_export.synth.checkpoint import make_controlnet
from sana_export.user_paths import at_home

log = logging.getLogger(__name__)

#: The keys whose values a ControlNet and its transformer share.
SHARED = (
    "in_channels",
    "num_attention_heads",
    "attention_head_dim",
    "num_cross_attention_heads",
    "cross_attention_head_dim",
    "cross_attention_dim",
    "caption_channels",
)
#: What a name of the original code looks like: weights of the ControlNet's own blocks.
ORIGINAL = "controlnet."
#: Original names, with the name in diffusers of each, or of the parts that a fused tensor's rows are split into.
#: Source: diffusers' scripts/convert_sana_controlnet_to_diffusers.py.
_BLOCK = r"controlnet\.(\d+)\.copied_block\."
_NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"x_embedder\.proj\.(weight|bias)", (r"patch_embed.proj.\1",)),
    (r"y_embedder\.y_proj\.fc([12])\.(weight|bias)", (r"caption_projection.linear_\1.\2",)),
    (r"attention_y_norm\.weight", (r"caption_norm.weight",)),
    (r"t_embedder\.mlp\.0\.(weight|bias)", (r"time_embed.emb.timestep_embedder.linear_1.\1",)),
    (r"t_embedder\.mlp\.2\.(weight|bias)", (r"time_embed.emb.timestep_embedder.linear_2.\1",)),
    (r"t_block\.1\.(weight|bias)", (r"time_embed.linear.\1",)),
    (r"controlnet\.0\.before_proj\.(weight|bias)", (r"input_block.\1",)),
    (r"controlnet\.(\d+)\.after_proj\.(weight|bias)", (r"controlnet_blocks.\1.\2",)),
    (_BLOCK + r"scale_shift_table", (r"transformer_blocks.\1.scale_shift_table",)),
    (_BLOCK + r"attn\.qkv\.weight", tuple(rf"transformer_blocks.\1.attn1.to_{part}.weight" for part in "qkv")),
    (_BLOCK + r"attn\.proj\.(weight|bias)", (r"transformer_blocks.\1.attn1.to_out.0.\2",)),
    (_BLOCK + r"cross_attn\.q_linear\.(weight|bias)", (r"transformer_blocks.\1.attn2.to_q.\2",)),
    (_BLOCK + r"cross_attn\.kv_linear\.(weight|bias)", tuple(rf"transformer_blocks.\1.attn2.to_{part}.\2" for part in "kv")),
    (_BLOCK + r"cross_attn\.proj\.(weight|bias)", (r"transformer_blocks.\1.attn2.to_out.0.\2",)),
    (_BLOCK + r"mlp\.inverted_conv\.conv\.(weight|bias)", (r"transformer_blocks.\1.ff.conv_inverted.\2",)),
    (_BLOCK + r"mlp\.depth_conv\.conv\.(weight|bias)", (r"transformer_blocks.\1.ff.conv_depth.\2",)),
    (_BLOCK + r"mlp\.point_conv\.conv\.weight", (r"transformer_blocks.\1.ff.conv_point.weight",)),
)


@dataclass(frozen=True)
class ControlNetFiles:
    """A ControlNet: a folder in diffusers' format, or one file of weights."""

    #: The alias, hub id, folder or file that the user gave.
    source: str
    #: The folder with config.json and the weights, or the safetensors file.
    path: Path
    #: The variant of the weight files that is preferred: "fp16" means files such as *.fp16.safetensors.
    weights_variant: str | None = None

    def config(self, transformer: Mapping[str, Any]) -> dict[str, Any]:
        """Its config.json. That of a single file follows from its tensors and from the config of the `transformer` it is for."""
        if self.path.is_dir():
            return read_json(self.path / CONFIG)
        names = list(self.weights())
        layers = sum(re.fullmatch(r"controlnet_blocks\.\d+\.weight", name) is not None for name in names)
        if not layers:
            raise ArtifactError(
                f"{self.source} has no ControlNet",
                found=f"{len(names)} other tensors" + (f", the first is {names[0]}" if names else ""),
                wanted="controlnet_blocks.0.weight and the others, or the original code's controlnet.0.after_proj.weight",
                fix="if it is a whole transformer, use --transformer; if it is a LoRA, use --lora",
            )
        return {"_class_name": "SanaControlNetModel", **controlnet_config(transformer, layers)}

    def weights(self) -> Weights:
        """Its tensors by their names in diffusers. Raises ArtifactError if a file is damaged or something else."""
        if self.path.is_dir():
            return Weights(read_headers(self.weight_files))
        stored = plain_names(read_headers([self.path], fix="download the file again"), self.source)
        if (problem := quantized(stored, self.source)) is not None:
            raise problem
        return Weights(_converted(stored, self.source) if any(name.startswith(ORIGINAL) for name in stored) else stored)

    @property
    def weight_files(self) -> list[Path]:
        """Its safetensors files: one, or the shards that its index lists."""
        if not self.path.is_dir():
            return [self.path]
        return weight_files("controlnet", self.path, self.weights_variant, self.source)

    @cached_property
    def sha256(self) -> str:
        """Hash of its config and weights."""
        config = [self.path / CONFIG] if self.path.is_dir() else []
        return hash_files((*config, *self.weight_files))

    @property
    def synthetic(self) -> bool:
        """Whether its weights are random."""
        return is_synthetic(self.path)


def open_controlnet(name: str, weights_variant: str | None, hub: Hub) -> ControlNetFiles:
    """Find the ControlNet `name`: an alias of controlnets.py, a folder, a file, a hub id ("owner/name@revision") or its address.

    A folder or repository is in diffusers' format: a ControlNet itself, or a pipeline with one. A file (.safetensors, or a pickle
    of PyTorch such as .pth, of which only tensors are read) has the names of diffusers or of the original code. Raises UsageError
    for an unknown name, ArtifactError if it is no ControlNet of Sana, and DependencyError if the hub cannot be reached.
    """
    name, revision = from_url(at_home(name, "--controlnet"), None, "--controlnet")
    name = name if revision is None else f"{name}@{revision}"
    published, _, commit = name.partition("@")
    row = find_controlnet(published)
    if row is None and name.strip() and Path(name).is_dir():
        return _in_folder(name, Path(name), weights_variant)
    if row is None and name.strip() and Path(name).is_file():
        return ControlNetFiles(name, _safe(Path(name), name))
    if row is not None and row.repo is None:
        return ControlNetFiles(name, synthetic_folder(row.alias, CONFIG, make_controlnet))
    if row is not None and row.repo is not None:
        return ControlNetFiles(name, _safe(download(row.repo, row.file, commit or None, hub), name))
    if may_be_hub_id(name):
        select = partial(repository_files, component="controlnet", weights_variant=weights_variant, source=name)
        top = fetch(published, commit or None, hub, partial(_check, source=name), select, first=places("controlnet"))
        return _in_folder(name, top, weights_variant)
    raise UsageError(
        f"unknown ControlNet {name!r}",
        found="not an alias, a folder, a file or a hub id (owner/name)",
        wanted="a SanaControlNetModel, or one of " + ", ".join(CONTROLNETS),
        fix="--controlnet controlnet-hed-1600m",
    )


def fit_problems(
    controlnet: ControlNetFiles, config: Mapping[str, Any], transformer: Mapping[str, Any], model: str
) -> Iterator[ArtifactError]:
    """Why `controlnet`, whose complete config is `config`, does not fit the `transformer` of `model`, if it does not."""
    if transformer["guidance_embeds"]:
        yield ArtifactError(
            f"{model} is a SANA-Sprint checkpoint, which no ControlNet fits",
            found=f"--controlnet {controlnet.source}",
            wanted="a checkpoint of SanaPipeline",
            fix="omit --controlnet",
        )
        return
    if other := [key for key in SHARED if config[key] != transformer[key]]:
        rows = [
            row.alias for row in CONTROLNETS.values() if row.config["num_attention_heads"] == transformer["num_attention_heads"]
        ]
        yield ArtifactError(
            f"the ControlNet {controlnet.source} does not fit the transformer of {model}",
            found=", ".join(f"{key} {config[key]}" for key in other),
            wanted=", ".join(f"{key} {transformer[key]}" for key in other),
            fix=f"--controlnet {rows[0]}" if rows else "use a ControlNet that was trained for this checkpoint",
        )


def _safe(path: Path, source: str) -> Path:
    """`path`, or if it is a pickle, a safetensors file with its tensors."""
    return safetensors_of(path, source, _is_read) if path.suffix.lower() in PICKLES else path


def _is_read(name: str) -> bool:
    """Whether a tensor of a pickle is one of the ControlNet's. A file of the original code contains the base transformer too."""
    return not name.startswith(("blocks.", "final_layer.", "pos_embed", "logvar"))


def _in_folder(name: str, top: Path, weights_variant: str | None) -> ControlNetFiles:
    folder = find_folder("controlnet", top)
    if folder is None:
        files = sorted(path.relative_to(top).as_posix() for path in (*top.glob("*"), *top.glob("checkpoints/*")))
        single = next((file for file in files if file.endswith((".safetensors", *PICKLES))), None)
        raise ArtifactError(
            f"{name} has no ControlNet",
            found=", ".join(files[:8]) or "an empty folder",
            wanted=" or ".join(places("controlnet")) + ", and the weights beside it",
            fix=shlex.join(["--controlnet", str(top / single)]) if single else "use the folder of a SanaControlNetModel",
        )
    controlnet = ControlNetFiles(name, folder, weights_variant)
    _check(read_json(controlnet.path / CONFIG), name)
    return controlnet


def _converted(stored: Mapping[str, Stored], source: str) -> dict[str, Stored]:
    """The ControlNet's tensors of the original code by their names in diffusers. Tensors of the base transformer are left out."""
    result = {}
    for name, entry in stored.items():
        found = next(((match, names) for pattern, names in _NAMES if (match := re.fullmatch(pattern, name))), None)
        if found is None:
            continue
        match, names = found
        if not entry.shape or entry.shape[0] % len(names):
            raise ArtifactError(
                f"{name} in {source} has the wrong shape",
                found=list(entry.shape),
                wanted=f"rows that {len(names)} layers can share" if len(names) > 1 else "at least one axis",
                fix="download the file again",
            )
        rows = entry.shape[0] // len(names)
        for number, target in enumerate(names):
            part = entry if len(names) == 1 else entry.part(number * rows, (number + 1) * rows)
            result[match.expand(target)] = part
    return result


def _check(config: Mapping[str, Any], source: str) -> None:
    published = [row.alias for row in CONTROLNETS.values() if row.repo]
    fix = "--controlnet " + " or --controlnet ".join(published)
    check_class("controlnet", config, source, "is not a ControlNet of Sana", fix)
