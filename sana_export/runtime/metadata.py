"""How an image was drawn: the document that its file carries, and the request that draws it again.

The words of the request are taken from `Request` itself, so a new parameter is recorded as soon as there is one. No path of the
user's machine is in the document: models and LoRAs are recorded with the last part of their names and their hashes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import PurePath, PureWindowsPath
from typing import Any

import numpy as np

from sana_export import __version__
from sana_export.adapters import Lora
from sana_export.architectures import SCHEDULER_DEFAULTS
from sana_export.errors import UsageError
from sana_export.manifest import Manifest
from sana_export.numeric import MAX_IMAGES, as_integer, shown
from sana_export.runtime.plan import Plan
from sana_export.runtime.request import Request

#: The version of the document.
FORMAT = 1
#: Words that say how images are delivered, not what is drawn. The document is about one image.
_NOT_RECORDED = ("output_type", "num_images_per_prompt")
#: Words that may have one value for each prompt.
_PER_PROMPT = ("prompt", "negative_prompt")
#: Words whose values are images or arrays. They are recorded by their hashes, and a file that has one of them is not trusted: its
#: value could name any file of the machine that draws it again.
GIVEN = (
    *("image", "mask", "control_image", "latents"),
    *("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"),
)
#: Words that take the place of a number of steps.
_STEPS = ("timesteps", "sigmas")
#: What a scheduler's config may record: other keys have no effect, and one of them has the path that it was loaded from.
_SCHEDULER_KEYS = {"_class_name", *(key for defaults in SCHEDULER_DEFAULTS.values() for key in defaults)}
#: Numbers of a list that is recorded itself and not by its hash.
_MOST_NUMBERS = 1024


@dataclass(frozen=True)
class ImageOrigin:
    """What draws: the model, the backend and the LoRAs."""

    #: {"name", "sha256", "precision"}: the checkpoint with its overlays.
    model: Mapping[str, str]
    #: The name of the backend.
    backend: str
    #: The steps and the guidance scale of a request that does not say.
    default_steps: int
    guidance_scale: float
    #: {"name", "scale", "sha256"} of each LoRA, and "layer_scales" if it has some.
    loras: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def of(cls, manifest: Manifest, backend: str) -> ImageOrigin:
        """The origin of images of a bundle."""
        checkpoint = manifest.checkpoint
        model = {"name": last_name(checkpoint.source), "sha256": checkpoint.sha256, "precision": manifest.options.precision}
        return cls(model, backend, manifest.model.default_steps, manifest.model.default_guidance_scale)

    def with_loras(self, loras: Sequence[Mapping[str, Any]]) -> ImageOrigin:
        """With the LoRAs of these documents (`lora_document`)."""
        return replace(self, loras=tuple(loras))


def lora_document(lora: Lora) -> dict[str, Any]:
    """How a LoRA is recorded: its scales, and its name and hash in place of its path."""
    scales = {name: value for name, value in lora.as_json().items() if name != "path"}
    return {"name": last_name(lora.path), **scales, "sha256": lora.sha256}


def last_name(path: Any) -> str:
    """The last part of a path, of any system, or of a hub id."""
    return PurePath(PureWindowsPath(str(path)).as_posix()).name or "."


def image_metadata(request: Request, plan: Plan, origin: ImageOrigin) -> tuple[dict[str, Any], ...]:
    """The document of each image of a request: plain values, as JSON has them.

    sana_export: our version. format: that of the document. model, backend, loras: as in `ImageOrigin`.
    sampler, steps: the scheduler's class, and the number of steps that ran.
    request: the words that were not left at their defaults, and the size, steps, scale and seed that followed.
    given: the SHA-256 of arrays and images, by word.
    stream: the number of images that one seed was drawn for, and which of them this is.
    """
    images, words = plan.latents_shape[0], _words(request)
    common = {"num_inference_steps": origin.default_steps, **words.plain, "height": plan.output_height, "width": plan.output_width}
    if any(name in common for name in _STEPS):
        del common["num_inference_steps"]
    scale = origin.guidance_scale if request.guidance_scale is None else request.guidance_scale
    prompts = images // plan.images_per_prompt
    found = []
    for image in range(images):
        number = image // plan.images_per_prompt
        own = {
            name: common[name][number]
            for name in _PER_PROMPT
            if isinstance(common.get(name), list) and len(common[name]) == prompts
        }
        seed = plan.seeds[image] if len(plan.seeds) == images else plan.seeds[0]
        drawn = {**common, **own, "guidance_scale": scale, "seed": seed}
        drawn = {item.name: drawn[item.name] for item in fields(Request) if item.name in drawn}
        document: dict[str, Any] = {
            "sana_export": __version__,
            "format": FORMAT,
            "model": dict(origin.model),
            "backend": origin.backend,
            "sampler": str(plan.scheduler.get("_class_name", "")).removesuffix("Scheduler"),
            "steps": len(plan.schedule.timesteps),
            "loras": [dict(lora) for lora in origin.loras],
            "request": drawn,
        }
        if words.hashes:
            document["given"] = words.hashes
        if len(plan.seeds) != images:
            document["stream"] = {"images": images, "index": image}
        found.append(document)
    return tuple(found)


@dataclass(frozen=True)
class Redraw:
    """What draws a recorded image again."""

    #: The words of the request.
    words: Mapping[str, Any]
    #: Which of the images that they give is the recorded one.
    index: int
    #: What the request needs that the document does not have: the SHA-256 by word.
    given: Mapping[str, str]
    #: As `ImageOrigin.model`.
    model: Mapping[str, Any]
    #: As `ImageOrigin.loras`.
    loras: Sequence[Mapping[str, Any]]


def redraw(document: Mapping[str, Any], source: Any) -> Redraw:
    """The request that draws the image of `document` again. `source` is what errors call the file.

    Raises UsageError unless it is a document of this version with words of this version's requests.
    """
    try:
        words, model, loras = dict(document["request"].items()), dict(document["model"]), [dict(lora) for lora in document["loras"]]
        given, stream = dict(document.get("given", {})), dict(document.get("stream", {"images": 1, "index": 0}))
        images, index = as_integer(stream["images"]), as_integer(stream["index"])
        texts = [*model.values(), *given.values(), *(lora[name] for lora in loras for name in ("name", "sha256"))]
        scale_lists = [lora.get("layer_scales", {}).items() for lora in loras]
        sound = document["format"] == FORMAT and {"name", "sha256"} <= model.keys() and all(isinstance(text, str) for text in texts)
        numbers = [*(lora["scale"] for lora in loras), *(value for scales in scale_lists for _, value in scales)]
        scales = all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
        sound = sound and isinstance(words.get("prompt"), str | None)
        if not (sound and scales and images is not None and index is not None and 0 <= index < images <= MAX_IMAGES):
            raise ValueError
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        found = f"format {shown(document.get('format'))}, written by sana-export {shown(document.get('sana_export'))}"
        raise UsageError(f"the parameters in {source} cannot be read", found=found, wanted=f"format {FORMAT}") from error
    if named := [name for name in GIVEN if name in words]:
        raise UsageError(
            f"the parameters in {source} have values that only you may give",
            found=", ".join(named),
            wanted="their hashes, as sana-export writes them",
        )
    known = {item.name for item in fields(Request)} - set(_NOT_RECORDED)
    if unknown := sorted(words.keys() - known):
        raise UsageError(
            f"the parameters in {source} have words that this version does not know",
            found=", ".join(map(shown, unknown)),
            wanted=f"an image of sana-export {__version__}, or the version {shown(document.get('sana_export'))}",
        )
    if images > 1:
        words["num_images_per_prompt"] = images
    return Redraw(words, index, given, model, loras)


@dataclass(frozen=True)
class _Words:
    plain: Mapping[str, Any]
    hashes: Mapping[str, str]


def _words(request: Request) -> _Words:
    """The words of a request that are not at their defaults: as JSON has them, and the hashes of what JSON cannot hold."""
    plain: dict[str, Any] = {}
    hashes: dict[str, str] = {}
    for item in fields(request):
        value = getattr(request, item.name)
        if item.name in _NOT_RECORDED or _is_default(value, item.default):
            continue
        if item.name in GIVEN:
            hashes[item.name] = _sha256(value)
            continue
        if item.name == "scheduler" and isinstance(value, Mapping):
            value = {key: own for key, own in value.items() if key in _SCHEDULER_KEYS}
        try:
            json.dumps(as_json := _as_json(value), allow_nan=False)
            plain[item.name] = as_json
        except (TypeError, ValueError):
            hashes[item.name] = _sha256(value)
    plain.pop("seed", None)
    return _Words(plain, hashes)


def given_hashes(request: Request) -> Mapping[str, str]:
    """The SHA-256 of the images and arrays of a request by word, as `image_metadata` records them."""
    return _words(request).hashes


def _is_default(value: Any, default: Any) -> bool:
    if value is None:
        return default is None
    return default is not MISSING and isinstance(value, str | bool | int | float | tuple) and value == default


def _as_json(value: Any) -> Any:
    """Numbers, texts, and lists and mappings of them. Raises TypeError for anything else, and for long lists."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if type(value).__module__ == "numpy" and getattr(value, "ndim", 2) <= 1:
        value = value.tolist()
        return _as_json(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, Sequence) and len(value) <= _MOST_NUMBERS:
        return [_as_json(item) for item in value]
    raise TypeError(type(value).__name__)


def _sha256(value: Any) -> str:
    """The hash of an array or an image: of its values as they are in memory, with their shape and type."""
    if isinstance(value, list | tuple):
        return hashlib.sha256("".join(map(_sha256, value)).encode()).hexdigest()
    if hasattr(value, "detach"):
        value = value.detach().float().cpu()
    array = np.asarray(value)
    content = array.tobytes() if array.dtype != object else repr(type(value)).encode()
    return hashlib.sha256(f"{array.dtype.str} {array.shape}\n".encode() + content).hexdigest()
