"""Scenes and their captions, drawn from a seed: what is trained on, and the rule for what is held out.

A scene is one glyph, a small one somewhere, two or three copies, or two different glyphs, on a coloured background. Of every
kind of combination a fixed share is never trained on (`held_out`), and neither is the last template of every list.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tools.train_small.concepts import COLOURS, CONCEPTS
from tools.train_small.glyphs import Bitmaps

#: Pixels a side.
SIZE = 128
KINDS = ("one", "placed", "count", "pair")
KIND_SHARES = (0.52, 0.12, 0.14, 0.22)
#: The centre of a small glyph, in pixels.
PLACES = {"left": (34, 64), "right": (94, 64), "top": (64, 34), "bottom": (64, 94)}
#: Centres and side of the glyphs of a count, in pixels.
COUNTS = {2: (((34, 64), (94, 64)), 58), 3: (((64, 34), (34, 92), (94, 92)), 54)}
PAIR = (((33, 64), (95, 64)), 60)
#: One in this many combinations is held out.
HOLD_OUT = 8


@dataclass(frozen=True)
class Scene:
    """What is in a picture. `detail`: the place of a "placed" one or the number of a "count", else "".

    `glyphs`: (concept, centre x, centre y, side), in pixels. `colour` is an index of COLOURS; `gradient`: to its second tone.
    """

    kind: str
    concepts: tuple[int, ...]
    colour: int
    gradient: bool
    detail: str
    glyphs: tuple[tuple[int, int, int, int], ...]


def held_out(kind: str, concepts: tuple[int, ...], detail: str) -> bool:
    """Whether this combination of concepts (or of a concept with a place or number) is kept out of training."""
    if kind == "one":
        return False
    offset = {"": 0, **{place: index for index, place in enumerate(PLACES)}, "2": 4, "3": 5}[detail]
    return (sum(concepts) + offset) % HOLD_OUT == 0


def held_out_colour(concept: int) -> int:
    """The index of the one colour that the concept's captions and backgrounds never have in training."""
    return concept % len(COLOURS)


def draw_scene(rng: np.random.Generator) -> Scene:
    """A random scene of the training set."""
    while True:
        kind = str(rng.choice(KINDS, p=KIND_SHARES))
        concepts = tuple(int(index) for index in rng.choice(len(CONCEPTS), 2 if kind == "pair" else 1, replace=False))
        detail = str(rng.choice(list(PLACES))) if kind == "placed" else str(rng.integers(2, 4)) if kind == "count" else ""
        colour = int(rng.integers(len(COLOURS)))
        if not held_out(kind, concepts, detail) and colour not in map(held_out_colour, concepts):
            return arrange(kind, concepts, colour, detail, rng)


def arrange(kind: str, concepts: tuple[int, ...], colour: int, detail: str, rng: np.random.Generator) -> Scene:
    """The scene with its glyphs placed, a little off their places by `rng`."""
    if kind == "one":
        centres: tuple[tuple[int, int], ...] = ((64, 64),)
        side = int(rng.integers(21, 30)) * 4
    elif kind == "placed":
        centres, side = (PLACES[detail],), int(rng.integers(11, 15)) * 4
    elif kind == "count":
        centres, side = COUNTS[int(detail)]
    else:
        centres, side = PAIR
    jitter = rng.integers(-3, 4, (len(centres), 2))
    glyphs = tuple(
        (concepts[min(index, len(concepts) - 1)], x + int(dx), y + int(dy), side)
        for index, ((x, y), (dx, dy)) in enumerate(zip(centres, jitter, strict=True))
    )
    return Scene(kind, concepts, colour, bool(rng.random() < 0.5), detail, glyphs)


def render(scene: Scene, bitmaps: Bitmaps) -> npt.NDArray[np.uint8]:
    """The picture, uint8 [SIZE, SIZE, 3]."""
    _, _, top, bottom = COLOURS[scene.colour]
    share = np.linspace(0, 1, SIZE, dtype=np.float32)[:, None, None] * scene.gradient
    image = np.broadcast_to((np.float32(top) * (1 - share) + np.float32(bottom) * share) / 255, (SIZE, SIZE, 3)).copy()
    for concept, x, y, side in scene.glyphs:
        bitmap = bitmaps(CONCEPTS[concept].glyph, side)
        left, up = x - side // 2, y - side // 2
        x0, y0, x1, y1 = max(left, 0), max(up, 0), min(left + side, SIZE), min(up + side, SIZE)
        part = bitmap[y0 - up : y1 - up, x0 - left : x1 - left]
        image[y0:y1, x0:x1] = image[y0:y1, x0:x1] * (1 - part[..., 3:]) + part[..., :3]
    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)


def draw_pool(count: int, seed: int, bitmaps: Bitmaps) -> tuple[list[Scene], npt.NDArray[np.uint8]]:
    """`count` scenes of the training set and their pictures, uint8 [count, SIZE, SIZE, 3]."""
    rng = np.random.default_rng(seed)
    scenes = [draw_scene(rng) for _ in range(count)]
    pictures = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
    for picture, scene in zip(pictures, scenes, strict=True):
        picture[...] = render(scene, bitmaps)
    return scenes, pictures
