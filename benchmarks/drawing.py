"""What the scripts on use_bundle and on quantized bundles share: prompts, and timed images of diffusers and of the runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import process_time
from typing import Any

import numpy as np
import torch
from PIL import Image

from sana_export import Request, SanaRuntime

#: Parts of prompts.
WORDS = (
    "a panda",
    "a lighthouse",
    "in the snow",
    "under a red tree",
    "ink drawing",
    "oil painting",
    "at night",
    "of glass",
    "very old",
)
#: What is timed.
STAGES = ("text", "steps", "decoder", "whole")


def request_words(size: int, steps: int) -> dict[str, Any]:
    """What a pipeline and a `Request` take for a square image of `size` pixels."""
    return {
        "height": size,
        "width": size,
        "num_inference_steps": steps,
        "guidance_scale": 4.5,
        "use_resolution_binning": False,
    }


def random_prompt(rng: np.random.Generator) -> str:
    """A prompt of four different parts."""
    return ", ".join(rng.choice(WORDS, 4, replace=False))


class Clock:
    """CPU seconds by stage."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = process_time()
        try:
            yield
        finally:
            self.seconds[name] += process_time() - start

    def timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return method(*args, **kwargs)

        return call


def draw_with_diffusers(pipe: Any, prompt: str, seed: int, words: dict[str, Any]) -> tuple[Image.Image, dict[str, float]]:
    """The image of a pipeline, and its seconds: prompts, transformer, decoder, everything."""
    clock, parts = (
        Clock(),
        ((pipe, "encode_prompt", "text"), (pipe.transformer, "forward", "steps"), (pipe.vae, "decode", "decoder")),
    )
    for owner, method, stage in parts:
        owner.__dict__[method] = clock.timed(stage, getattr(owner, method))
    try:
        with clock.stage("whole"):
            image = pipe(prompt, generator=torch.Generator().manual_seed(seed), **words).images[0]
    finally:
        for owner, method, _ in parts:
            del owner.__dict__[method]
    return image, clock.seconds


def draw_with_runtime(runtime: SanaRuntime, prompt: str, seed: int, words: dict[str, Any]) -> tuple[Image.Image, dict[str, float]]:
    """The image of the runtime, and its seconds. The context is in "text", the sampler in "steps", resizing in "decoder"."""
    clock = Clock()
    with clock.stage("whole"):
        plan = runtime.plan(Request(prompt, seed=seed, **words))
        with clock.stage("text"):
            conditioning = runtime.encode(plan)
        with clock.stage("steps"):
            *_, last = runtime.steps(plan, conditioning)
        with clock.stage("decoder"):
            images: Any = runtime.decode(plan, last.latents)
    return images[0], clock.seconds
