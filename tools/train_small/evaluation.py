"""The prompts that a trained model is judged by. No training caption asks for what they ask for.

Each is held out in one of three ways: its concept is never seen on its colour (`held_out_colour`), its combination of concepts or
of a concept with a place or number is never seen (`held_out`), or its template is the last of its list, which is never used.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count, product

import numpy as np

from tools.train_small.captions import LANGUAGES, Choice, caption, eats, templates
from tools.train_small.concepts import CONCEPTS
from tools.train_small.scenes import PLACES, Scene, arrange, held_out, held_out_colour

#: Prompts of one concept each, for the classifier.
METER_PROMPTS = 200
#: How many of the grid's prompts show a scene of each kind.
GRID = {"one": 22, "count": 6, "placed": 4, "pair": 8}


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt and the scene that it asks for. `why`: "colour", "combination" or "template"."""

    text: str
    scene: Scene
    why: str


def meter_prompts() -> list[Prompt]:
    """METER_PROMPTS prompts of one big glyph: every concept in turn, every language, three of four held out by their colour."""
    return [_one(index, index % len(CONCEPTS), index + index // len(CONCEPTS)) for index in range(METER_PROMPTS)]


def grid_prompts() -> list[Prompt]:
    """The 40 prompts of the picture that people judge: all kinds of scenes, the three languages in turn."""
    prompts = [_one(index, index * 25 % len(CONCEPTS), index) for index in range(GRID["one"])]
    for kind in ("count", "placed", "pair"):
        prompts += [_combined(kind, index, len(prompts) + index) for index in range(GRID[kind])]
    return prompts


def _one(index: int, concept: int, turn: int) -> Prompt:
    language = LANGUAGES[turn % len(LANGUAGES)]
    scene = _scene("one", (concept,), "")
    choices = len(templates(scene, language))
    if index % 4 == 3:
        return Prompt(caption(scene, Choice(language, choices - 1)), scene, "template")
    choice = Choice(language, index // 4 % (choices - 1), colour=True, phrase=index % 3)
    return Prompt(caption(scene, choice), scene, "colour")


def _combined(kind: str, index: int, turn: int) -> Prompt:
    """The `index`-th held-out combination of a kind, each with another concept."""
    details = {"count": ("2", "3"), "placed": tuple(PLACES), "pair": ("",)}[kind]
    language, detail = LANGUAGES[turn % len(LANGUAGES)], details[index % len(details)]
    if kind == "pair":
        # Every second pair is an animal that eats.
        pairs = [pair for pair in product(range(len(CONCEPTS)), repeat=2) if pair[0] != pair[1] and held_out("pair", pair, "")]
        pairs = [pair for pair in pairs if eats(CONCEPTS[pair[0]], CONCEPTS[pair[1]]) == bool(index % 2)]
        concepts = pairs[(index * 37 + 5) % len(pairs)]
    else:
        free = (concept for concept in count(index * 11) if held_out(kind, (concept % len(CONCEPTS),), detail))
        concepts = (next(free) % len(CONCEPTS),)
    scene = _scene(kind, concepts, detail)
    return Prompt(caption(scene, Choice(language, index // 3 % 2)), scene, "combination")


def _scene(kind: str, concepts: tuple[int, ...], detail: str) -> Scene:
    """In the middle of its places, on the colour that its first concept is never seen on."""
    return arrange(kind, concepts, held_out_colour(concepts[0]), detail, np.random.default_rng(0))
