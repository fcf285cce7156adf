"""The components of a checkpoint that have weights: their files, and the tensors that these must contain."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from sana_export.checkpoint.weights import Stored, Weights
from sana_export.errors import ArtifactError
from sana_export.formats.dtypes import SAFETENSORS_WEIGHT_DTYPES
from sana_export.formats.safetensors_file import PICKLES


@dataclass(frozen=True)
class Component:
    """One component."""

    #: The classes that model_index.json may name.
    classes: tuple[str, ...]
    #: The stem of the weight files' names.
    stem: str
    #: The prefix of the tensors that an export reads.
    read: str = ""


COMPONENTS = {
    "transformer": Component(("SanaTransformer2DModel",), "diffusion_pytorch_model"),
    "vae": Component(("AutoencoderDC",), "diffusion_pytorch_model", "decoder."),
    "text_encoder": Component(("Gemma2Model", "Gemma2ForCausalLM", "Gemma2PreTrainedModel"), "model"),
}


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
        fix = "load it with diffusers and save it again: pipeline.save_pretrained(folder, safe_serialization=True)"
    else:
        fix = "download the checkpoint again"
    return ArtifactError(
        f"{component} of {source} has no weights" + (" as safetensors" if pickles else ""),
        found=", ".join(own) or f"nothing in {component}",
        wanted=f"{stem}{f'.{weights_variant}' if weights_variant else ''}.safetensors",
        fix=fix,
    )


def check_weights(component: str, config: Mapping[str, Any], weights: Weights, source: str) -> None:
    """Compare the headers of `weights` with the tensors of the network that `config` describes.

    Raises ArtifactError for the first tensor that is missing or has another shape or an unsupported dtype. In the transformer, a
    tensor that the network does not have is an error too: the weights then belong to another network.
    """
    wanted = expected_shapes(component, config)
    if missing := [name for name in wanted if name not in weights]:
        raise ArtifactError(
            f"{component} of {source} is missing {len(missing)} of {len(wanted)} tensors",
            found=f"no {missing[0]}",
            wanted=f"{missing[0]} of shape {list(wanted[missing[0]])}",
            fix="download the checkpoint again, or use weights that match its config",
        )
    for name, shape in wanted.items():
        _check_tensor(name, weights.stored[name], shape, f"{component} of {source}")
    if component == "transformer" and (foreign := [name for name in weights if name not in wanted]):
        raise ArtifactError(
            f"{component} of {source} has {len(foreign)} tensors that its network does not have",
            found=foreign[0],
            wanted="weights of the network that config.json describes",
            fix="use a base checkpoint of the same architecture (sana-export variants)",
        )


def _check_tensor(name: str, found: Stored, shape: tuple[int, ...], owner: str) -> None:
    if found.shape != shape:
        raise ArtifactError(
            f"{name} in the {owner} does not have the shape that follows from its config",
            found=list(found.shape),
            wanted=list(shape),
            fix="use weights and a checkpoint of the same architecture (sana-export variants)",
        )
    if found.dtype not in SAFETENSORS_WEIGHT_DTYPES:
        raise ArtifactError(
            f"{name} in the {owner} has an unsupported dtype",
            found=found.dtype,
            wanted=", ".join(SAFETENSORS_WEIGHT_DTYPES),
            fix="use weights that are not quantized",
        )


def expected_shapes(component: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that an export reads, by name. They come from the component's class, built without its weights."""
    import torch

    with torch.device("meta"):
        model = _MAKERS[component](dict(config))
    read = COMPONENTS[component].read
    # An export reads no counters of a batch norm.
    stored = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    return {name: tuple(tensor.shape) for name, tensor in stored.items() if name.startswith(read)}


def _transformer(config: dict[str, Any]) -> Any:
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel.from_config(config)


def _vae(config: dict[str, Any]) -> Any:
    from diffusers import AutoencoderDC

    return AutoencoderDC.from_config(config)


def _text_encoder(config: dict[str, Any]) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config.from_dict(config))


_MAKERS: dict[str, Callable[[dict[str, Any]], Any]] = {"transformer": _transformer, "vae": _vae, "text_encoder": _text_encoder}
