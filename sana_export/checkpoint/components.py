"""The components of a checkpoint that have weights: their files, and the tensors that these must contain."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from sana_export.checkpoint.foreign_weights import missing_tensors, quantized
from sana_export.checkpoint.weights import Weights
from sana_export.commands import resave_command
from sana_export.errors import ArtifactError
from sana_export.formats.dtypes import SAFETENSORS_WEIGHT_DTYPES
from sana_export.formats.recognize import PICKLES


@dataclass(frozen=True)
class Component:
    """One component."""

    #: The library of its class.
    library: str
    #: The classes that model_index.json may name. The first one reads its config.
    classes: tuple[str, ...]
    #: The stem of the weight files' names.
    stem: str
    #: The prefix of the tensors that an export reads.
    read: str = ""


#: The components that an export can read.
COMPONENTS = {
    "transformer": Component("diffusers", ("SanaTransformer2DModel",), "diffusion_pytorch_model"),
    "vae": Component("diffusers", ("AutoencoderDC",), "diffusion_pytorch_model", "decoder."),
    "text_encoder": Component("transformers", ("Gemma2Model", "Gemma2ForCausalLM", "Gemma2PreTrainedModel"), "model"),
    "controlnet": Component("diffusers", ("SanaControlNetModel",), "diffusion_pytorch_model"),
}
#: Those that every checkpoint has.
REQUIRED = ("transformer", "vae", "text_encoder")


def variant_among(files: Iterable[str], weights_variant: str | None) -> str | None:
    """`weights_variant` if one of the weight `files` is named after it, such as model.fp16.safetensors. None otherwise."""
    parts = (f".{weights_variant}.", f".{weights_variant}-")  # the second one is for shards
    return weights_variant if any(part in file for file in files for part in parts) else None


def select_weights(
    component: str,
    names: Collection[str],
    weights_variant: str | None,
    read_json: Callable[[str], Mapping[str, Any]],
    source: str,
) -> list[str]:
    """The weight files of a component. `names` are the paths of all files of the checkpoint, relative to its folder.

    As in diffusers and transformers, these are the files of `weights_variant`, or those without a variant if it has none: one file,
    or the shards that an index lists. Raises ArtifactError if there are none or a shard is missing.
    """
    stem = COMPONENTS[component].stem
    for suffix in [f".{weights_variant}", ""] if weights_variant else [""]:
        single, index = f"{component}/{stem}{suffix}.safetensors", f"{component}/{stem}.safetensors.index{suffix}.json"
        if single in names:
            return [single]
        if index in names:
            shards = [f"{component}/{name}" for name in sorted(set(_weight_map(read_json(index), index, source).values()))]
            if missing := [name for name in shards if name not in names]:
                raise ArtifactError(
                    f"{component} of {source} is missing {len(missing)} of {len(shards)} shards",
                    found=f"no {missing[0]}",
                    wanted=", ".join(shards),
                    fix="download the checkpoint again",
                )
            return shards
    raise _no_weights(component, names, weights_variant, source)


def _weight_map(index: Mapping[str, Any], name: str, source: str) -> Mapping[str, str]:
    found = index.get("weight_map")
    if not isinstance(found, Mapping) or not all(isinstance(file, str) and "/" not in file for file in found.values()):
        raise ArtifactError(
            f"{name} of {source} is damaged", found=f"weight_map {found!r:.80}", wanted="a file name for each tensor"
        )
    return found


def _no_weights(component: str, names: Collection[str], weights_variant: str | None, source: str) -> ArtifactError:
    own = sorted(PurePosixPath(name).name for name in names if name.startswith(f"{component}/"))
    stem = COMPONENTS[component].stem
    marked = [name.split(".")[-2] for name in own if name.endswith(".safetensors") and name.count(".") > 1]
    variants = sorted({mark.partition("-")[0] for mark in marked})
    pickles = [name for name in own if name.endswith(PICKLES)]
    if variants:
        fix = f"--variant {variants[0]}"
    elif pickles:
        alone = all(name.startswith(f"{component}/") for name in names)  # an autoencoder that is not part of a pipeline
        loads = COMPONENTS[component].classes[0] if alone else "DiffusionPipeline"
        fix = f"{resave_command(source, loads, '-safetensors')}  (then use that folder)"
    else:
        fix = "download the checkpoint again"
    return ArtifactError(
        f"{component} of {source} has no weights" + (" as safetensors" if pickles else ""),
        found=", ".join(own) or f"nothing in {component}",
        wanted=f"{stem}{f'.{weights_variant}' if weights_variant else ''}.safetensors",
        fix=fix,
    )


def check_weights(component: str, shapes: Mapping[str, tuple[int, ...]], weights: Weights, source: str) -> Iterator[ArtifactError]:
    """Compare the headers of `weights` with the `shapes` of the network that the component's config describes.

    Yields an error for missing tensors, one for other shapes and one for unsupported dtypes. Each names the first tensor. In the
    transformer, tensors that the network does not have are an error too: they then belong to another network.
    """
    owner = f"{component} of {source}"
    if (problem := quantized((name for name in weights if name not in shapes), owner)) is not None:
        yield problem
        return
    if missing := [name for name in shapes if name not in weights]:
        yield missing_tensors(list(weights), shapes, missing, owner)
    stored = {name: weights.stored[name] for name in shapes if name in weights}
    if other := [name for name, found in stored.items() if found.shape != shapes[name]]:
        yield ArtifactError(
            f"{other[0]}{_more(other)} in the {owner} does not have the shape that follows from its config",
            found=list(stored[other[0]].shape),
            wanted=list(shapes[other[0]]),
            fix="use weights and a checkpoint of the same architecture (sana-export variants)",
        )
    if other := [name for name, found in stored.items() if found.dtype not in SAFETENSORS_WEIGHT_DTYPES]:
        yield ArtifactError(
            f"{other[0]}{_more(other)} in the {owner} has an unsupported dtype",
            found=stored[other[0]].dtype,
            wanted=", ".join(SAFETENSORS_WEIGHT_DTYPES),
            fix="use weights that are not quantized",
        )
    if component in ("transformer", "controlnet") and not missing and (foreign := [name for name in weights if name not in shapes]):
        yield ArtifactError(
            f"{owner} has {len(foreign)} tensors that its network does not have",
            found=foreign[0],
            wanted="weights of the network that config.json describes",
            fix="use a base checkpoint of the same architecture (sana-export variants)",
        )


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
