"""The quality meter: prompts, and a classifier that knows what their images should show.

It is a folder `quality/` in the checkpoint, which the embedded `tiny` has. It contains `meter.json` (the names of the concepts,
prompts that ask for one concept each, and the concepts of the renders), `renders.png` (real images side by side) and
`classifier.onnx`, which recognizes the concepts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from sana_export.errors import ArtifactError
from sana_export.formats.arrays import Array
from sana_export.manifest import ModelInfo
from sana_export.runtime.request import Request

FOLDER = "quality"
#: Prompts that are sampled in one batch. The seed of a batch is its number.
BATCH = 20


@dataclass(frozen=True, eq=False)
class Meter:
    """The content of a checkpoint's folder `quality`."""

    #: The names of the concepts.
    concepts: tuple[str, ...]
    #: Prompts, each with the index of its concept.
    prompts: tuple[tuple[str, int], ...]
    #: Real images of the concepts, uint8 [N, H, W, 3].
    renders: Array
    #: The index of each render's concept, [N].
    render_concepts: Array
    #: The ONNX file of the classifier.
    classifier: Path

    @classmethod
    def find(cls, checkpoint: Path) -> Meter | None:
        """The meter in the checkpoint's folder, or None if it has none. Raises ArtifactError if it is damaged."""
        folder = checkpoint / FOLDER
        if not folder.is_dir():
            return None
        try:
            stated = json.loads((folder / "meter.json").read_text("utf-8"))
            sheet = np.asarray(Image.open(folder / "renders.png").convert("RGB"))
            side, wanted = stated["render_size"], np.array(stated["render_concepts"])
            rows, columns = sheet.shape[0] // side, sheet.shape[1] // side
            tiles = sheet.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
            prompts = tuple((str(text), int(concept)) for text, concept in stated["prompts"])
            return cls(tuple(stated["concepts"]), prompts, tiles[: len(wanted)], wanted, folder / "classifier.onnx")
        except (OSError, ValueError, KeyError) as error:
            raise ArtifactError(f"{folder} is damaged", found=error, wanted="meter.json and renders.png of this release") from error

    def classify(self, images: Array) -> Array:
        """The most likely concept [N] of uint8 images [N, H, W, 3] of the renders' size."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(self.classifier), options, providers=["CPUExecutionProvider"])
        logits: Array = session.run(None, {"pictures": images.astype(np.float32)})[0]
        return logits.argmax(axis=1)


def quality_requests(model: ModelInfo, samples: Iterable[tuple[str, int]], steps: int | None) -> Iterator[Request]:
    """The requests that sample the prompts of `samples` at the native size, `BATCH` at a time."""
    for index, batch in enumerate(_batches(samples)):
        yield Request(
            prompt=[text for text, _ in batch],
            num_inference_steps=steps or model.default_steps,
            guidance_scale=model.default_guidance_scale,
            height=model.native_size,
            width=model.native_size,
            seed=index,
            use_resolution_binning=False,
        )


def percent(right: Array) -> float:
    """Percent of the elements that are true."""
    return 100.0 * float(right.mean())


def _batches(samples: Iterable[tuple[str, int]]) -> Iterator[list[tuple[str, int]]]:
    remaining = iter(samples)
    while batch := list(islice(remaining, BATCH)):
        yield batch
