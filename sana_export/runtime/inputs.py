"""The values of a request: types and limits, checked before anything is loaded or computed."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sana_export.errors import UsageError
from sana_export.formats.arrays import Float32
from sana_export.numeric import MAX_IMAGES, MAX_SIDE, MAX_STEPS, MOST_SCALE, as_integer, integer, real, shown
from sana_export.runtime.noise import TorchGenerator
from sana_export.runtime.prompt import MAX_TOKENS, GivenEmbeddings
from sana_export.runtime.schedule import SPRINT_MOST_TIMESTEP

#: Delivered pixels of one call, all images together: 3 GB as Pillow images, 13 GB as float32.
MAX_PIXELS = 2**30
#: A prompt is truncated to some hundred tokens, but all of its text is tokenized first.
MAX_CHARACTERS = 100_000
OUTPUT_TYPES = ("pil", "np", "latent")
#: The largest custom timestep. A scheduler has its own limit.
MOST_TIMESTEP = 1e6


@dataclass(frozen=True)
class Limit:
    """What a number of a request may be."""

    check: Callable[[str, Any, Any, Any], Any]
    least: float
    most: float


#: The numbers of a request by name. None is allowed if it is the parameter's default.
LIMITS = {
    "num_inference_steps": Limit(integer, 1, MAX_STEPS),
    "guidance_scale": Limit(real, -MOST_SCALE, MOST_SCALE),
    "pag_scale": Limit(real, 0, MOST_SCALE),
    "pag_adaptive_scale": Limit(real, 0, MOST_SCALE),
    "height": Limit(integer, 1, MAX_SIDE),
    "width": Limit(integer, 1, MAX_SIDE),
    "controlnet_conditioning_scale": Limit(real, -100, 100),
    "num_images_per_prompt": Limit(integer, 1, MAX_IMAGES),
    "max_sequence_length": Limit(integer, 1, MAX_TOKENS),
    "decoder_tile": Limit(integer, 0, MAX_SIDE),
    "max_timesteps": Limit(real, 0, SPRINT_MOST_TIMESTEP),
    "intermediate_timesteps": Limit(real, 0, SPRINT_MOST_TIMESTEP),
}


def checked_numbers(values: Mapping[str, Any], optional: Sequence[str]) -> dict[str, int | float]:
    """The numbers among the parameters `values`, as int or float. Those in `optional` may be None. Raises UsageError."""
    return {
        name: limit.check(name, values[name], limit.least, limit.most)
        for name, limit in LIMITS.items()
        if not (name in optional and values[name] is None)
    }


def checked_interval(name: str, value: Any) -> tuple[float, float]:
    """`value`, a start and a stop as fractions of the steps, as two floats. Raises UsageError."""
    wanted = "two numbers from 0 to 1, the start and the stop, as fractions of the steps: (0.2, 0.8)"
    if not _count(value) == 2:
        raise UsageError(f"{name} is not an interval", found=shown(value), wanted=wanted)
    start, stop = (real(f"the {end} of {name}", number, 0, 1) for end, number in zip(("start", "stop"), value, strict=True))
    if start > stop:
        raise UsageError(
            f"{name} stops before it starts",
            found=f"{start:g} to {stop:g}",
            wanted="a start that is not after the stop",
            fix=f"--{name.replace('_', '-')} {stop:g} {start:g}",
        )
    return start, stop


def check_flag(name: str, value: Any) -> None:
    """Raise UsageError unless `value` is True, False or None."""
    if value is not None and type(value).__name__ not in ("bool", "bool_"):
        raise UsageError(f"{name} is not a flag", found=shown(value), wanted="True or False")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise UsageError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise UsageError(f"unknown {name} {shown(value)}", wanted=", ".join(choices))


def _count(value: Any) -> int | None:
    """The number of items of a list, a tuple or an array of one axis; None for anything else."""
    array = isinstance(value, np.ndarray) and value.ndim == 1
    if not array and (isinstance(value, str | bytes | bytearray) or not isinstance(value, Sequence)):
        return None
    try:
        return len(value)
    except OverflowError:  # range(10**30)
        return None


def texts(name: str, value: Any) -> tuple[str, ...]:
    """`value`, one text or a list of texts, as a tuple. Raises UsageError for anything else, and for text that is not Unicode."""
    count = 1 if isinstance(value, str) else _count(value)
    if count is not None and count > MAX_IMAGES:
        raise UsageError(f"{name} has too many texts", found=count, wanted=f"at most {MAX_IMAGES}")
    found = (value,) if isinstance(value, str) else tuple(value) if count else ()
    if not found or not all(isinstance(text, str) for text in found):
        raise UsageError(f"{name} is not text", found=shown(value), wanted="a str, or a list of one or more str")
    for text in found:
        if len(text) > MAX_CHARACTERS:
            raise UsageError(f"{name} is too long", found=f"{len(text)} characters", wanted=f"at most {MAX_CHARACTERS}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"{name} is not Unicode text", found=shown(text), wanted="text without lone surrogates") from error
    return found


def negative_prompts(value: Any, count: int) -> tuple[str, ...]:
    """The negative prompt of each of `count` prompts."""
    if value is None:
        return ("",) * count
    negatives = texts("negative_prompt", value)
    if isinstance(value, str):
        return negatives * count
    if len(negatives) != count:
        raise UsageError(
            "the number of negative prompts does not match the number of prompts",
            found=f"{len(negatives)} negative prompts for {count} prompts",
            wanted=f"one str for all, or a list of {count}",
        )
    return negatives


def instruction_text(value: Any, default: str) -> str:
    """The text before each prompt, "" for none. `value` is `Request.complex_human_instruction`."""
    if value is None or type(value).__name__ in ("bool", "bool_"):
        return default if value else ""
    name = "complex_human_instruction"
    if isinstance(value, str) or _count(value) is None:
        fix = f"{name}=[{shown(value)}]" if isinstance(value, str) else None
        raise UsageError(f"{name} is not a list of texts", found=shown(value), wanted="True, None, or a list of lines", fix=fix)
    if not _count(value):
        return ""
    text = "\n".join(texts(name, value))
    if not text:
        raise UsageError(f"{name} has no text", found=shown(value), wanted="a line of text, or None for no instruction")
    return text


def checked_seeds(seed: Any, batch: int | None = None) -> tuple[int, ...]:
    """One seed, or `batch` seeds (None: any number up to the most images). None draws one."""
    if seed is None:
        return (secrets.randbelow(2**32),)
    count = _count(seed)
    if batch is None and count is not None and count <= MAX_IMAGES:
        batch = count
    if count not in (None, 1, batch):
        raise UsageError(
            "the number of seeds does not match the number of images",
            found=f"{count} seeds for {batch or MAX_IMAGES} images",
            wanted="1 seed" if batch in (None, 1) else f"1 seed, or {batch}",
        )
    many = [seed] if count is None else list(seed)
    return tuple(_seed(value) for value in many)


def checked_spacing(name: str, value: Any) -> tuple[float, ...] | None:
    """Custom timesteps or sigmas: a list, a tuple, or an array of one axis of numpy or torch. None: None. Raises UsageError."""
    if value is None:
        return None
    array = getattr(value, "ndim", None) == 1 and hasattr(value, "tolist")
    count = len(value) if array else _count(value)
    if count is None or not 1 <= count <= MAX_STEPS + 1:
        found = shown(value) if count is None else f"{count} numbers"
        raise UsageError(f"{name} is not a list of numbers", found=found, wanted=f"1 to {MAX_STEPS} numbers, the largest first")
    return tuple(real(f"an item of {name}", item, 0, MOST_TIMESTEP) for item in (value.tolist() if array else value))


def _seed(value: Any) -> int:
    number = as_integer(value)
    if number is None:
        raise UsageError("seed is not an integer", found=shown(value), wanted="an integer, or one for each image")
    TorchGenerator(number)  # checks the range
    return number


def checked_array(name: str, value: Any, wanted: str) -> Float32:
    """A float32 copy of an array from the caller. Raises UsageError for anything else, and for values that are not finite."""
    try:
        if hasattr(value, "detach"):  # a tensor of torch: of any dtype, on any device, with a gradient or without
            value = value.detach().float().cpu()
        array = np.array(value, dtype=np.float32)
    except Exception as error:  # any: the conversion is the caller's object's own
        raise UsageError(f"{name} are not an array of numbers", found=error, wanted=wanted) from error
    if count := int(np.count_nonzero(~np.isfinite(array))):
        raise UsageError(f"{name} must be finite", found=f"{count} of {array.size} values are NaN or infinite", wanted="numbers")
    return array


def given_embeddings(name: str, embeds: Any, mask: Any, channels: int, *, alone: bool) -> GivenEmbeddings:
    """Embeddings in place of the parameter `name`, with `channels` channels. `alone`: that parameter has no text itself.

    Rows at the end that the mask hides from every prompt are dropped, which changes nothing.
    """
    ours, masks = f"{name}_embeds", f"{name}_attention_mask"
    if embeds is None or mask is None or not alone:
        given = ((name, not alone), (ours, embeds is not None), (masks, mask is not None))
        found = ", ".join(word for word, there in given if there)
        raise UsageError(f"{ours} and {masks} belong together, without {name}", found=found, wanted=f"{ours}, {masks}")
    rows, hidden = checked_array(ours, embeds, "float [prompts, tokens, channels]"), checked_array(masks, mask, "[prompts, tokens]")
    fits = rows.ndim == 3 and 1 <= len(rows) <= MAX_IMAGES and 1 <= rows.shape[1] <= MAX_TOKENS and rows.shape[2] == channels
    if not fits or hidden.shape != rows.shape[:2]:
        raise UsageError(
            f"{ours} and {masks} have wrong shapes",
            found=f"{rows.shape} and {hidden.shape}",
            wanted=f"[prompts, tokens, {channels}] and [prompts, tokens], with at most {MAX_TOKENS} tokens",
        )
    if not np.isin(hidden, (0, 1)).all() or not hidden.any(axis=1).all():
        found = "other values than 0 and 1, or a prompt without tokens"
        raise UsageError(f"{masks} is not a mask", found=found, wanted="0 and 1, and a 1 in each row")
    length = int(np.flatnonzero(hidden.any(axis=0))[-1]) + 1
    return GivenEmbeddings(np.ascontiguousarray(rows[:, :length]), np.ascontiguousarray(hidden[:, :length]))


def checked_latents(latents: Any, shape: tuple[int, ...]) -> Float32:
    """A float32 copy of latents from the caller. Raises UsageError for another shape or values that are not finite."""
    array = checked_array("latents", latents, f"float32 {shape}")
    if array.shape != shape:
        raise UsageError(
            "latents have the wrong shape for this request",
            found=array.shape,
            wanted=f"{shape} (images, channels, and the sampled height and width in latent pixels)",
        )
    return array
