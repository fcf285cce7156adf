"""The nodes, against ComfyUI's interface of `NODE_CLASS_MAPPINGS`, which every version has: load, add a LoRA, sample, decode.

Our errors are shown by ComfyUI as the error of the node that raised them, with the whole message.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import comfy.model_management
import folder_paths
import torch

from sana_export.errors import SanaExportError
from sana_export.formats.arrays import Array
from sana_export.integrations.comfyui.bundle import ChosenLora, SanaBundle
from sana_export.integrations.comfyui.drawing import decode_latents, draw_latents
from sana_export.integrations.comfyui.paths import bundle_folder, register_folder, stamp
from sana_export.integrations.comfyui.tensors import SIZE, image_from, latents_from, mask_from, to_image, to_latent
from sana_export.manifest import FILE_NAME, Manifest
from sana_export.numeric import MAX_SIDE, MAX_STEPS
from sana_export.runtime.backends import BACKENDS
from sana_export.runtime.image_start import STRENGTH
from sana_export.runtime.memory import AUTO, MEMORY_MODES
from sana_export.runtime.request import Request
from sana_export.runtime.scheduler_choice import NAMES

BUNDLE, CATEGORY = "SANA_BUNDLE", "sana_export"
#: The choice of the checkpoint's own scheduler.
OWN = "checkpoint"
#: The most images of one run.
MOST_IMAGES = 64
#: Words of a `Request`, and the widget for each.
_WORDS = {
    "prompt": "positive",
    "negative_prompt": "negative",
    "num_inference_steps": "steps",
    **{name: name for name in ("height", "width", "seed", "guidance_scale", "pag_scale")},
}
#: The inputs of a sampler that are images, and what reads them.
_READERS: dict[str, Callable[[str, torch.Tensor], Array]] = {"image": image_from, "mask": mask_from, "control_image": image_from}
#: An image, and the word of a `Request` and the widget for its factor.
_FACTORS = (("image", "strength", "strength"), ("control_image", "controlnet_conditioning_scale", "control_scale"))

Inputs = dict[str, dict[str, tuple[Any, ...]]]


class SanaBundleLoader:
    """Loads a bundle, and gives it to ComfyUI's memory management."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = (BUNDLE,), ("bundle",)
    DESCRIPTION = "Load a Sana bundle made by `sana-export export`."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "bundle": ("STRING", {"default": "tiny", "tooltip": "The name of a folder in models/sana, or a path."}),
                "backend": ([AUTO, *BACKENDS], {"tooltip": "auto: engines if the bundle has some that run here."}),
                "memory": (list(MEMORY_MODES), {"tooltip": "staged needs less memory and more time. auto: what fits."}),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, bundle: str | None) -> bool | str:
        """ComfyUI asks before a run. `bundle` is None if another node gives it."""
        try:
            return bundle is None or Manifest.load(bundle_folder(bundle)) is not None
        except SanaExportError as error:
            return str(error)

    @classmethod
    def IS_CHANGED(cls, bundle: str | None, **_: Any) -> tuple[int, int]:
        """Changes when the bundle is exported or built again, so that it is loaded again."""
        try:
            return stamp(bundle_folder(bundle) / FILE_NAME) if bundle is not None else (0, 0)
        except SanaExportError:  # the run says so
            return 0, 0

    def load(self, bundle: str, backend: str, memory: str) -> tuple[SanaBundle]:
        return (SanaBundle.load(bundle_folder(bundle), backend, memory),)


