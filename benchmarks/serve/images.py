"""What every valid request has to get: the runtime's own image for its prompt and seed, pixel by pixel."""

from __future__ import annotations

import io
import itertools
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
from PIL import Image

from benchmarks.serve.server import waited_seconds
from sana_export import Request, SanaRuntime
from sana_export.formats.arrays import Array

PROMPTS = (
    "a red apple",
    "a panda",
    "an elephant",
    "a guitar",
    "two bananas",
    "a slice of pizza",
    "🐝",
    "一只猫",
    "a green turtle",
    "a birthday cake",
    "an octopus",
    "a violin",
    "a fox",
    "a rocket",
    "a sunflower",
    "a blue whale",
)


@dataclass(frozen=True)
class Drawn:
    """The images of one request: prompt, and seeds that follow each other."""

    prompt: str
    seed: int
    images: int
    negative_prompt: str = ""


@dataclass(frozen=True)
class Rate:
    """How fast images were drawn."""

    images: int
    #: By the clock of the wall.
    seconds: float
    #: Processor time of the process that draws.
    cpu_seconds: float
    #: How long the thread that draws was ready, but other programs had the processors.
    waited: float = 0.0


class References:
    """The runtime in this process, and its images by prompt, negative prompt and seed."""

    def __init__(self, bundle: Path, size: int, steps: int, *, threads: int = 1, backend: str = "auto") -> None:
        self.size, self.steps = size, steps
        self._runtime = SanaRuntime.from_pretrained(bundle, backend=backend, threads=threads)
        self.drawn = tuple(
            Drawn(prompt, 1000 * number, 2 if number % 4 == 3 else 1, "blurry" if number % 5 == 4 else "")
            for number, prompt in enumerate(PROMPTS)
        )
        wanted = [(item, item.seed + offset) for item in self.drawn for offset in range(item.images)]
        requests = [self._request(item, seed) for item, seed in wanted]
        results = self._runtime.generate_many(requests, batch_size=1)
        #: By the request and the seed: uint8 [height, width, 3].
        self.pixels: dict[tuple[Drawn, int], Array] = {
            key: np.asarray(result.images[0]) for key, result in zip(wanted, results, strict=True)
        }

    def _request(self, item: Drawn, seed: int) -> Request:
        return Request(
            prompt=item.prompt,
            negative_prompt=item.negative_prompt,
            seed=seed,
            height=self.size,
            width=self.size,
            num_inference_steps=self.steps,
        )

    def judge(self, item: Drawn, files: Sequence[bytes], most: int = 0) -> str:
        """ "ok", or what is wrong: "crossed" for another request's image, "differs" for none that was drawn.

        most: the largest difference of a pixel's value that is still the same image.
        """
        if len(files) != item.images:
            return "differs"
        for offset, content in enumerate(files):
            pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
            if not _same(pixels, self.pixels[item, item.seed + offset], most):
                return "crossed" if any(_same(pixels, other, most) for other in self.pixels.values()) else "differs"
        return "ok"

    def bare(self, seconds: float, batch: int, alone: float) -> Rate:
        """Such requests back to back, without a server, for at least `seconds`.

        batch: the most images that are drawn together. alone: the share of the requests whose images are drawn one by one.
        """
        own = os.getpid(), threading.get_native_id()
        images, start, cpu, waited = 0, perf_counter(), process_time(), waited_seconds(*own)
        items, owed = itertools.cycle(self.drawn), 0.0
        while perf_counter() < start + seconds:
            chosen = list(itertools.islice(items, 2 * batch))
            owed += alone * len(chosen)
            single, owed = chosen[: int(owed)], owed % 1
            for part, size in ((single, 1), (chosen[len(single) :], batch)):
                requests = [self._request(item, item.seed + offset) for item in part for offset in range(item.images)]
                images += sum(1 for _ in self._runtime.generate_many(requests, batch_size=size))
        return Rate(images, perf_counter() - start, process_time() - cpu, waited_seconds(*own) - waited)


def _same(pixels: Array, other: Array, most: int) -> bool:
    if pixels.shape != other.shape:
        return False
    return bool(np.array_equal(pixels, other)) if most == 0 else bool(np.abs(pixels.astype(int) - other.astype(int)).max() <= most)
