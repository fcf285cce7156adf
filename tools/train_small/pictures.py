"""The pictures of the documentation: the held-out prompts, and eager diffusers next to bundles."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sana_export.runtime.request import Request
from sana_export.verify.evaluator_backend import open_runtime
from sana_export.verify.reference import call_reference
from tools.train_small.evaluation import grid_prompts
from tools.train_small.glyphs import FONT

#: Prompts of the comparison of backends.
COMPARED = (
    "a red apple",
    "熊猫",
    "A cute 🐼 eating 🎋",
    "three 🍓",
    "可爱的狐狸，绿色背景",
    "a rocket on a blue background",
    "🦁",
    "a cat next to a rainbow",
)
#: Pixels of a caption's line and of a picture's side.
LINE, SIDE = 16, 128
TEXT_FONTS = (
    "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/truetype/wqy/wqy-zenhei.ttc",
    "/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf",
)


def labelled(pictures: Sequence[Image.Image], labels: Sequence[str], columns: int) -> Image.Image:
    """Pictures with a line of text above each, row by row."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (SIDE + 8), rows * (SIDE + LINE + 8)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x, y = index % columns * (SIDE + 8) + 4, index // columns * (SIDE + LINE + 8)
        write(sheet, draw, (x, y + 2), label)
        sheet.paste(picture, (x, y + LINE + 2))
    return sheet


def write(sheet: Image.Image, draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int = 11) -> None:
    """Text with emoji from the colour font and the rest from the first text font that is installed; cut at the picture's width."""
    font = next(ImageFont.truetype(path, size) for path in TEXT_FONTS if Path(path).is_file())
    emoji = ImageFont.truetype(str(FONT), 109)
    x, y = place
    for character in text:
        if ord(character) >= 0x2600 and not 0x3000 <= ord(character) <= 0x9FFF and not 0xFF00 <= ord(character) <= 0xFFEF:
            glyph = Image.new("RGBA", (136, 128))
            ImageDraw.Draw(glyph).text((0, 0), character, font=emoji, embedded_color=True)
            small = glyph.resize((size + 3, size + 2), Image.Resampling.LANCZOS)
            sheet.paste(small, (x, y), small)
            x += size + 3
        else:
            draw.text((x, y), character, font=font, fill="black")
            x += round(draw.textlength(character, font=font))
        if x > place[0] + SIDE - size:
            draw.text((x, y), "…", font=font, fill="black")
            break


def draw_with(sample: Any, prompts: Sequence[str], seed: int, **settings: Any) -> list[Image.Image]:
    """Each prompt's picture, of the seed `seed` + its number."""
    requests = [
        Request(prompt, seed=seed + index, height=SIDE, width=SIDE, use_resolution_binning=False, **settings)
        for index, prompt in enumerate(prompts)
    ]
    return [sample(request) for request in requests]


def eager(folder: Path) -> Any:
    """A sampler over diffusers in float32."""
    import torch
    from diffusers import SanaPipeline

    pipeline = SanaPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.text_encoder.set_attn_implementation("eager")
    return lambda request: call_reference(pipeline, request, request.seed)[0]


def ours(bundle: Path) -> Any:
    """A sampler over a bundle; a half-precision one runs with its intermediates stored in half precision."""
    runtime = open_runtime(bundle)
    return lambda request: runtime(**vars(request)).images[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--fp32", type=Path, required=True, help="its bundles")
    parser.add_argument("--fp16", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder of the pictures")
    options = parser.parse_args()
    settings = {"num_inference_steps": 20, "guidance_scale": 4.5}
    held_out = [prompt.text for prompt in grid_prompts()]
    fp32 = ours(options.fp32)
    labelled(draw_with(fp32, held_out, 0, **settings), held_out, 8).save(options.output / "held-out.png", optimize=True)
    rows = {"diffusers": eager(options.checkpoint), "fp32": fp32, "fp16": ours(options.fp16)}
    pictures = [picture for sampler in rows.values() for picture in draw_with(sampler, COMPARED, 40, **settings)]
    names = [f"{name}: {prompt}" if name == "diffusers" else name for name in rows for prompt in COMPARED]
    labelled(pictures, names, len(COMPARED)).save(options.output / "tiny.png", optimize=True)
    flat = [np.asarray(picture) for picture in pictures]
    count = len(COMPARED)
    for number, name in enumerate(list(rows)[1:], 1):
        same = np.mean([np.array_equal(flat[i], flat[number * count + i]) for i in range(count)])
        print(f"{name}: {same:.0%} of the pictures are those of diffusers to the bit")
