"""The shapes that an engine is built for: minimum, optimum and maximum of every dynamic axis of `contract.DYNAMIC_AXES`.

A TensorRT profile limits each axis separately, so it covers the box around its sizes: the bins of a 1024 px checkpoint reach from
512x2048 to 2048x512, and their engine also accepts 2048x2048. An execution context that reserves memory for the profile's largest
shape reserves it for 2048x2048: the builder reports 4.5 GB of activations for the published decoder with "laptop" and 0.8 GB with
"static" (TensorRT-RTX 1.7, fp16). A context that reserves memory for the actual shapes (`update_device_memory_size_for_shapes`)
needs no memory for the corner that no bin uses.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from sana_export.architectures import LATENT_STRIDE
from sana_export.errors import UsageError
from sana_export.numeric import MAX_IMAGES, MAX_SIDE, integer
from sana_export.records import ModelInfo
from sana_export.resolutions import BINS, Size

#: The largest image, in pixels, that is decoded in one piece by default. Every bin of a checkpoint of up to 2K is smaller.
UNTILED_AREA = 2048 * 2048

#: Minimum, optimum and maximum of an axis. TensorRT tunes for the optimum.
Range = tuple[int, int, int]

#: Most guidance branches of a request: 1 without guidance, 2 with CFG or PAG, 3 with both.
MAX_BRANCHES = 3
#: Most branches with a prompt of their own: the negative prompt and the prompt.
MAX_TEXT_BRANCHES = 2
#: Smallest image side in pixels of the profile "default".
SMALLEST_SIDE = 128
#: Prompt tokens of the typical request.
TYPICAL_TOKENS = 32
#: Default side of a decoder tile in image pixels, without its halo.
DECODER_TILE = 1024
#: How much the image may be scaled up from the size that was sampled.
LARGEST_UPSCALE = 2


def _bins(model: ModelInfo) -> tuple[Size, ...]:
    bins = BINS.get(model.sample_size)
    return tuple(bins.values()) if bins else _native(model)


def _native(model: ModelInfo) -> tuple[Size, ...]:
    return ((model.native_size, model.native_size),)


def _any(model: ModelInfo) -> tuple[Size, ...]:
    """The smallest and the largest square from `SMALLEST_SIDE` to the longest side of any bin."""
    smallest = min(SMALLEST_SIDE, model.native_size)
    largest = max(max(size) for size in _bins(model))
    return ((smallest, smallest), (largest, largest))


#: Rules that choose a profile's sizes from the checkpoint.
COVERAGE: dict[str, Callable[[ModelInfo], tuple[Size, ...]]] = {"bins": _bins, "native": _native, "any": _any}


@dataclass(frozen=True)
class Profile:
    """One set of shapes to build engines for."""

    #: Its name on the command line.
    name: str
    #: Images per request.
    batch: Range
    #: Guidance branches.
    branches: Range
    #: A rule of `COVERAGE`, or (height, width) pairs in pixels of the sampled image.
    sizes: str | tuple[Size, ...]
    #: Its description for the user.
    meaning: str = ""
    #: Side of a decoder tile in image pixels, without its halo.
    decoder_tile: Range = (DECODER_TILE // 4, DECODER_TILE, DECODER_TILE)

    def covered(self, model: ModelInfo) -> tuple[Size, ...]:
        """The image sizes that this profile is for, as (height, width) in pixels."""
        return COVERAGE[self.sizes](model) if isinstance(self.sizes, str) else self.sizes

    def ranges(self, model: ModelInfo, *, instruction_tokens: int, branches: int = MAX_BRANCHES) -> dict[str, Range]:
        """The range of every axis of `contract.DYNAMIC_AXES`.

        `instruction_tokens` is the number of tokens of the stored instruction. `branches` is the most guidance branches that the
        bundle can sample with (2 without PAG layers, 1 with embedded guidance). Raises UsageError if a size does not fit the model.
        """
        for height, width in self.covered(model):
            _check_multiples(height, width, model.vae_scale_factor)
        heights, widths = zip(*self.covered(model), strict=True)
        rows, columns = _axis(heights, model.native_size), _axis(widths, model.native_size)
        factor, text = model.vae_scale_factor, model.max_sequence_length
        features = [_divided(side, model.decoder_tile_scale) for side in (rows, columns)]
        tiles = [_windows(self.decoder_tile, side, model.decoder_tile_scale, model.decoder_tile_halo) for side in features]
        encoded = [_divided(side, model.encoder_tile_scale) for side in (rows, columns)]
        windows = [_windows(self.decoder_tile, side, model.encoder_tile_scale, model.encoder_tile_halo) for side in encoded]
        typical = min(TYPICAL_TOKENS, text)
        return {
            "batch": self.batch,
            "branches": _capped(self.branches, branches),
            "text_branches": _capped(self.branches, min(branches, MAX_TEXT_BRANCHES)),
            # The longest text is a prompt that shares only its first token with the instruction.
            "tokens": (1, typical, instruction_tokens + text),
            "prefix_tokens": (1, instruction_tokens, instruction_tokens),
            "text_tokens": (1, typical, text),
            "latent_height": _divided(rows, factor),
            "latent_width": _divided(columns, factor),
            "feature_height": features[0],
            "feature_width": features[1],
            "tile_height": tiles[0],
            "tile_width": tiles[1],
            "tile_image_height": _multiplied(tiles[0], model.decoder_tile_scale),
            "tile_image_width": _multiplied(tiles[1], model.decoder_tile_scale),
            "image_height": rows,
            "image_width": columns,
            "output_height": (factor, rows[1], LARGEST_UPSCALE * rows[2]),
            "output_width": (factor, columns[1], LARGEST_UPSCALE * columns[2]),
            "encoded_height": encoded[0],
            "encoded_width": encoded[1],
            "window_height": windows[0],
            "window_width": windows[1],
            "window_image_height": _multiplied(windows[0], model.encoder_tile_scale),
            "window_image_width": _multiplied(windows[1], model.encoder_tile_scale),
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


#: Names of profiles for one size in pixels: "static-1024" or "static-HEIGHTxWIDTH".
_STATIC = re.compile(r"static-(\d{1,9})(?:x(\d{1,9}))?")


def profile_named(name: str) -> Profile:
    """The row `name`, or "static" for one size ("static-1024", "static-832x1216"). Raises UsageError for another name."""
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
    """The row "static" for one sampled size in pixels. Only the text and the size of the final image may vary."""
    _check_multiples(height, width, LATENT_STRIDE)
    side = f"{height}" if height == width else f"{height}x{width}"
    meaning = f"one image of {height}x{width} px, two guidance branches"
    return replace(PROFILES["static"], name=f"static-{side}", sizes=((height, width),), meaning=meaning)


def bin_profiles(model: ModelInfo) -> list[Profile]:
    """A profile of one size for every bin of the checkpoint."""
    return [static_profile(height, width) for height, width in dict.fromkeys(_bins(model))]


def custom_profile(model: ModelInfo, *, height: int | None = None, width: int | None = None, batch: int = 1) -> Profile:
    """One image size in pixels, and 1 to `batch` images. The default of each side is the native size."""
    height = model.native_size if height is None else height
    width = model.native_size if width is None else width
    _check_multiples(height, width, model.vae_scale_factor)
    integer("batch", batch, 1, MAX_IMAGES)
    return Profile(f"{height}x{width}-b{batch}", (1, batch, batch), (1, 2, MAX_BRANCHES), ((height, width),))


def outside(ranges: Mapping[str, Range], request: Mapping[str, int]) -> dict[str, Range]:
    """The axes of `request` that are outside their ranges, with these ranges. Axes that are not in `ranges` are ignored."""
    return {
        axis: ranges[axis] for axis, value in request.items() if axis in ranges and not ranges[axis][0] <= value <= ranges[axis][2]
    }


def explain_outside(ranges: Mapping[str, Range], request: Mapping[str, int]) -> str | None:
    """The axes of `request` that are outside `ranges`, as a text that says what is possible. None if there are none."""
    wrong = outside(ranges, request)
    if not wrong:
        return None
    parts = [f"{axis} {request[axis]} (possible: {describe_range(values)})" for axis, values in wrong.items()]
    return "outside what the engine was built for: " + ", ".join(parts)


def describe_range(values: Range) -> str:
    """For example "512 to 2048", or "only 1024" if minimum and maximum are equal."""
    lowest, _, highest = values
    return f"only {lowest}" if lowest == highest else f"{lowest} to {highest}"


def _check_multiples(height: int, width: int, factor: int) -> None:
    if min(height, width) < factor or height % factor or width % factor:
        raise UsageError(
            "the image size does not fit the decoder",
            found=f"{height}x{width} (height x width)",
            wanted=f"height and width that are multiples of {factor}",
            fix=f"--height {_nearest(height, factor)} --width {_nearest(width, factor)}",
        )
    for name, side in (("height", height), ("width", width)):
        integer(name, side, factor, MAX_SIDE)


def _axis(lengths: tuple[int, ...], native: int) -> Range:
    lowest, highest = min(lengths), max(lengths)
    return lowest, min(max(native, lowest), highest), highest


def _windows(tile: Range, features: Range, scale: int, halo: int) -> Range:
    """Sides, in features of `scale` pixels, of the windows for tiles of `tile` image pixels: at most the image's."""
    lowest, typical, highest = (min(side // scale + 2 * halo, most) for side, most in zip(tile, features, strict=True))
    return lowest, typical, highest


def _capped(values: Range, highest: int) -> Range:
    return min(values[0], highest), min(values[1], highest), min(values[2], highest)


def _divided(values: Range, factor: int) -> Range:
    return values[0] // factor, values[1] // factor, values[2] // factor


def _multiplied(values: Range, factor: int) -> Range:
    return values[0] * factor, values[1] * factor, values[2] * factor


def _nearest(length: int, factor: int) -> int:
    return max(factor, round(length / factor) * factor)
