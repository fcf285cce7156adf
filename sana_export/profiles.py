"""Which shapes an engine serves: min, opt and max of every dynamic axis of `contract.DYNAMIC_AXES`.

A TensorRT profile bounds every axis on its own, so it covers the box around its sizes, not only the sizes: the bins of a
1024 px checkpoint reach from 512x2048 to 2048x512, and their engine also accepts 2048x2048. An execution context that
reserves memory for the profile's largest shape reserves it for that: the builder states 4.5 GB of activations for the
published decoder with "laptop" and 0.8 GB with "static" (TensorRT-RTX 1.7, fp16). One that asks for the memory of the
actual shapes (`update_device_memory_size_for_shapes`) does not pay for the corner that no bin uses.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from sana_export.architectures import LATENT_STRIDE
from sana_export.errors import UsageError
from sana_export.records import ModelInfo
from sana_export.resolutions import BINS, Size

#: Image pixels up to which an image is decoded in one piece where nothing is asked for: every bin of checkpoints up to 2K.
UNTILED_AREA = 2048 * 2048

#: min, opt, max; `opt` is the shape that TensorRT tunes for.
Range = tuple[int, int, int]

#: Guidance branches: none, CFG or PAG, both.
MAX_BRANCHES = 3
#: Smallest image side in pixels of the profile "default".
SMALLEST_SIDE = 128
#: Prompt tokens of the typical request.
TYPICAL_TOKENS = 32
#: Image pixels of a side of a decoder tile where none is asked for, without its halo.
DECODER_TILE = 1024
#: How far the delivered image may be scaled up from the bin that was sampled.
LARGEST_UPSCALE = 2


def _bins(model: ModelInfo) -> tuple[Size, ...]:
    bins = BINS.get(model.sample_size)
    return tuple(bins.values()) if bins else _native(model)


def _native(model: ModelInfo) -> tuple[Size, ...]:
    return ((model.native_size, model.native_size),)


def _any(model: ModelInfo) -> tuple[Size, ...]:
    """The corners of the box from the smallest side to the longest side of any bin."""
    smallest = min(SMALLEST_SIDE, model.native_size)
    largest = max(max(size) for size in _bins(model))
    return ((smallest, smallest), (largest, largest))


#: Rules for the sizes of a profile that depend on the checkpoint.
COVERAGE: dict[str, Callable[[ModelInfo], tuple[Size, ...]]] = {"bins": _bins, "native": _native, "any": _any}


@dataclass(frozen=True)
class Profile:
    """One row: `sizes` is a rule of `COVERAGE` or the (height, width) pairs themselves, in pixels of the sampled image.

    `decoder_tile`: sides of a decoder tile in image pixels, without its halo.
    """

    name: str
    batch: Range
    branches: Range
    sizes: str | tuple[Size, ...]
    meaning: str = ""
    decoder_tile: Range = (DECODER_TILE // 4, DECODER_TILE, DECODER_TILE)

    def covered(self, model: ModelInfo) -> tuple[Size, ...]:
        """The image sizes that this profile is made for, as (height, width) in pixels."""
        return COVERAGE[self.sizes](model) if isinstance(self.sizes, str) else self.sizes

    def ranges(self, model: ModelInfo, *, instruction_tokens: int, branches: int = MAX_BRANCHES) -> dict[str, Range]:
        """min, opt and max of every axis of `contract.DYNAMIC_AXES`.

        `instruction_tokens`: tokens of the stored prefix. `branches`: the most that the bundle's graphs are sampled
        with (2 without PAG layers, 1 with embedded guidance). `tokens` reaches as far as a prompt that shares nothing with
        the prefix but its first token.
        """
        heights, widths = zip(*self.covered(model), strict=True)
        height, width = _axis(heights, model.native_size), _axis(widths, model.native_size)
        factor, text = model.vae_scale_factor, model.max_sequence_length
        features = [_divided(side, model.decoder_tile_scale) for side in (height, width)]
        tiles = [_windows(self.decoder_tile, side, model) for side in features]
        typical = min(TYPICAL_TOKENS, text)
        return {
            "batch": self.batch,
            "branches": _capped(self.branches, branches),
            "tokens": (1, typical, instruction_tokens + text),
            "prefix_tokens": (1, instruction_tokens, instruction_tokens),
            "text_tokens": (1, typical, text),
            "latent_height": _divided(height, factor),
            "latent_width": _divided(width, factor),
            "feature_height": features[0],
            "feature_width": features[1],
            "tile_height": tiles[0],
            "tile_width": tiles[1],
            "tile_image_height": _multiplied(tiles[0], model.decoder_tile_scale),
            "tile_image_width": _multiplied(tiles[1], model.decoder_tile_scale),
            "image_height": height,
            "image_width": width,
            "output_height": (factor, height[1], LARGEST_UPSCALE * height[2]),
            "output_width": (factor, width[1], LARGEST_UPSCALE * width[2]),
        }


PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile("default", (1, 1, 4), (1, 2, 3), "any", "128 px to the longest bin side, 1 to 4 images"),
        Profile("laptop", (1, 1, 1), (1, 2, 3), "bins", "one image at a time, every bin of the checkpoint"),
        Profile("datacenter", (1, 4, 8), (1, 2, 3), "bins", "1 to 8 images at a time, every bin of the checkpoint"),
        Profile(
            "static",
            (1, 1, 1),
            (2, 2, 2),
            "native",
            "one image of the native size, two guidance branches",
            (DECODER_TILE, DECODER_TILE, DECODER_TILE),
        ),
    )
}


#: Profiles of one size beyond the rows: "static-1024" or "static-HEIGHTxWIDTH", in pixels.
_STATIC = re.compile(r"static-(\d+)(?:x(\d+))?")


def profile_named(name: str) -> Profile:
    """The row `name`, or "static" for one size ("static-1024", "static-832x1216"). UsageError lists the rows for any other name."""
    if match := _STATIC.fullmatch(name):
        return static_profile(int(match[1]), int(match[2] or match[1]))
    if name not in PROFILES:
        near = difflib.get_close_matches(name, PROFILES, n=1)
        raise UsageError(
            f"there is no profile named {name!r}",
            wanted="; ".join(f"{profile.name}: {profile.meaning}" for profile in PROFILES.values()),
            fix=f"--profile {near[0] if near else 'default'}",
        )
    return PROFILES[name]


def static_profile(height: int, width: int) -> Profile:
    """The row "static" for one size in pixels: nothing but the text and the delivered size may change."""
    _check_divides(height, width, LATENT_STRIDE)
    side = f"{height}" if height == width else f"{height}x{width}"
    meaning = f"one image of {height}x{width} px, two guidance branches"
    return replace(PROFILES["static"], name=f"static-{side}", sizes=((height, width),), meaning=meaning)


def bin_profiles(model: ModelInfo) -> list[Profile]:
    """A profile of one size for every bin of the checkpoint."""
    return [static_profile(height, width) for height, width in dict.fromkeys(_bins(model))]


def custom_profile(model: ModelInfo, *, height: int | None = None, width: int | None = None, batch: int = 1) -> Profile:
    """Exactly one image size in pixels (the native side where it is not given) and 1 to `batch` images."""
    height = model.native_size if height is None else height
    width = model.native_size if width is None else width
    _check_divides(height, width, model.vae_scale_factor)
    if batch < 1:
        raise UsageError("a batch holds at least one image", found=f"--batch {batch}", wanted="1 or more", fix="--batch 1")
    return Profile(f"{height}x{width}-b{batch}", (1, batch, batch), (1, 2, MAX_BRANCHES), ((height, width),))


def outside(ranges: Mapping[str, Range], request: Mapping[str, int]) -> dict[str, Range]:
    """The axes of `request` that lie outside `ranges`, with what is possible; axes that `ranges` lacks are not looked at."""
    return {
        axis: ranges[axis] for axis, value in request.items() if axis in ranges and not ranges[axis][0] <= value <= ranges[axis][2]
    }


def explain_outside(ranges: Mapping[str, Range], request: Mapping[str, int]) -> str | None:
    """What of `request` (axis to length) the engine cannot do and what it can, or None where all of it fits."""
    wrong = outside(ranges, request)
    if not wrong:
        return None
    parts = [f"{axis} {request[axis]} (possible: {describe_range(values)})" for axis, values in wrong.items()]
    return "outside what the engine was built for: " + ", ".join(parts)


def describe_range(values: Range) -> str:
    """ "512 to 2048", or "only 1024" where there is no choice."""
    lowest, _, highest = values
    return f"only {lowest}" if lowest == highest else f"{lowest} to {highest}"


def _check_divides(height: int, width: int, factor: int) -> None:
    if min(height, width) < factor or height % factor or width % factor:
        raise UsageError(
            "the image size does not fit the decoder",
            found=f"{height}x{width} (height x width)",
            wanted=f"height and width that are multiples of {factor}",
            fix=f"--height {_nearest(height, factor)} --width {_nearest(width, factor)}",
        )


def _axis(lengths: tuple[int, ...], native: int) -> Range:
    lowest, highest = min(lengths), max(lengths)
    return lowest, min(max(native, lowest), highest), highest


def _windows(tile: Range, features: Range, model: ModelInfo) -> Range:
    """Sides in features of the windows that tiles of `tile` image pixels are decoded in, no longer than the image's."""
    lowest, typical, highest = (
        min(side // model.decoder_tile_scale + 2 * model.decoder_tile_halo, most) for side, most in zip(tile, features, strict=True)
    )
    return lowest, typical, highest


def _capped(values: Range, highest: int) -> Range:
    return min(values[0], highest), min(values[1], highest), min(values[2], highest)


def _divided(values: Range, factor: int) -> Range:
    return values[0] // factor, values[1] // factor, values[2] // factor


def _multiplied(values: Range, factor: int) -> Range:
    return values[0] * factor, values[1] * factor, values[2] * factor


def _nearest(length: int, factor: int) -> int:
    return max(factor, round(length / factor) * factor)
