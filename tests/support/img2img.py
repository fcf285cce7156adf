"""Image-to-image and inpainting in diffusers' own components, and bundles that have the graphs for them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import SanaSprintImg2ImgPipeline, StableDiffusion3Img2ImgPipeline
from diffusers.image_processor import PixArtImageProcessor, VaeImageProcessor
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_1024_BIN
from diffusers.utils import load_image
from diffusers.utils.torch_utils import randn_tensor

from sana_export.manifest import Manifest
from tests.support.bundles import exported, made_once


def with_encoder(bundle: Path, folder: Path) -> Path:
    """A copy of `bundle` in `folder` with the graphs of the group img2img. `tiny-random` and `tiny-sprint` have one autoencoder."""
    graphs = exported("tiny-random", folder / "tiny-img2img", graphs=["img2img"])

    def make(own: Path) -> None:
        shutil.copytree(bundle, own)
        shutil.copytree(graphs / "onnx", own / "onnx", dirs_exist_ok=True)
        text, image = Manifest.load(bundle), Manifest.load(graphs)
        model = replace(
            text.model,
            encoder_tile_halo=image.model.encoder_tile_halo,
            encoder_tile_scale=image.model.encoder_tile_scale,
        )
        replace(text, model=model, graphs={**text.graphs, **image.graphs}).save(own)

    return made_once(folder / f"{bundle.name}-img2img", make)


def generators(seeds: Sequence[int] | int) -> Any:
    if isinstance(seeds, int):
        return torch.Generator("cpu").manual_seed(seeds)
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def mask_latents(mask: Any, height: int, width: int, factor: int) -> torch.Tensor:
    """The mask as diffusers' StableDiffusion3InpaintPipeline prepares it, for latents."""
    processor = VaeImageProcessor(vae_scale_factor=factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    whole = processor.preprocess(mask, height=height, width=width)
    return torch.nn.functional.interpolate(whole, size=(height // factor, width // factor))


@torch.no_grad()
def sana_from_image(
    pipeline: Any,
    prompt: Any,
    image: Any,
    *,
    strength: float,
    height: int,
    width: int,
    seed: Sequence[int] | int,
    num_inference_steps: int,
    guidance_scale: float,
    mask: Any = None,
    use_resolution_binning: bool = False,
) -> np.ndarray:
    """Images uint8 [B, H, W, 3]: the loop of SanaPipeline with the start of diffusers' flow img2img and inpainting pipelines."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    output_height, output_width, factor = height, width, pipeline.vae.spatial_compression_ratio
    processor = PixArtImageProcessor(vae_scale_factor=factor)
    if use_resolution_binning:
        height, width = processor.classify_height_width_bin(height, width, ASPECT_RATIO_1024_BIN)
    pixels = processor.preprocess(image, height=height, width=width)
    embeds, mask_c, negative, mask_n = pipeline.encode_prompt(prompt, complex_human_instruction=CHI)
    guided = guidance_scale > 1
    if guided:
        embeds, mask_c = torch.cat([negative, embeds]), torch.cat([mask_n, mask_c])
    scheduler.set_timesteps(num_inference_steps)
    holder = SimpleNamespace(scheduler=scheduler)
    timesteps, _ = StableDiffusion3Img2ImgPipeline.get_timesteps(holder, num_inference_steps, strength, "cpu")
    add_noise = getattr(scheduler, "scale_noise", None) or (lambda init, t, noise: scheduler.add_noise(init, noise, t))
    init = pipeline.vae.encode(pixels).latent * pipeline.vae.config.scaling_factor
    batch = embeds.shape[0] // (2 if guided else 1)
    init = init.repeat(batch // init.shape[0], 1, 1, 1)
    noise = randn_tensor(init.shape, generator=generators(seed))
    latents = noise if mask is not None and strength == 1.0 else add_noise(init, timesteps[:1].repeat(batch), noise)
    protected = None if mask is None else mask_latents(mask, height, width, factor)
    for index, t in enumerate(timesteps):
        inputs = torch.cat([latents] * 2) if guided else latents
        time = t.expand(inputs.shape[0]) * pipeline.transformer.config.timestep_scale
        found = pipeline.transformer(
            inputs, encoder_hidden_states=embeds, encoder_attention_mask=mask_c, timestep=time, return_dict=False
        )[0].float()
        if guided:
            uncond, cond = found.chunk(2)
            found = uncond + guidance_scale * (cond - uncond)
        latents = scheduler.step(found, t, latents, return_dict=False)[0]
        if protected is not None:
            own = init
            if index < len(timesteps) - 1:
                own = add_noise(init, timesteps[index + 1].repeat(batch), noise)
            latents = (1 - protected) * own + protected * latents
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    if use_resolution_binning:
        decoded = processor.resize_and_crop_tensor(decoded, output_width, output_height)
    return np.stack([np.asarray(one) for one in processor.postprocess(decoded, output_type="pil")])


@torch.no_grad()
def sprint_from_image(pipeline: Any, prompt: Any, image: Any, *, seed: int, mask: Any = None, **options: Any) -> np.ndarray:
    """Images uint8 [B, H, W, 3] of SanaSprintImg2ImgPipeline. With a mask, a callback blends its latents after each step."""
    sprint = SanaSprintImg2ImgPipeline(**pipeline.components)
    sprint.set_progress_bar_config(disable=True)
    if mask is None:
        images = sprint(prompt, image=image, generator=generators(seed), **options).images
        return np.stack([np.asarray(one) for one in images])
    height, width, factor = options["height"], options["width"], pipeline.vae.spatial_compression_ratio
    data = pipeline.scheduler.config.sigma_data
    pixels = sprint.image_processor.preprocess(image, height=height, width=width)
    init = sprint.vae.encode(pixels).latent * sprint.vae.config.scaling_factor * data
    noise = randn_tensor(init.shape, generator=generators(seed)) * data
    protected = mask_latents(mask, height, width, factor)
    last = []

    def blend(pipe: Any, index: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        after = pipe.scheduler.timesteps[pipe.scheduler.step_index]
        own = torch.cos(after) * init + torch.sin(after) * noise
        last[:] = [(1 - protected) * own + protected * tensors["latents"]]
        return {"latents": last[0]}

    sprint(prompt, image=image, generator=generators(seed), callback_on_step_end=blend, output_type="latent", **options)
    decoded = sprint.vae.decode(last[0] / data / sprint.vae.config.scaling_factor, return_dict=False)[0]
    return np.stack([np.asarray(one) for one in sprint.image_processor.postprocess(decoded, output_type="pil")])


def _instruction() -> list[str]:
    import inspect

    return list(inspect.signature(SanaSprintImg2ImgPipeline.__call__).parameters["complex_human_instruction"].default)


CHI = _instruction()
__all__ = ["load_image", "mask_latents", "sana_from_image", "sprint_from_image", "with_encoder"]
