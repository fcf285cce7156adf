"""Content filters: functions of the user's that may refuse prompts and images. sana_export has none of its own.

A filter is an object with one or both of the methods `check_prompt` and `check_image`, or a function without parameters that makes
one. It raises `ContentRefused` to refuse. Any other error of a filter is an error of the server: nothing is delivered unchecked.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from PIL import Image

from sana_export.errors import UsageError
from sana_export.serve.errors import Refusal

#: Installed packages register filters under this name.
GROUP = "sana_export.content_filters"


class ContentRefused(Exception):
    """A filter refuses a prompt or an image. Its text is shown to the client."""


class ContentFilters:
    """All filters of a server, asked one after the other, from several threads."""

    def __init__(self, filters: Sequence[Any] = ()) -> None:
        self._filters = tuple(filters)

    @classmethod
    def load(cls, names: Sequence[str] = ()) -> ContentFilters:
        """The filters of installed packages, and those named "module:function".

        Raises UsageError for a name that cannot be imported.
        """
        installed = [entry.load() for entry in entry_points(group=GROUP)]
        return cls([_made(found) for found in (*installed, *map(_named, names))])

    def __bool__(self) -> bool:
        return bool(self._filters)

    def check_prompt(self, prompt: str, negative_prompt: str = "") -> None:
        """Raise Refusal if a filter refuses the texts."""
        self._ask("check_prompt", prompt, negative_prompt)

    def check_image(self, image: Image.Image, prompt: str) -> None:
        """Raise Refusal if a filter refuses an image that was drawn, or a preview of it."""
        self._ask("check_image", image, prompt)

    def _ask(self, method: str, *values: Any) -> None:
        for each in self._filters:
            try:
                if (check := getattr(each, method, None)) is not None:
                    check(*values)
            except ContentRefused as error:
                raise Refusal("content_policy_violation", str(error) or "a content filter of this server refused it") from error


def _named(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            "the content filter cannot be imported",
            found=f"{name!r}: {error}",
            wanted="module:name of an object with check_prompt or check_image",
        ) from error


def _made(found: Any) -> Any:
    """The filter itself, from a class or a function that makes one."""
    made = found() if isinstance(found, type) or (callable(found) and not _checks(found)) else found
    if not _checks(made):
        raise UsageError(
            "a content filter checks nothing",
            found=repr(found),
            wanted="an object with a method check_prompt(prompt, negative_prompt) or check_image(image, prompt)",
        )
    return made


def _checks(found: Any) -> bool:
    return any(callable(getattr(found, method, None)) for method in ("check_prompt", "check_image"))
