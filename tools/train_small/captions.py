"""Captions of scenes in English, Chinese, emoji and mixtures.

A language's templates of one kind of scene stand in one list; the last of them is held out: it is never trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tools.train_small.concepts import COLOURS, CONCEPTS, Concept
from tools.train_small.scenes import Scene

LANGUAGES = ("english", "chinese", "emoji")
LANGUAGE_SHARES = (0.4, 0.3, 0.3)
#: How often a caption names the background's colour, and how often it ends in words that change nothing.
COLOUR_SHARE, STYLE_SHARE = 0.6, 0.08

#: {x} a glyph's name with its article, {n} without, {s} its plural, {e} the glyph; {y}, {m}, {f} those of the second one.
TEMPLATES: dict[str, dict[str, tuple[str, ...]]] = {
    "english": {
        "one": (
            "{x}",
            "{n}",
            "a cute {n}",
            "a picture of {x}",
            "a big {n}",
            "an emoji of {x}",
            "{x}, simple drawing",
            "draw {x}",
            "i want {x}",
            "show me {x} please",
            "please draw {x}",
        ),
        "placed": ("a small {n} {place}", "a little {n} {place}", "{x} {place}", "{place} {x}", "a tiny {n} {place}"),
        "count": ("{number} {s}", "{number} cute {s}", "a picture of {number} {s}", "there are {number} {s}"),
        "pair": ("{x} and {y}", "{x} next to {y}", "{n} and {m}", "a cute {n} and {y}", "{x} beside {y}"),
        "eats": ("{x} eating {y}", "a cute {n} eating {y}", "a {n} that eats {m}"),
    },
    "chinese": {
        "one": (
            "{n}",
            "一个{n}",
            "可爱的{n}",
            "一张{n}的图片",
            "画一个{n}",
            "大大的{n}",
            "{n}表情",
            "请画{n}",
            "帮我画一个{n}",
            "我要{n}",
            "请帮我画{n}",
        ),
        "placed": ("{place}有一个小{n}", "{place}的小{n}", "一个小{n}在{place}", "小{n}在{place}", "{place}画着小{n}"),
        "count": ("{number}{n}", "{number}可爱的{n}", "画{number}{n}", "这里有{number}{n}"),
        "pair": ("{n}和{m}", "一个{n}和一个{m}", "{n}在{m}旁边", "可爱的{n}和{m}", "{n}与{m}"),
        "eats": ("{n}吃{m}", "可爱的{n}在吃{m}", "一个{n}正在吃{m}"),
    },
    "emoji": {
        "one": (
            "{e}",
            "a cute {e}",
            "一个{e}",
            "a {e}",
            "可爱的{e}",
            "{n}{e}",
            "{e}!",
            "draw {e}",
            "{e} for me",
            "我要{e}",
            "draw {e} for me",
        ),
        "placed": ("a small {e} {place}", "{place}有一个小{e}", "{e} {place}", "{place}画着{e}"),
        "count": ("{repeated}", "{number} {e}", "{number}{e}", "画{number}{e}"),
        "pair": ("{e}{f}", "{e} and {f}", "{e}和{f}", "{e} next to {f}", "{e} + {f}"),
        "eats": ("a cute {e} eating {f}", "{e}吃{f}", "{e} eats {f}"),
    },
}
COLOUR_PHRASES = {
    "english": ("{} on a {c} background", "{}, {c} background", "{} in front of a {c} wall", "a {c} background with {}"),
    "chinese": ("{}，{c}背景", "{c}背景上的{}", "{c}背景，{}", "{}，背景是{c}的"),
}
STYLES = {"english": (", ink drawing style", ", flat design", ", sticker"), "chinese": ("，水墨画风格", "，贴纸", "，扁平风格")}
PLACES = {
    "english": {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"},
    "chinese": {"left": "左边", "right": "右边", "top": "上面", "bottom": "下面"},
}
NUMBERS = {"english": {"2": "two", "3": "three"}, "chinese": {"2": "两个", "3": "三个"}}
_PLURALS = {"fish": "fish", "cherries": "cherries", "cup of coffee": "cups of coffee", "bowl of noodles": "bowls of noodles"}


@dataclass(frozen=True)
class Choice:
    """How a scene is said: a language, an index into its templates, which names, whether the colour is named, a style."""

    language: str
    template: int
    colour: bool = False
    phrase: int = 0
    names: tuple[int, ...] = (0, 0)
    style: bool = False


def article(concept: Concept, name: str) -> str:
    """The name with a or an, where it takes one."""
    return name if concept.plural else f"{'an' if name[0] in 'aeiou' and not name.startswith('u') else 'a'} {name}"


def plural(concept: Concept, name: str) -> str:
    """The name in the plural."""
    if concept.plural or name in _PLURALS:
        return _PLURALS.get(name, name)
    return name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")


def templates(scene: Scene, language: str) -> tuple[str, ...]:
    """The templates that fit the scene; the last one is held out, and so is that of "eats" within."""
    lists = TEMPLATES[language]
    if scene.kind != "pair":
        return lists[scene.kind]
    first, second = (CONCEPTS[index] for index in scene.concepts)
    return (*(lists["eats"][:-1] if eats(first, second) else ()), *lists["pair"])


def eats(first: Concept, second: Concept) -> bool:
    return first.group == "animal" and second.group == "food"


def caption(scene: Scene, choice: Choice) -> str:
    """The scene in words."""
    return fill(templates(scene, choice.language)[choice.template], scene, choice)


def fill(template: str, scene: Scene, choice: Choice) -> str:
    """The template with the scene's names, and the colour and style that the choice asks for."""
    concepts = [CONCEPTS[index] for index in scene.concepts]
    # What stands around an emoji is Chinese where the template is.
    spoken = choice.language if choice.language != "emoji" else "chinese" if _has_chinese(template) else "english"
    if choice.language == "emoji" and not _has_words(template):
        spoken = "chinese" if choice.phrase % 2 else "english"
    names = [
        (concept.english if spoken == "english" else concept.chinese)[
            index % len(concept.english if spoken == "english" else concept.chinese)
        ]
        for concept, index in zip(concepts, choice.names, strict=False)
    ]
    words = {
        "n": names[0],
        "m": names[-1],
        "x": article(concepts[0], names[0]),
        "y": article(concepts[-1], names[-1]),
        "s": plural(concepts[0], names[0]),
        "e": concepts[0].glyph,
        "f": concepts[-1].glyph,
        "repeated": concepts[0].glyph * int(scene.detail) if scene.kind == "count" else "",
        "number": NUMBERS[spoken].get(scene.detail, ""),
        "place": PLACES[spoken].get(scene.detail, ""),
    }
    text = template.format(**words)
    if choice.colour:
        english, chinese, *_ = COLOURS[scene.colour]
        phrases = COLOUR_PHRASES[spoken]
        text = phrases[choice.phrase % len(phrases)].format(text, c=english if spoken == "english" else chinese)
    return text + (STYLES[spoken][choice.phrase % 3] if choice.style else "")


def draw_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A random caption of the training set."""
    language = str(rng.choice(LANGUAGES, p=LANGUAGE_SHARES))
    return caption(
        scene,
        Choice(
            language,
            template=int(rng.integers(len(templates(scene, language)) - 1)),
            colour=bool(rng.random() < COLOUR_SHARE),
            phrase=int(rng.integers(12)),
            # The first name twice as often as the others.
            names=tuple(int(index) for index in rng.integers(0, 2, 2) * rng.integers(0, 2, 2)),
            style=bool(rng.random() < STYLE_SHARE),
        ),
    )


def _has_chinese(text: str) -> bool:
    return any("\u4e00" <= character <= "\u9fff" for character in text)


def _has_words(template: str) -> bool:
    """Whether a template has words or names of its own beside glyphs."""
    for part in ("{e}", "{f}", "{repeated}"):
        template = template.replace(part, "")
    return any(character.isalpha() for character in template)