class SanaLoraLoader:
    """Adds a LoRA, on top of those that other nodes of this kind have added."""

    CATEGORY, FUNCTION = CATEGORY, "add"
    RETURN_TYPES, RETURN_NAMES = (BUNDLE,), ("bundle",)
    DESCRIPTION = "Draw with a LoRA. Chain several: their effects add up."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "bundle": (BUNDLE,),
                "lora": (folder_paths.get_filename_list("loras"), {"tooltip": "A file in models/loras."}),
                "strength": ("FLOAT", {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, lora: str | None, **_: Any) -> tuple[int, int]:
        """Changes when the file is saved again."""
        path = None if lora is None else folder_paths.get_full_path("loras", lora)
        return (0, 0) if path is None else stamp(path)

    def add(self, bundle: SanaBundle, lora: str, strength: float) -> tuple[SanaBundle]:
        path = folder_paths.get_full_path_or_raise("loras", lora)
        return (bundle.with_lora(ChosenLora(path, strength, stamp(path))) if strength else bundle,)


class SanaSampler:
    """Draws latents."""

    CATEGORY, FUNCTION = CATEGORY, "sample"
    RETURN_TYPES: ClassVar = ("LATENT",)
    DESCRIPTION = "Sample with a Sana bundle. The same seed gives the image of sana-export generate and of diffusers."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        text = {"multiline": True, "dynamicPrompts": True}
        side = {"default": 1024, "min": 32, "max": MAX_SIDE, "step": 32}
        return {
            "required": {
                "bundle": (BUNDLE,),
                "positive": ("STRING", {**text, "tooltip": "What to draw."}),
                "negative": ("STRING", {**text, "tooltip": "What to avoid. Unused without guidance; empty for SANA-Sprint."}),
                "width": ("INT", side),
                "height": ("INT", side),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": MOST_IMAGES}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}),
                "steps": ("INT", {"default": 20, "min": 1, "max": MAX_STEPS, "tooltip": "20; 2 for SANA-Sprint."}),
                "guidance_scale": ("FLOAT", {"default": 4.5, "min": 0.0, "max": 100.0, "step": 0.1, "tooltip": "1: no guidance."}),
                "pag_scale": (
                    "FLOAT",
                    {"default": 0.0, "min": 0.0, "max": 100.0, "step": 0.1, "tooltip": "Above 0 needs a bundle with PAG layers."},
                ),
                "scheduler": ([OWN, *NAMES], {"tooltip": "checkpoint: the one that the checkpoint comes with."}),
                "resolution_binning": (
                    "BOOLEAN",
                    {"default": True, "tooltip": "Sample at the nearest size that the checkpoint was trained on, then resize."},
                ),
            },
            "optional": {
                "image": ("IMAGE", {"tooltip": "Start from this image. Needs a bundle exported with --graphs default,img2img."}),
                "mask": ("MASK", {"tooltip": "Where the image is drawn anew (1) and where it stays (0)."}),
                "control_image": ("IMAGE", {"tooltip": "What the bundle's ControlNet follows."}),
                "strength": (
                    "FLOAT",
                    {"default": STRENGTH, "min": 0.01, "max": 1.0, "step": 0.01, "tooltip": "How much of the image is new."},
                ),
                "control_scale": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.01}),
            },
        }

    def sample(
        self, bundle: SanaBundle, batch_size: int, scheduler: str, resolution_binning: bool, **given: Any
    ) -> tuple[dict[str, Any]]:
        images: dict[str, Any] = {name: read(name, given[name]) for name, read in _READERS.items() if given.get(name) is not None}
        words: dict[str, Any] = {word: given[widget] for word, widget in _WORDS.items()}
        # The widgets of these are always there, and mean nothing without their image.
        words |= {word: given[widget] for image, word, widget in _FACTORS if image in images and widget in given}
        count = max(map(len, images.values()), default=1) if batch_size == 1 else batch_size
        request = Request(
            **words,
            **images,
            num_images_per_prompt=count,
            scheduler=None if scheduler == OWN else scheduler,
            use_resolution_binning=None if resolution_binning else False,  # None: if the checkpoint has a table of sizes
            output_type="latent",
        )
        latents = draw_latents(bundle.open(), request)
        return (to_latent(latents, (given["height"], given["width"]), comfy.model_management.intermediate_device()),)


class SanaDecoder:
    """Latents to images."""

    CATEGORY, FUNCTION = CATEGORY, "decode"
    RETURN_TYPES: ClassVar = ("IMAGE",)
    DESCRIPTION = "Decode the latents of a Sana sampler."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"bundle": (BUNDLE,), "samples": ("LATENT",)}}

    def decode(self, bundle: SanaBundle, samples: dict[str, Any]) -> tuple[torch.Tensor]:
        images = decode_latents(bundle.open(), latents_from(samples), samples.get(SIZE))
        return (to_image(images, comfy.model_management.intermediate_device()),)


register_folder()
NODE_CLASS_MAPPINGS = {
    "SanaExportBundle": SanaBundleLoader,
    "SanaExportLora": SanaLoraLoader,
    "SanaExportSampler": SanaSampler,
    "SanaExportDecode": SanaDecoder,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "SanaExportBundle": "Load Sana bundle",
    "SanaExportLora": "Sana LoRA",
    "SanaExportSampler": "Sana sampler",
    "SanaExportDecode": "Sana decode",
}
