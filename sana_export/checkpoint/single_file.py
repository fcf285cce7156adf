"""A transformer in one safetensors file, with the tensor names of diffusers or of the original Sana code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from sana_export.checkpoint.foreign_weights import plain_names, quantized
from sana_export.checkpoint.weights import Stored, Weights, read_headers
from sana_export.errors import ArtifactError
from sana_export.formats.recognize import refuse_pickle

#: A name that only the original code uses.
ORIGINAL = "x_embedder.proj.weight"
#: Original tensors that sampling does not use. diffusers' converter needs the first two.
UNUSED = ("pos_embed", "y_embedder.y_embedding", "logvar_linear.weight", "logvar_linear.bias")
#: Original names of SANA-1.5 and SANA-Sprint that diffusers' `convert_sana_transformer_to_diffusers` does not convert.
#: Source: diffusers' scripts/convert_sana_to_diffusers.py.
FURTHER = (
    (r"blocks\.(\d+)\.attn\.([qk])_norm\.weight", r"transformer_blocks.\1.attn1.norm_\2.weight"),
    (r"blocks\.(\d+)\.cross_attn\.([qk])_norm\.weight", r"transformer_blocks.\1.attn2.norm_\2.weight"),
    (r"cfg_embedder\.mlp\.0\.(weight|bias)", r"time_embed.guidance_embedder.linear_1.\1"),
    (r"cfg_embedder\.mlp\.2\.(weight|bias)", r"time_embed.guidance_embedder.linear_2.\1"),
)
#: A transformer with a guidance embedding has other names for the two layers of the time embedding.
GUIDED = (r"time_embed\.emb\.(timestep_embedder\..*)", r"time_embed.\1")


def open_single_file(path: Path) -> Weights:
    """The transformer's tensors in `path`, by their names in diffusers.

    Raises ArtifactError if the file is damaged or something else, if its weights are quantized, or if it uses the original names
    and is not a whole transformer.
    """
    refuse_pickle(path)
    stored = plain_names(read_headers([path], fix="download the file again"), str(path))
    if (problem := quantized(stored, str(path))) is not None:
        raise problem
    return Weights(_converted(stored, path) if ORIGINAL in stored else stored)


def _converted(stored: Mapping[str, Stored], path: Path) -> dict[str, Stored]:
    """The tensors of the original code by their names in diffusers.

    diffusers' converter renames tensors and splits fused ones by rows. It gets row numbers instead of weights, so its results say
    which rows of which tensor each new tensor consists of, and no weight is read.
    """
    import torch
    from diffusers.loaders.single_file_utils import convert_sana_transformer_to_diffusers

    entries, stride = list(stored.values()), 2**32
    numbered = enumerate(stored.items())
    rows = {name: torch.arange(entry.shape[0]) + number * stride for number, (name, entry) in numbered if any(entry.shape[:1])}
    for name in UNUSED[:2]:
        rows.setdefault(name, torch.arange(1))
    try:
        converted = convert_sana_transformer_to_diffusers(rows)
    except KeyError as error:
        raise ArtifactError(
            f"{path} is missing a tensor of the transformer",
            found=f"no {error.args[0]}",
            wanted="all tensors of a Sana transformer, with the names of the original code",
            fix="download the file again",
        ) from error
    except (IndexError, ValueError) as error:  # no blocks, or fused tensors with too few rows to split
        raise ArtifactError(
            f"{path} does not contain a transformer of Sana",
            found=f"{len(stored)} tensors that diffusers cannot convert: {error}",
            wanted="all tensors of a Sana transformer, with the names of the original code",
            fix="download the file again",
        ) from error
    result = {}
    for name, numbers in converted.items():
        owner, first = divmod(int(numbers[0]), stride)
        result[name] = entries[owner].part(first, first + len(numbers))
    for name in rows.keys() - set(UNUSED):  # the converter removed the names that it converted
        result[_renamed(name, FURTHER)] = stored[name]
    guided = any(name.startswith("time_embed.guidance_embedder.") for name in result)
    return {_renamed(name, (GUIDED,)): entry for name, entry in result.items()} if guided else result


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return name
