"""`generate --from-image`: the request that draws a file's image again."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_export.adapters import Lora
from sana_export.errors import UsageError
from sana_export.image_files import read_metadata
from sana_export.manifest import Manifest
from sana_export.runtime.metadata import Redraw, given_hashes, last_name, lora_document, redraw
from sana_export.runtime.request import Request

log = logging.getLogger(__name__)

#: The options that give what a file does not have. Other values can only be given in Python.
_OPTIONS = {"image": "--image", "mask": "--mask", "control_image": "--control-image"}
#: Words of which one takes the place of the others.
_STEPS = ("num_inference_steps", "timesteps", "sigmas")
#: Words that decide how many images one seed is drawn for. Given anew, the recorded stream no longer applies.
_STREAM = ("seed", "num_images_per_prompt")


@dataclass(frozen=True)
class DrawnAgain:
    """What to draw."""

    #: The words of the request.
    words: Mapping[str, Any]
    #: Which of its images to write. None: all.
    index: int | None
    #: The SHA-256 of the images and arrays that it was drawn with, by word.
    given: Mapping[str, str]


def draw_again(file: Path, given: Mapping[str, Any], bundle: Path, output: Path, loras: Sequence[Lora]) -> DrawnAgain:
    """The words in the image `file`, with those of the command line, `given`, in their place.

    Warns if the image was drawn with another model or other LoRAs. Raises UsageError if the file does not say how it was drawn,
    or if it was drawn with what the command does not have: LoRAs, arrays, images.
    """
    found = redraw(read_metadata(file), file)
    replaced = _STEPS if any(name in given for name in _STEPS) else ()
    words = {**{name: value for name, value in found.words.items() if name not in replaced}, **given}
    if missing := [name for name in found.given if name not in words and not _replaced(name, given)]:
        raise UsageError(
            f"{file} was drawn with more than its words",
            found=", ".join(f"{name} with sha256 {found.given[name][:16]}..." for name in missing),
            wanted="the same values: " + ", ".join(_OPTIONS.get(name, f"runtime({name}=...)") for name in missing),
        )
    _check_loras(file, found, bundle, output, loras)
    _check_model(file, found, bundle)
    prompts = given.get("prompt", "")
    alone = any(name in given for name in _STREAM) or (not isinstance(prompts, str) and len(prompts) > 1)
    if alone and "num_images_per_prompt" not in given:
        words.pop("num_images_per_prompt", None)
    return DrawnAgain(words, None if alone else found.index, found.given)


def warn_about_others(file: Path, recorded: Mapping[str, str], request: Request) -> None:
    """Log a warning for each image of the request that is not the one that `file` was drawn with."""
    for name, digest in given_hashes(request).items():
        if recorded.get(name, digest) != digest:
            option = _OPTIONS.get(name, name)
            log.warning("%s was drawn with another image for %s, so the image will differ", file, option)


def _replaced(name: str, given: Mapping[str, Any]) -> bool:
    """Whether a text on the command line takes the place of the embeddings `name`."""
    text = "negative_prompt" if name.startswith("negative_prompt_") else "prompt" if name.startswith("prompt_") else None
    return text in given


def _check_loras(file: Path, found: Redraw, bundle: Path, output: Path, loras: Sequence[Lora]) -> None:
    if found.loras and not loras:
        words = ["sana-export", "generate", str(bundle), "--from-image", str(file), "-o", str(output)]
        for lora in found.loras:
            layers = "".join(f",{pattern}={scale:g}" for pattern, scale in dict(lora.get("layer_scales", {})).items())
            words += ["--lora", f"{lora['name']}:{lora['scale']:g}{layers}"]
        raise UsageError(
            f"{file} was drawn with LoRAs",
            found="no --lora",
            wanted=", ".join(f"{lora['name']} with sha256 {lora['sha256'][:16]}..." for lora in found.loras),
            fix=f"{shlex.join(words)}  (with the path of each LoRA)",
        )
    if found.loras and [{**lora, "name": ""} for lora in found.loras] != [{**lora_document(lora), "name": ""} for lora in loras]:
        log.warning("%s was drawn with other LoRAs, so the image will differ", file)


def _check_model(file: Path, found: Redraw, bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    here = {"sha256": manifest.checkpoint.sha256, "precision": manifest.options.precision}
    if all(found.model.get(name) == value for name, value in here.items()):
        return
    log.warning(
        "%s was drawn with %s in %s, and %s is %s in %s: the image will differ",
        file,
        found.model["name"],
        found.model.get("precision", "an unknown precision"),
        bundle,
        last_name(manifest.checkpoint.source),
        here["precision"],
    )
