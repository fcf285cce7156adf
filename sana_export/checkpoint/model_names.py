"""What a user may give as MODEL, and the errors for everything else: each says what it is, and which command takes it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sana_export.checkpoint.single_file import open_single_file
from sana_export.checkpoint.weights import Weights
from sana_export.commands import export_command, first_export_command
from sana_export.errors import ArtifactError, SanaExportError, UsageError
from sana_export.formats.recognize import PICKLES, recognize
from sana_export.hub.client import LIST_VARIANTS
from sana_export.hub.names import split_address
from sana_export.lora_names import is_lora
from sana_export.manifest import FILE_NAME, Manifest
from sana_export.variants import INDEX, VARIANTS, Variant, find_variant

WANTED = "an alias, a folder in diffusers' format or a hub id (owner/name)"
#: Other files of weights, by suffix.
FILES = {
    ".gguf": "a GGUF file, the format of llama.cpp",
    **dict.fromkeys(PICKLES, "a pickle, which can run code when it is loaded"),
    ".onnx": "an ONNX graph",
    ".engine": "an engine",
    ".zip": "an archive",
    ".json": "a config without weights",
}


def check_words(model: str, **options: str | None) -> None:
    """Raise UsageError if the model's name, or an option that has a value, is empty."""
    for name, value in {"MODEL": model, **{f"--{name}": value for name, value in options.items()}}.items():
        if value is not None and not value.strip():
            wanted = WANTED if name == "MODEL" else f"a value, or no {name}"
            fix = LIST_VARIANTS if name == "MODEL" else f"omit {name}"
            raise UsageError(f"{name} is empty", found=repr(value), wanted=wanted, fix=fix)


def from_url(model: str, revision: str | None, option: str | None = None) -> tuple[str, str | None]:
    """`split_address` for a checkpoint. `option` is the option whose value it is. None: it is MODEL."""
    whole = [option, "{repo}"] if option else ["sana-export", "export", "{repo}", "-o", "{name}-bundle"]
    return split_address(model, revision, wanted=WANTED, fix="download the checkpoint, and give its folder", whole=whole)


def a_file(path: Path) -> UsageError:
    """The error for a MODEL that is a file. For a transformer's weights or a LoRA it says which command takes it."""
    found, fix = FILES.get(path.suffix.lower()) or _what(path), LIST_VARIANTS
    if path.suffix == ".safetensors":
        found, fix = _safetensors(path)
    elif (row := find_variant(f"Efficient-Large-Model/{path.stem}")) is not None:  # Sana_1600M_1024px.pth
        fix = f"{shlex.join(['sana-export', 'export', row.alias, '-o', f'{row.alias}-bundle'])}  (the same checkpoint)"
    return UsageError(f"{path} is a file, not a checkpoint", found=found, wanted=WANTED, fix=fix)


def _what(path: Path) -> str:
    kind = recognize(path)
    return kind.name if kind else f"a file {path.suffix}".strip()


def _safetensors(path: Path) -> tuple[str, str]:
    """What is in a safetensors file, and the command that takes it."""
    try:
        weights = open_single_file(path)
    except SanaExportError as error:
        kind = recognize(path)
        return kind.name if kind else f"a safetensors file that cannot be read: {error.message}", error.fix or LIST_VARIANTS
    if is_lora(weights):
        return "a LoRA", _with_base("MODEL", "--lora", path)
    if bases := fitting(weights):
        return "the weights of a transformer only", _with_base(bases[0].alias, "--transformer", path)
    return f"a safetensors file of {len(weights)} tensors, which are not those of a published transformer", LIST_VARIANTS


def _with_base(model: str, option: str, path: Path) -> str:
    note = "  (with the checkpoint that it was trained on as MODEL)" if model == "MODEL" else ""
    return shlex.join(["sana-export", "export", model, option, str(path), "-o", f"{path.stem}-bundle"]) + note


def fitting(weights: Weights) -> list[Variant]:
    """The rows of variants.py whose transformers have the shapes of `weights`, as far as shapes tell."""
    embed, table = weights.stored.get("patch_embed.proj.weight"), "time_embed.guidance_embedder.linear_1.weight"
    if embed is None:
        return []
    width, guided = embed.shape[0], table in weights.stored
    layers = len({match[1] for name in weights if (match := re.match(r"transformer_blocks\.(\d+)\.", name))})
    normed = any(name.endswith("attn1.norm_q.weight") for name in weights)
    return [
        row
        for row in VARIANTS.values()
        if (row.architecture.layers, row.architecture.heads * 32) == (layers, width)
        and (row.architecture.guidance_embeds, row.architecture.qk_norm is not None) == (guided, normed)
    ]


def not_a_checkpoint(
    source: str,
    names: Collection[str],
    read_json: Callable[[str], Mapping[str, Any]],
    folder: Path | None = None,
    *,
    wanted: Sequence[str] = (INDEX,),
) -> ArtifactError:
    """The error for a folder or repository with none of the files `wanted`. It says what is there instead.

    `names` are the files at its top, or all of them. `folder` is its place, if it is on this machine.
    """
    if folder is not None and FILE_NAME in names:
        return _a_bundle(source, folder)
    found, fix = f"no {' or '.join(wanted)}", LIST_VARIANTS
    if "config.json" in names:
        config = read_json("config.json")
        kind = config.get("_class_name") or config.get("model_type")
        found += f", and a config.json of {kind}" if kind else ", and a config.json"
        if folder is not None and kind == "SanaTransformer2DModel" and (files := sorted(folder.glob("*.safetensors"))):
            fix = _safetensors(files[0])[1]
    elif pickles := sorted(name for name in names if name.endswith((".pth", ".pt", ".ckpt", ".bin"))):
        found += f", but {pickles[0]}"
    if folder is not None and (whole := _checkpoint_near(folder)) is not None:
        found, fix = f"{found}. {whole} has one", first_export_command(whole)
    return ArtifactError(
        f"{source} is not a diffusers checkpoint",
        found=found,
        wanted=f"one that {'SanaPipeline' if INDEX in wanted else 'AutoencoderDC'}.from_pretrained loads",
        fix=fix,
    )


def _checkpoint_near(folder: Path) -> Path | None:
    """A checkpoint of which `folder` is a part, or that is a part of `folder`, as in the hub's cache."""
    if (folder.resolve().parent / INDEX).is_file():
        return folder.parent if folder.name not in ("", "..") else folder.resolve().parent
    inside = [path.parent for pattern in ("*", "snapshots/*") for path in sorted(folder.glob(f"{pattern}/{INDEX}"))]
    return inside[0] if len(inside) == 1 else None


def _a_bundle(source: str, folder: Path) -> ArtifactError:
    try:
        fix = f"{export_command(folder, Manifest.load(folder))}  (exports it again)"
    except SanaExportError:
        fix = "give the checkpoint that it was exported from"
    return ArtifactError(f"{source} is a bundle, not a checkpoint", found=FILE_NAME, wanted=WANTED, fix=fix)
