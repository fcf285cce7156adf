"""Glyphs as RGBA bitmaps: from Noto Color Emoji, or anything else that gives a square bitmap for a glyph."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

#: The one size of the font's bitmaps, in pixels.
BITMAP_SIZE = 109
#: Debian's package fonts-noto-color-emoji (SIL Open Font License 1.1).
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")

#: (glyph, side in pixels) -> premultiplied float32 [side, side, 4] in 0..1.
Bitmaps = Callable[[str, int], npt.NDArray[np.float32]]


def font_bitmaps(font: Path = FONT) -> Bitmaps:
    """The bitmaps of a colour font, cut to what is drawn and centred in a square."""
    if not font.is_file():
        raise SystemExit(f"the font {font} is missing: apt install fonts-noto-color-emoji, or name another one with --font")
    face = ImageFont.truetype(str(font), BITMAP_SIZE)

    @cache
    def drawn(glyph: str) -> Image.Image:
        canvas = Image.new("RGBA", (2 * BITMAP_SIZE, 2 * BITMAP_SIZE))
        ImageDraw.Draw(canvas).text((BITMAP_SIZE // 2, BITMAP_SIZE // 2), glyph, font=face, embedded_color=True)
        cut = canvas.crop(canvas.getbbox())
        square = Image.new("RGBA", (max(cut.size), max(cut.size)))
        square.paste(cut, ((square.width - cut.width) // 2, (square.height - cut.height) // 2))
        return square

    @cache
    def bitmap(glyph: str, side: int) -> npt.NDArray[np.float32]:
        # Resized premultiplied, so that the colour of transparent pixels does not bleed into the edge.
        scaled = drawn(glyph).convert("RGBa").resize((side, side), Image.Resampling.BICUBIC)
        return np.asarray(scaled, dtype=np.float32) / 255

    return bitmap
