"""Configs as the classes of diffusers and transformers read them: a key that the file leaves out has the class's default."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from sana_export.checkpoint.components import COMPONENTS, REQUIRED
from sana_export.errors import ArtifactError

#: The parts of a checkpoint that have a config.
CONFIGURED = (*REQUIRED, "scheduler")
#: The largest number that a config may contain. It keeps a damaged config from taking hours, or all of the memory.
LARGEST = 10_000_000
#: The same for single keys.
LARGEST_OF = {
    **dict.fromkeys(("num_layers", "num_hidden_layers", "encoder_layers_per_block", "decoder_layers_per_block"), 1_000),
    "sample_size": 4_096,
    "num_train_timesteps": 1_000_000,
}


@dataclass(frozen=True)
class Part:
    """A part of a checkpoint, described by its config."""

    #: The class that reads the config.
    class_name: str
    #: The content of the config's file.
    given: Mapping[str, Any]
    #: The same with a value for every key of the class.
    config: Mapping[str, Any]
    #: The shapes of the tensors that an export reads, by name. Empty for a scheduler.
    shapes: Mapping[str, tuple[int, ...]]
    #: The shapes of the tensors that it reads only on request: an autoencoder's encoder.
    optional_shapes: Mapping[str, tuple[int, ...]]


def config_name(part: str) -> str:
    """The path of a part's config in a checkpoint."""
    return "scheduler/scheduler_config.json" if part == "scheduler" else f"{part}/config.json"


def read_part(part: str, given: Mapping[str, Any], class_name: str | None = None) -> Part:
    """`given`, the content of a part's config, as its class reads it. `class_name` is the scheduler's class.

    Like diffusers, it takes the class from model_index.json and not from the config. Raises ArtifactError if the class refuses the
    config.
    """
    name = class_name if part == "scheduler" else COMPONENTS[part].classes[0]
    return _read_part(part, str(name), json.dumps(given))


def expected_shapes(component: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that an export reads, by name. They come from the component's class, built without its weights."""
    return dict(read_part(component, config).shapes)


@lru_cache(maxsize=64)
def _read_part(part: str, class_name: str, text: str) -> Part:
    for key, number in _numbers(json.loads(text)):
        if number > (largest := LARGEST_OF.get(key, LARGEST)):
            raise ArtifactError(
                f"{config_name(part)} has a number that is too large", found=f"{key} = {number}", wanted=f"{largest} or less"
            )
    import torch

    library, make = _READERS[part]
    try:
        with torch.device("cpu" if part == "scheduler" else "meta"):
            config, made = make(class_name, json.loads(text))
    except Exception as error:  # whatever a class raises for values that it does not expect
        raise ArtifactError(
            f"{config_name(part)} is refused by {class_name}",
            found=" ".join(f"{type(error).__name__}: {error}".split()),
            wanted=f"a config that {class_name} of {library} {version(library)} accepts",
            fix=f"compare it with the {config_name(part)} of a published Sana checkpoint",
        ) from error
    tensors = made.state_dict() if part in COMPONENTS else {}
    # An export reads no counters of a batch norm.
    every = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor.is_floating_point()}
    shapes = {name: shape for name, shape in every.items() if name.startswith(COMPONENTS[part].read)}
    optional = {name: shape for name, shape in every.items() if name not in shapes}
    return Part(class_name, json.loads(text), json.loads(json.dumps(config)), shapes, optional)


def _numbers(content: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The whole numbers in a config, by key."""
    for key, value in content.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, int):
                yield key, item


def _diffusers(class_name: str, given: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    import diffusers

    made = getattr(diffusers, class_name).from_config(given)
    config = {key: value for key, value in made.config.items() if not key.startswith("_")}
    return {"_class_name": class_name, **config}, made


def _gemma(class_name: str, given: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config.from_dict(given)
    return config.to_dict(), Gemma2Model(config)


#: For each part, the library of its class, and what makes its complete config and an object of its class.
_READERS: dict[str, tuple[str, Callable[[str, dict[str, Any]], tuple[dict[str, Any], Any]]]] = {
    "transformer": ("diffusers", _diffusers),
    "vae": ("diffusers", _diffusers),
    "controlnet": ("diffusers", _diffusers),
    "text_encoder": ("transformers", _gemma),
    "scheduler": ("diffusers", _diffusers),
}
