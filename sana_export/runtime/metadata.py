"""How an image was drawn: the document that its file carries, and the request that draws it again.

The words of the request are taken from `Request` itself, so a new parameter is recorded as soon as there is one. No path of the
user's machine is in the document: models and LoRAs are recorded with the last part of their names and their hashes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

import numpy as np

from sana_export import __version__
from sana_export.adapters import Lora
from sana_export.errors import UsageError
from sana_export.files import hash_file
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
#: Words whose value is a text that may have a slash, and words whose texts are always paths.
_TEXTS = (*_PER_PROMPT, "complex_human_instruction")
_FILES = ("image", "mask", "control_image")
#: Words that take the place of a number of steps.
_STEPS = ("timesteps", "sigmas")
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

    def with_loras(self, loras: Sequence[Lora]) -> ImageOrigin:
        """With these LoRAs. Their files are read now, so that the hash is that of what was loaded."""
        return replace(self, loras=tuple(map(lora_document, loras)))


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
        sound = document["format"] == FORMAT and {"name", "sha256"} <= model.keys() and all(isinstance(text, str) for text in texts)
        scales = all(isinstance(lora["scale"], int | float) for lora in loras)
        if not (sound and scales and images is not None and index is not None and 0 <= index < images <= MAX_IMAGES):
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        found = f"format {shown(document.get('format'))}, written by sana-export {shown(document.get('sana_export'))}"
        raise UsageError(f"the parameters in {source} cannot be read", found=found, wanted=f"format {FORMAT}") from error
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
        if item.name in _NOT_RECORDED or value is None or _is_default(value, item.default):
            continue
        if _is_path(item.name, value):
            hashes[item.name] = _sha256_of_file(value)
            continue
        if item.name in _FILES:  # an image, or a list of images and paths
            hashes[item.name] = _sha256(value)
            continue
        try:
            json.dumps(as_json := _as_json(value), allow_nan=False)
            plain[item.name] = as_json
        except (TypeError, ValueError):
            hashes[item.name] = _sha256(value)
    plain.pop("seed", None)
    return _Words(plain, hashes)


def _is_default(value: Any, default: Any) -> bool:
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


def _is_path(name: str, value: Any) -> bool:
    """Whether a value names a file. It is not recorded: it says where the user keeps files."""
    text = isinstance(value, str) and name not in _TEXTS and (name in _FILES or any(mark in value for mark in "/\\"))
    return isinstance(value, os.PathLike) or text


def _sha256_of_file(path: Any) -> str:
    """The hash of a file's content; of its name if there is none."""
    return hash_file(Path(path)) if Path(path).is_file() else hashlib.sha256(last_name(path).encode()).hexdigest()


def _sha256(value: Any) -> str:
    """The hash of an array or an image: of its values as they are in memory, with their shape and type."""
    if isinstance(value, list | tuple):
        return hashlib.sha256(
            "".join(_sha256_of_file(v) if _is_path("image", v) else _sha256(v) for v in value).encode()
        ).hexdigest()
    if hasattr(value, "detach"):
        value = value.detach().float().cpu()
    array = np.asarray(value)
    content = array.tobytes() if array.dtype != object else repr(type(value)).encode()
    return hashlib.sha256(f"{array.dtype.str} {array.shape}\n".encode() + content).hexdigest()
