"""`SanaExportPipeline`: a bundle with the words of diffusers' SanaPipeline, for scripts that change one import.

The runtime does the work: it samples in one captured loop where it can. Only the start noise, the noise of stochastic schedulers,
and the results are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import diffusers
import numpy as np
import torch
from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sana_export.errors import UsageError
from sana_export.formats.arrays import Float32
from sana_export.integrations.diffusers.module import check_dtype, check_moves
from sana_export.integrations.diffusers.tensors import exchange_with
from sana_export.profiles import DECODER_TILE
from sana_export.runtime.backends.base import CapturingBackend, Loader
from sana_export.runtime.memory import AUTO
from sana_export.runtime.pipeline import SanaRuntime
from sana_export.runtime.request import Request
from sana_export.runtime.schedule import SPRINT_INTERMEDIATE_TIMESTEP, SPRINT_MAX_TIMESTEP
from sana_export.runtime.words import CALL_WORDS, check_words

Generators = torch.Generator | list[torch.Generator] | None
#: Words of diffusers that have no meaning here, with the values that ask for nothing.
_NEUTRAL = ("eta", "clean_caption", "attention_kwargs")
_NO_PART = "a bundle has no modules: leave out what moves or converts them; enable_vae_tiling() is a method of the pipeline"
#: What to write instead of attributes of diffusers' pipelines.
INSTEAD: Mapping[str, str] = {
    **dict.fromkeys(("transformer", "text_encoder", "vae", "tokenizer", "components"), _NO_PART),
    **dict.fromkeys(("enable_model_cpu_offload", "enable_sequential_cpu_offload"), 'from_pretrained(bundle, memory="staged")'),
    **dict.fromkeys(
        ("set_adapters", "fuse_lora", "unfuse_lora"), "load_lora_weights(path, scale=0.7), for each LoRA with its scale"
    ),
    "encode_prompt": "pipe.runtime.encode_prompt(prompt)",
}


class SanaExportPipeline:
    """The bundle of a Sana checkpoint. A call takes the words of SanaPipeline and draws the same images.

    `SanaExportPipeline.from_pretrained` gives a `SanaExportSprintPipeline` for the bundle of a SANA-Sprint checkpoint, as
    DiffusionPipeline does.
    """

    def __init__(self, runtime: SanaRuntime) -> None:
        #: What runs the bundle.
        self.runtime = runtime
        self._device = exchange_with(runtime.backend).device
        self._scheduler: Any = None
        self._tile: int | None = None
        self._bar: dict[str, Any] = {}
        self._interrupt = False

    @classmethod
    def from_pretrained(
        cls,
        bundle: str | Path,
        *,
        backend: str | Loader = AUTO,
        device: int | None = None,
        threads: int | None = None,
        memory: str = AUTO,
        backend_options: Mapping[str, Any] | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        **others: Any,
    ) -> SanaExportPipeline:
        """Load a bundle. The parameters are those of `SanaRuntime.from_pretrained`.

        torch_dtype, dtype: the precision that the bundle was exported in, or None.

        Raises its errors, and UsageError for another precision.
        """
        runtime = SanaRuntime.from_pretrained(
            bundle, backend=backend, device=device, threads=threads, memory=memory, backend_options=backend_options, **others
        )
        try:
            for word, wanted in (("torch_dtype", torch_dtype), ("dtype", dtype)):
                if wanted is not None:
                    check_dtype(wanted, runtime, f"{word}={wanted}")
        except UsageError:
            runtime.close()
            raise
        return (SanaExportSprintPipeline if runtime.manifest.model.guidance_embeds else SanaExportPipeline)(runtime)

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] = "",
        num_inference_steps: int = 20,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 4.5,
        num_images_per_prompt: int | None = 1,
        height: int = 1024,
        width: int = 1024,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        clean_caption: bool = False,
        use_resolution_binning: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 300,
        complex_human_instruction: bool | list[str] | None = True,
        **others: Any,
    ) -> Any:
        """Draw images. The words, their order and their defaults are those of diffusers' SanaPipeline.

        complex_human_instruction: True is the checkpoint's own, which is diffusers' default text.
        others: more words of `Request`, such as pag_scale, image, strength, mask, control_image, controlnet_conditioning_scale.
        """
        words = {name: value for name, value in locals().items() if name not in ("self", "others", "__class__")}
        return self._draw({**words, **others})

    @property
    def device(self) -> torch.device:
        """Where the bundle runs, as far as PyTorch can reach it. Start noise without a generator is drawn there."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the bundle was exported in."""
        return getattr(torch, self.runtime.manifest.options.dtype)

    def to(self, *args: Any, **kwargs: Any) -> SanaExportPipeline:
        """Return the pipeline. Raises UsageError for another device or precision than the bundle's."""
        load = f"SanaExportPipeline.from_pretrained({str(self.runtime.bundle)!r}"
        check_moves((*args, *kwargs.values()), self.device, self.runtime, load)
        return self

    @property
    def scheduler(self) -> Any:
        """The scheduler of diffusers that images are drawn with. Assign another one to draw with that."""
        if self._scheduler is None:
            config = dict(self.runtime.manifest.model.scheduler)
            return getattr(diffusers, str(config["_class_name"])).from_config(config)
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def set_progress_bar_config(self, **config: Any) -> None:
        """Options of tqdm for the progress bar; `disable=True` for none. A captured loop moves it once, at its end."""
        self._bar = config

    def enable_vae_tiling(self) -> None:
        """Decode in tiles: the same images in less memory."""
        self._tile = DECODER_TILE

    def disable_vae_tiling(self) -> None:
        """Decode in one piece up to 2048x2048 pixels of area, in tiles above."""
        self._tile = None

    def load_lora_weights(self, path: str | Path, weight_name: str | None = None, *, scale: float = 1.0, **_: Any) -> None:
        """Add a LoRA: a file, or a folder and the name of a file in it. It is active at once, with `scale`."""
        self.runtime.load_lora(path if weight_name is None else Path(path) / weight_name, scale)

    def unload_lora_weights(self) -> None:
        """Remove all LoRAs."""
        self.runtime.unload_lora()

    def close(self) -> None:
        """Release the bundle's memory."""
        self.runtime.close()

    def __getattr__(self, name: str) -> NoReturn:
        hint = f": {INSTEAD[name]}" if name in INSTEAD else ""
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}")

    def _draw(self, words: dict[str, Any]) -> Any:
        """The images for the words of a call."""
        take = words.pop
        generator, output_type, return_dict = take("generator"), take("output_type"), take("return_dict")
        callback, inputs = take("callback_on_step_end"), list(take("callback_on_step_end_tensor_inputs"))
        check_words("the pipeline", {name: take(name) for name in _NEUTRAL}, CALL_WORDS, ())
        if words["timesteps"] is not None or words.get("sigmas") is not None:
            words["num_inference_steps"] = None
        for name, value in words.items():
            words[name] = value.detach().float().cpu().numpy() if isinstance(value, Tensor) else value
        if self._scheduler is not None:
            words["scheduler"] = dict(self._scheduler.config)
        words.setdefault("decoder_tile", self._tile)
        request = Request(**_known(words), output_type={"pt": "np"}.get(output_type, output_type))
        plan = self.runtime.plan(request)
        _check_generators(generator, plan.latents_shape[0], self.device)

        def noise() -> Float32:
            drawn: Float32 = (
                randn_tensor(plan.latents_shape, generator=generator, device=self.device, dtype=torch.float32).cpu().numpy()
            )
            return drawn

        started = replace(plan, latents=noise() if plan.latents is None else plan.latents, draw_noise=noise)
        with self._progress(len(plan.schedule.timesteps)) as update:
            step = self._callback(callback, inputs, update)
            images = self.runtime.draw(request, started, callback_on_step_end=step).images
        images = self._as_tensors(images, output_type)
        return SanaPipelineOutput(images=images) if return_dict else (images,)

    def _as_tensors(self, images: Any, output_type: str | None) -> Any:
        """Images of the runtime as diffusers delivers them."""
        if output_type == "latent":
            return torch.from_numpy(images).to(self.device)
        return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))) if output_type == "pt" else images

    @contextmanager
    def _progress(self, steps: int) -> Iterator[Callable[[], Any] | None]:
        """A progress bar over the steps, and what moves it after each. None where that would break up a captured loop."""
        from tqdm.auto import tqdm

        with tqdm(total=steps, **self._bar) as bar:
            whole = isinstance(self.runtime.backend, CapturingBackend) or bar.disable
            yield None if whole else bar.update
            bar.update(steps - bar.n)

    def _callback(self, callback: Any, inputs: list[str], update: Callable[[], Any] | None) -> Callable[..., Any] | None:
        """The runtime's callback: moves the progress bar, and calls diffusers' kind of `callback` with tensors."""
        inputs = list(getattr(callback, "tensor_inputs", inputs))
        if inputs not in ([], ["latents"]):
            raise UsageError(
                "callback_on_step_end_tensor_inputs has tensors that a bundle does not have", found=inputs, wanted=["latents"]
            )
        if callback is None and update is None:
            return None
        self._interrupt = False

        def call(runtime: Any, index: int, timestep: float, tensors: dict[str, Any]) -> Mapping[str, Any] | None:
            if update is not None:
                update()
            if callback is None:
                return None
            given = {name: torch.from_numpy(tensors[name]).to(self.device) for name in inputs}
            returned = callback(self, index, torch.tensor(timestep), given)
            runtime.interrupt = self._interrupt
            if not returned:
                return None
            return {
                name: value.detach().float().cpu().numpy() if isinstance(value, Tensor) else value
                for name, value in returned.items()
            }

        return call


