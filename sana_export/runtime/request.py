"""The parameters of one call, and their checks that do not depend on the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy.typing as npt

from sana_export.errors import UsageError
from sana_export.resolutions import BINS
from sana_export.runtime.control import CONDITIONING_SCALE
from sana_export.runtime.guidance import WHOLE, Interval
from sana_export.runtime.image_start import checked_strength
from sana_export.runtime.images import given_images
from sana_export.runtime.inputs import (
    OUTPUT_TYPES,
    check_choice,
    check_flag,
    checked_interval,
    checked_numbers,
    checked_seeds,
    checked_spacing,
    instruction_text,
    texts,
)
from sana_export.runtime.schedule import (
    SPRINT_INTERMEDIATE_TIMESTEP,
    SPRINT_MAX_TIMESTEP,
)
from sana_export.runtime.scheduler_choice import Choice, check_scheduler


@dataclass(frozen=True, eq=False)
class Request:
    """The parameters of one call. None means the default of the bundle's checkpoint.

    Names, defaults and meanings are those of diffusers' SanaPipeline and SanaPAGPipeline, or of SanaSprintPipeline for a
    SANA-Sprint checkpoint.
    """

    #: One text, or a list of texts. None with `prompt_embeds`.
    prompt: str | Sequence[str] | None = None
    #: One text for all prompts, or one for each. Unused without guidance. A SANA-Sprint checkpoint accepts none.
    negative_prompt: str | Sequence[str] | None = ""
    #: The image to start from: a file name, a Pillow image or a numpy array, or a list of them, one for each prompt or drawn image.
    #: docs/image-to-image.md says how it is read. The bundle needs the graphs of the group "img2img".
    image: Any = None
    #: How much of the image is drawn anew: a number above 0, up to 1. None: 0.6. Only with `image`.
    strength: float | None = None
    #: Where the image is drawn anew (white) and where it stays (black): one mask, or a list as for `image`.
    mask: Any = None
    #: The image that a ControlNet follows, in the same forms as `image`: one, or a list, one for each prompt or drawn image. The
    #: bundle needs the graphs of the group "control".
    control_image: Any = None
    #: The factor on what the ControlNet adds.
    controlnet_conditioning_scale: float = CONDITIONING_SCALE
    #: Number of sampling steps. With an image, the share `strength` of them runs.
    num_inference_steps: int | None = None
    #: Above 1: classifier-free guidance. A SANA-Sprint checkpoint reads any value itself.
    guidance_scale: float | None = None
    #: Above 0: perturbed attention guidance (PAG) in the layers that the bundle was exported with. A SANA-Sprint checkpoint accepts
    #: only 0.
    pag_scale: float = 0.0
    #: Lowers `pag_scale` at later steps.
    pag_adaptive_scale: float = 0.0
    #: (start, stop): fractions of the steps that run. Step i of N has guidance if start <= i / N < stop. The others run without the
    #: negative prompt, which is faster.
    guidance_interval: Interval = WHOLE
    #: The same for PAG.
    pag_interval: Interval = WHOLE
    #: Height of the delivered images in pixels.
    height: int | None = None
    #: Width of the delivered images in pixels.
    width: int | None = None
    #: Images for each prompt.
    num_images_per_prompt: int = 1
    #: One seed for all images, as in `torch.Generator("cpu").manual_seed(seed)`, or one for each image. None draws one.
    seed: int | Sequence[int] | None = None
    #: float32 [images, channels, h, w] to start from instead of noise; h and w are the sampled size in latent pixels.
    latents: npt.ArrayLike | None = None
    #: "pil": Pillow images. "np": float32 [images, height, width, 3] in [0, 1], not rounded. "latent": float32 latents.
    output_type: str = "pil"
    #: True: sample at the nearest size that the checkpoint was trained on, then resize and crop. False: sample at this size, in
    #: multiples of the manifest's `vae_scale_factor` (32 for Sana). None: True if the checkpoint has a table of sizes.
    use_resolution_binning: bool | None = None
    #: The text before each prompt, in lines. True: the checkpoint's own. None, False or an empty list: no text.
    complex_human_instruction: bool | Sequence[str] | None = True
    #: Tokens of a prompt that reach the denoiser. A longer prompt is truncated with a warning.
    max_sequence_length: int | None = None
    #: Side in image pixels of the tiles that the decoder works in: the same values in less memory. 0: one piece. None: one piece up
    #: to 2048x2048 pixels of area, tiles above.
    decoder_tile: int | None = None
    #: float [prompts, tokens, channels]: what the text encoder would compute for the prompts.
    prompt_embeds: npt.ArrayLike | None = None
    #: [prompts, tokens]: 1 for the tokens of `prompt_embeds` that count.
    prompt_attention_mask: npt.ArrayLike | None = None
    #: As `prompt_embeds`, in place of `negative_prompt`.
    negative_prompt_embeds: npt.ArrayLike | None = None
    negative_prompt_attention_mask: npt.ArrayLike | None = None
    #: The first timestep of a SANA-Sprint checkpoint, an angle.
    max_timesteps: float = SPRINT_MAX_TIMESTEP
    #: Its second timestep, with 2 steps. None: evenly spaced timesteps.
    intermediate_timesteps: float | None = SPRINT_INTERMEDIATE_TIMESTEP
    #: Another scheduler than the checkpoint's: a short name or a class of diffusers, or its config (`scheduler_choice.NAMES`).
    scheduler: Choice | None = None
    #: Custom timesteps, if the scheduler takes them. For SANA-Sprint angles, the last of them 0.
    timesteps: Sequence[float] | None = None
    #: Custom sigmas, if the scheduler takes them.
    sigmas: Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Check everything that does not depend on the checkpoint. Raises UsageError."""
        optional = [item.name for item in fields(self) if item.default is None or item.name == "intermediate_timesteps"]
        for name, number in checked_numbers(vars(self), optional).items():
            object.__setattr__(self, name, number)
        for name in ("guidance_interval", "pag_interval"):
            object.__setattr__(self, name, checked_interval(name, getattr(self, name)))
        if self.prompt_embeds is None or self.prompt is not None:
            texts("prompt", self.prompt)
        if self.negative_prompt is not None:
            texts("negative_prompt", self.negative_prompt)
        checked_seeds(self.seed)
        self._check_image()
        check_flag("use_resolution_binning", self.use_resolution_binning)
        check_choice("output_type", self.output_type, OUTPUT_TYPES)
        instruction_text(self.complex_human_instruction, "")
        check_scheduler(self.scheduler)
        for name in ("timesteps", "sigmas"):
            object.__setattr__(self, name, checked_spacing(name, getattr(self, name)))

    def _check_image(self) -> None:
        """Read the image and the mask. Raises UsageError for bad ones, and for what has no meaning with or without an image."""
        without = [name for name in ("strength", "mask") if self.image is None and getattr(self, name) is not None]
        if without:
            raise UsageError(f"{without[0]} has no meaning without an image", found="no image", wanted="image (--image) too")
        if self.image is not None and self.latents is not None:
            raise UsageError("image and latents cannot be combined", found="both", wanted="one of them to start from")
        if self.control_image is None and self.controlnet_conditioning_scale != CONDITIONING_SCALE:
            raise UsageError(
                "controlnet_conditioning_scale has no meaning without a control image",
                found="no control_image",
                wanted="control_image (--control-image) too",
            )
        if self.strength is not None:
            object.__setattr__(self, "strength", checked_strength(self.strength))
        for name in ("image", "mask", "control_image"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, given_images(name, value, mask=name == "mask"))


def bins_resolution(request: Request, sample_size: int) -> bool:
    """Whether the image is sampled at a size of the checkpoint's table. `sample_size` is that of its transformer config."""
    binning = request.use_resolution_binning
    return sample_size in BINS if binning is None else binning
