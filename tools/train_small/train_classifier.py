"""Trains the quality meter's classifier: which concept a picture of one glyph shows. Written as an ONNX file."""

from __future__ import annotations

import argparse
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from tools.train_small import training
from tools.train_small.concepts import COLOURS, CONCEPTS
from tools.train_small.glyphs import FONT, Bitmaps, font_bitmaps
from tools.train_small.scenes import SIZE, arrange, render


class Classifier(nn.Module):
    """pictures float32 [B, H, W, 3] of levels 0..255 to logits [B, concepts]; it looks at them at half their size."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 4 * width, 4 * width)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(4, after), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1] * 16, len(CONCEPTS))

    def forward(self, pictures: Tensor) -> Tensor:
        x = avg_pool2d(pictures.permute(0, 3, 1, 2) / 127.5 - 1, 2)
        return self.head(self.features(x).flatten(1))


def draw_batch(rng: np.random.Generator, count: int, bitmaps: Bitmaps) -> tuple[Tensor, Tensor]:
    """Pictures uint8 [count, SIZE, SIZE, 3] of one glyph on any colour, and their concepts [count]."""
    concepts = rng.integers(len(CONCEPTS), size=count)
    scenes = [arrange("one", (int(concept),), int(rng.integers(len(COLOURS))), "", rng) for concept in concepts]
    return torch.from_numpy(np.stack([render(scene, bitmaps) for scene in scenes])), torch.from_numpy(concepts)


def train(options: argparse.Namespace, bitmaps: Bitmaps) -> Classifier:
    """Train or resume; returns the classifier with its averaged weights."""
    torch.manual_seed(options.seed)
    network = Classifier()
    state = training.Training(network, options.folder / "classifier.pt", steps=options.steps, rate=options.rate, seed=options.seed)

    def loss(rng: np.random.Generator, noise: torch.Generator) -> Tensor:
        pictures, concepts = draw_batch(rng, options.batch, bitmaps)
        # Generated pictures are a little off in place, colour and detail.
        moved = torch.roll(pictures.float(), tuple(rng.integers(-6, 7, 2)), (1, 2))
        moved = moved * (1 + 0.1 * torch.randn(len(moved), 1, 1, 3, generator=noise))
        return cross_entropy(network(moved + 12 * torch.randn(moved.shape, generator=noise)), concepts)

    state.run(loss)
    state.use_average()
    return network.eval()


def export(classifier: Classifier, path: Path) -> None:
    """Write the classifier as an ONNX file: pictures float32 [B, SIZE, SIZE, 3] -> logits float32 [B, concepts].

    What the tracer notes of each node, the files of this machine among it, is left out.
    """
    import onnx

    example = (torch.zeros(2, SIZE, SIZE, 3),)
    settings: dict[str, Any] = {"input_names": ["pictures"], "output_names": ["logits"], "dynamo": True, "verbose": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            classifier, example, str(path), dynamic_shapes=({0: torch.export.Dim("batch")},), external_data=False, **settings
        )
    model = onnx.load(path)
    for owner in (model, model.graph, *model.graph.node, *model.graph.value_info):
        del owner.metadata_props[:]
    onnx.save(model, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    training.add_arguments(parser, steps=600, batch=64, rate=3e-3)
    parser.add_argument("--font", type=Path, default=FONT, help="a colour font with the glyphs (default: Noto Color Emoji)")
    parser.add_argument("--output", type=Path, required=True, help="the ONNX file")
    options = parser.parse_args()
    export(train(options, font_bitmaps(options.font)), options.output)