class SanaExportSprintPipeline(SanaExportPipeline):
    """The bundle of a SANA-Sprint checkpoint. A call takes the words of SanaSprintPipeline."""

    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int = 2,
        timesteps: list[int] | None = None,
        max_timesteps: float = SPRINT_MAX_TIMESTEP,
        intermediate_timesteps: float | None = SPRINT_INTERMEDIATE_TIMESTEP,
        guidance_scale: float = 4.5,
        num_images_per_prompt: int | None = 1,
        height: int = 1024,
        width: int = 1024,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        clean_caption: bool = False,
        use_resolution_binning: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 300,
        complex_human_instruction: bool | list[str] | None = True,
        **others: Any,
    ) -> Any:
        """Draw images. The words, their order and their defaults are those of diffusers' SanaSprintPipeline.

        complex_human_instruction: True is the checkpoint's own. others: image, strength and mask, as in `Request`.
        """
        words = {name: value for name, value in locals().items() if name not in ("self", "others", "__class__")}
        return self._draw({**words, **others})


def _check_generators(given: Generators, images: int, device: torch.device) -> None:
    """Raise UsageError unless there is one generator for all images or for each, on the CPU or on `device`."""
    generators = given if isinstance(given, list) else [given]
    if len(generators) not in (1, images):
        raise UsageError(
            "generator is a list of another length than the images", found=len(generators), wanted=f"1 or {images} generators"
        )
    for generator in generators:
        if generator is not None and generator.device.type not in ("cpu", device.type):
            raise UsageError(
                "the noise cannot be drawn with this generator",
                found=f"a generator on the device {generator.device}",
                wanted="one on the CPU" + ("" if device.type == "cpu" else f" or on {device}"),
                fix="generator=torch.Generator().manual_seed(42)",
            )


def _known(words: Mapping[str, Any]) -> dict[str, Any]:
    """The words, if they are all parameters of `Request`. Raises UsageError, saying what to write."""
    fields = tuple(Request.__dataclass_fields__)
    check_words("the pipeline", {name: value for name, value in words.items() if name not in fields}, CALL_WORDS, fields)
    return {name: value for name, value in words.items() if name in fields}
