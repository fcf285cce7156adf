"""The scales of a LoRA: one number, and numbers for some of its layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from sana_export.errors import UsageError
from sana_export.numeric import MOST_SCALE, real, shown

#: A number for each pattern. The first pattern that fits a layer counts.
LayerScales = tuple[tuple[str, float], ...]
#: Any word in a pattern. As a whole pattern, all layers that no other pattern fits.
OTHERS = "*"

_WORD = re.compile(r"\*|\w+|\d+-\d+")
_ITEM = re.compile(r"(?P<pattern>[\w.*-]+)=(?P<scale>[^,=]*)")
_RANGE = re.compile(r"(\d+)-(\d+)")
_LONGEST = 200


def fits(pattern: str, layer: str) -> bool:
    """Whether the words of `pattern` are consecutive words of the layer's name. Words are separated by dots.

    `*` stands for any word, and `0-9` for the numbers from 0 to 9. So "attn2" fits all cross-attention, and "transformer_blocks.1"
    fits block 1 but not block 10.
    """
    wanted, words = pattern.split("."), layer.split(".")
    starts = range(len(words) - len(wanted) + 1)
    return any(all(map(_same, wanted, words[start : start + len(wanted)])) for start in starts)


def _same(wanted: str, word: str) -> bool:
    if (numbers := _RANGE.fullmatch(wanted)) is not None:
        return word.isdecimal() and int(numbers[1]) <= int(word) <= int(numbers[2])
    return wanted in (OTHERS, word)


def scale_of(layer: str, scale: float, layer_scales: LayerScales) -> float:
    """The scale of a layer: that of the first pattern that fits it, otherwise `scale`."""
    return next((number for pattern, number in layer_scales if fits(pattern, layer)), scale)


def split_scale(scale: Any, lora: object) -> tuple[float, LayerScales]:
    """The scale of all other layers and the scales of some layers, from what a caller gives: a number or a mapping.

    A mapping has numbers by pattern. Layers that no pattern fits have the scale of `*`, otherwise 1. Raises UsageError unless every
    number is within +-`MOST_SCALE` and every pattern is one.
    """
    if not isinstance(scale, Mapping):
        return checked_scale(scale, lora), ()
    scales = {_checked_pattern(pattern, lora): checked_scale(number, lora, pattern) for pattern, number in scale.items()}
    return scales.pop(OTHERS, 1.0), tuple(scales.items())


def checked_scale(scale: Any, lora: object, pattern: str | None = None) -> float:
    """The scale of the LoRA `lora`, or of its layers that fit `pattern`. Raises UsageError unless it is within +-`MOST_SCALE`."""
    what = f"the scale of the LoRA {lora}" if pattern in (None, OTHERS) else f"the scale of {pattern} in the LoRA {lora}"
    return real(what, scale, -MOST_SCALE, MOST_SCALE)


def _checked_pattern(pattern: Any, lora: object) -> str:
    words = pattern.split(".") if isinstance(pattern, str) and len(pattern) <= _LONGEST else [""]
    if not all(_WORD.fullmatch(word) for word in words):
        raise UsageError(
            f"a scale of the LoRA {lora} is for no part of a layer's name",
            found=shown(pattern),
            wanted="words of a layer's name with dots between them, such as attn2, transformer_blocks.0-9 or *",
        )
    return pattern


def parse_scales(text: str, lora: object) -> tuple[float, LayerScales] | None:
    """The scales in the text after the colon of PATH:SCALE. None if it is not a scale but part of the path.

    It is NUMBER, or PATTERN=NUMBER for some layers, or both, separated by commas. Raises UsageError for a number that is none.
    """
    first, *items = text.split(",")
    scale = _number(first)
    if scale is None:
        items = [first, *items]
    found = [_ITEM.fullmatch(item) for item in items]
    if any(item is None for item in found):
        return None
    numbers = {item["pattern"]: _number(item["scale"], item["scale"]) for item in found if item is not None}
    return split_scale({OTHERS: 1.0 if scale is None else scale, **numbers}, lora)


def _number(text: str, otherwise: Any = None) -> Any:
    """The number in `text`, or `otherwise`."""
    try:
        return float(text)
    except ValueError:
        return otherwise


def scales_text(scale: float, layer_scales: LayerScales) -> str:
    """The scales as `parse_scales` reads them."""
    return ",".join([str(scale), *(f"{pattern}={number}" for pattern, number in layer_scales)])


def check_patterns(layer_scales: LayerScales, layers: Iterable[str], lora: object) -> None:
    """Raise UsageError if a pattern fits none of the `layers` that the LoRA changes: it is a mistake then."""
    known = list(layers)
    for pattern, _ in layer_scales:
        if not any(fits(pattern, layer) for layer in known):
            raise UsageError(
                f"a scale of the LoRA {lora} is for layers that it does not change",
                found=pattern,
                wanted=f"words of the names of its layers, such as {' or '.join(known[:2])}",
            )
