"""Puts trained networks together as a checkpoint in diffusers' layout, with its quality meter."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sana_export.synth.tokenizer import build_gemma_tokenizer
from tools.train_small import train_classifier, training
from tools.train_small.concepts import CONCEPTS
from tools.train_small.evaluation import meter_prompts
from tools.train_small.glyphs import FONT, Bitmaps, font_bitmaps
from tools.train_small.networks import SCHEDULER, TEXT, TRANSFORMER
from tools.train_small.scenes import SIZE, arrange, held_out_colour, render
from tools.train_small.train_transformer import build, load_autoencoder

#: Pictures side by side on the sheet of real renders.
COLUMNS = 12


def pipeline(networks: Any, autoencoder: Any, factor: float) -> Any:
    """diffusers' SanaPipeline of the networks."""
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline

    autoencoder.register_to_config(scaling_factor=factor)
    return SanaPipeline(
        tokenizer=build_gemma_tokenizer(),
        text_encoder=networks["text_encoder"].eval(),
        vae=autoencoder.eval(),
        transformer=networks["transformer"].eval(),
        scheduler=DPMSolverMultistepScheduler(**SCHEDULER),
    )


def write_checkpoint(made: Any, folder: Path) -> None:
    """Write the pipeline with its weights in fp16."""
    made.to(dtype=torch.float16).save_pretrained(folder)


def real_renders(bitmaps: Bitmaps) -> np.ndarray:
    """A picture of every concept on the colour that it is never trained on, uint8 [concepts, SIZE, SIZE, 3]."""
    rng = np.random.default_rng(0)
    return np.stack([render(arrange("one", (index,), held_out_colour(index), "", rng), bitmaps) for index in range(len(CONCEPTS))])


def write_meter(folder: Path, classifier: torch.nn.Module, bitmaps: Bitmaps) -> None:
    """Write what sana_export/verify/quality/meter.py reads."""
    folder.mkdir(parents=True, exist_ok=True)
    train_classifier.export(classifier, folder / "classifier.onnx")
    renders = real_renders(bitmaps)
    sheet(renders, COLUMNS).quantize(256, dither=Image.Dither.NONE).save(folder / "renders.png", optimize=True)
    stated = {
        "concepts": [concept.name for concept in CONCEPTS],
        "prompts": [[prompt.text, prompt.scene.concepts[0]] for prompt in meter_prompts()],
        "render_size": SIZE,
        "render_concepts": list(range(len(renders))),
    }
    (folder / "meter.json").write_text(json.dumps(stated, ensure_ascii=False, indent=1) + "\n")


def sheet(pictures: np.ndarray, columns: int) -> Image.Image:
    """Pictures uint8 [N, H, W, 3] side by side, row by row; what is left of the last row is white."""
    count, height, width, channels = pictures.shape
    rows = -(-count // columns)
    tiles = np.full((rows * columns, height, width, channels), 255, np.uint8)
    tiles[:count] = pictures
    grid = tiles.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return Image.fromarray(grid.reshape(rows * height, columns * width, channels))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the trainings' states are")
    parser.add_argument("--output", type=Path, required=True, help="the checkpoint's folder")
    parser.add_argument("--font", type=Path, default=FONT, help="a colour font with the glyphs (default: Noto Color Emoji)")
    options = parser.parse_args()
    tokenizer_size = len(build_gemma_tokenizer())
    trained = build({**TEXT, "vocab_size": tokenizer_size}, TRANSFORMER)
    training.load_average(trained, options.folder / "transformer.pt")
    small = train_classifier.Classifier()
    training.load_average(small, options.folder / "classifier.pt")
    factor = torch.load(options.folder / "latents.pt", weights_only=True)["factor"]
    write_checkpoint(pipeline(trained, load_autoencoder(options.folder), factor), options.output)
    write_meter(options.output / "quality", small.eval(), font_bitmaps(options.font))
