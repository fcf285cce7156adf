"""A content filter for `sana-export serve`: refuses prompts with words of a list, and images without any detail.

PYTHONPATH=examples/serve sana-export serve bundle --content-filter blocked_words:BlockedWords

An installed package registers one in its pyproject.toml instead:

[project.entry-points."sana_export.content_filters"]
blocked-words = "blocked_words:BlockedWords"
"""

from __future__ import annotations

import os
import re

from PIL import Image

from sana_export.serve.filters import ContentRefused


class BlockedWords:
    """The words are in the environment variable BLOCKED_WORDS, separated by commas. Threads call both methods."""

    def __init__(self) -> None:
        self.words = {word.strip().casefold() for word in os.environ.get("BLOCKED_WORDS", "").split(",") if word.strip()}

    def check_prompt(self, prompt: str, negative_prompt: str) -> None:
        found = self.words & set(re.findall(r"\w+", prompt.casefold()))
        if found:
            raise ContentRefused(f"this server does not draw {', '.join(sorted(found))}")

    def check_image(self, image: Image.Image, prompt: str) -> None:
        """Stands for a classifier: call yours here. It sees previews too."""
        if all(low == high for low, high in image.convert("RGB").getextrema()):
            raise ContentRefused("the image has no content")
