"""Sampling and decoding with ComfyUI's progress bar, previews and interrupt."""

from __future__ import annotations

from collections.abc import Mapping

import comfy.model_management
import comfy.utils
import numpy as np
from comfy.cli_args import LatentPreviewMethod, args
from PIL import Image

from sana_export.formats.arrays import Array, Float32
from sana_export.runtime import Request, SanaRuntime
from sana_export.runtime.plan import Plan


def draw_latents(runtime: SanaRuntime, request: Request) -> Float32:
    """The latents [B, C, h, w] of a request with output_type="latent".

    Raises the errors of the runtime, and ComfyUI's exception for a run that the user interrupts.
    """
    plan = runtime.plan(request)
    steps = len(plan.schedule.timesteps)
    bar = comfy.utils.ProgressBar(steps)

    def on_step(runtime: SanaRuntime, index: int, timestep: float, tensors: Mapping[str, Array]) -> None:
        # The user chooses previews with ComfyUI's --preview-method. Ours have one kind.
        shown = args.preview_method != LatentPreviewMethod.NoPreviews
        bar.update_absolute(index + 1, steps, ("JPEG", runtime.preview()[0], args.preview_size) if shown else None)

    return np.asarray(runtime.draw(request, plan, callback_on_step_end=on_step, cancelled=_interrupted).images)


def decode_latents(runtime: SanaRuntime, latents: Float32, size: tuple[int, int] | None) -> list[Image.Image]:
    """The images of latents [B, C, h, w].

    size: height and width of the image that was asked for. If latents for it have another shape, because other nodes have changed
    them, or if it is None, the image is as large as its latents.
    """
    plan = _decoding_plan(runtime, latents, size)
    bar = comfy.utils.ProgressBar(len(latents))
    images: list[Image.Image] = []
    for own in latents:
        _interrupted()
        images.extend(runtime.decode(plan, own[np.newaxis]))
        bar.update(1)
    return images


def _decoding_plan(runtime: SanaRuntime, latents: Float32, size: tuple[int, int] | None) -> Plan:
    """A plan to decode one of the latents with."""
    if size is not None:
        asked = runtime.plan(Request(prompt="", seed=0, height=size[0], width=size[1]))
        if asked.latents_shape[1:] == latents.shape[1:]:
            return asked
    height, width = (side * runtime.manifest.model.vae_scale_factor for side in latents.shape[2:])
    return runtime.plan(Request(prompt="", seed=0, height=height, width=width, use_resolution_binning=False))


def _interrupted() -> bool:
    """False. Raises ComfyUI's exception if the user has interrupted the run; it ends the run and leaves the runtime usable."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    return False
