"""Prompt to image from a bundle, in four calls that can also be made one by one: plan, encode, steps, decode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from sana_export.contract import GRAPHS, WEIGHTS_OF
from sana_export.errors import ArtifactError, UsageError
from sana_export.manifest import Manifest, check_files
from sana_export.runtime.backends import AUTO, Array, Backend, DeviceTensor, Loader, Session, open_backend
from sana_export.runtime.noise import TorchGenerator, randn_batch
from sana_export.runtime.prompt import PromptEncoder
from sana_export.runtime.rebuild import export_line
from sana_export.runtime.request import Plan, Request, checked_latents, make_plan
from sana_export.runtime.resolution import ResizePlan
from sana_export.runtime.tiling import assemble, plan_windows

Float32 = npt.NDArray[np.float32]
Images = list[Image.Image] | Float32
#: What every image needs; which graphs decode it depends on its size.
SAMPLING_GRAPHS = ("text_encoder", "context", "denoiser", "sampler", "postprocess")
#: Called after each step with (runtime, step index, timestep, {"latents": float32 [B, C, h, w]}); it may return latents to
#: go on with, as {"latents": array}.
StepCallback = Callable[["SanaRuntime", int, float, dict[str, Array]], Mapping[str, Any] | None]


@dataclass(frozen=True)
class Timings:
    """Seconds on the wall clock. text_encoder holds tokenizing, vae_decoder holds resizing and rounding; total holds all."""

    text_encoder: float
    context: float
    denoise: tuple[float, ...]
    vae_decoder: float
    total: float


@dataclass(frozen=True, eq=False)
class SanaResult:
    """images: a list of Pillow images, float32 [B, height, width, 3] in [0, 1], or latents float32 [B, C, h, w], as asked for;
    the images of the first prompt come first.

    seeds: give them as `seed` to get the same images again. height, width: of the images, in pixels.
    """

    images: Images
    seeds: tuple[int, ...]
    height: int
    width: int
    timings: Timings


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What the denoiser knows of the prompts, on the device: context and context_mask (contract.py); seconds it took."""

    context: DeviceTensor
    context_mask: DeviceTensor
    text_encoder_seconds: float
    context_seconds: float


@dataclass(eq=False)
class Step:
    """State after a sampling step. The loop goes on with `latents`, so assign to it to change them.

    latents and x0 (the image that the model expects now) are tensors [B, C, h, w] on the device. timestep is the schedule's, as
    diffusers gives it to callbacks.
    """

    index: int
    timestep: float
    latents: DeviceTensor | Array
    x0: DeviceTensor
    seconds: float


class SanaRuntime:
    """A bundle loaded into a backend."""

    def __init__(self, bundle: Path, manifest: Manifest, text: PromptEncoder, backend: Backend) -> None:
        self.bundle, self.manifest, self.text, self.backend = bundle, manifest, text, backend
        self._sessions = _Sessions(backend)
        self._sessions.need(SAMPLING_GRAPHS)

    @classmethod
    def from_pretrained(cls, bundle: str | Path, *, backend: str | Loader = AUTO) -> SanaRuntime:
        """Check and load the bundle in the folder `bundle` into `backend`: a name of `backends.BACKENDS`, "auto", or a loader.

        Raises ArtifactError where the bundle is damaged, incomplete or unfit for this machine, UsageError for an unknown backend,
        DependencyError where the backend's package is missing.
        """
        bundle = Path(bundle)
        manifest = Manifest.load(bundle)
        fix = export_line(bundle, manifest)
        wanted = [name for name in GRAPHS if name not in WEIGHTS_OF]
        if missing := [name for name in wanted if name not in manifest.graphs]:
            raise ArtifactError(
                f"{bundle} is incomplete",
                found=f"no {', '.join(missing)}",
                wanted=f"the graphs {', '.join(wanted)}",
                fix=fix,
            )
        opened = open_backend(backend, bundle, manifest) if isinstance(backend, str) else backend(bundle, manifest)
        check_files(bundle, manifest.files, fix=fix)
        return cls(bundle, manifest, PromptEncoder.load(bundle, manifest, fix=fix), opened)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        pag_scale: float = 0.0,
        pag_adaptive_scale: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        latents: npt.ArrayLike | None = None,
        output_type: str = "pil",
        use_resolution_binning: bool | None = None,
        complex_human_instruction: bool = True,
        max_sequence_length: int | None = None,
        decoder_tile: int | None = None,
        callback_on_step_end: StepCallback | None = None,
    ) -> SanaResult:
        """Draw images for the prompt or prompts. What the parameters mean stands in `Request`.

        Raises UsageError for a request that cannot be met, ArtifactError where sampling gives NaN or infinity, DependencyError
        where memory runs out.
        """
        started = perf_counter()
        plan = self.plan(
            Request(
                prompt=prompt,
                negative_prompt=negative_prompt,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                pag_scale=pag_scale,
                pag_adaptive_scale=pag_adaptive_scale,
                height=height,
                width=width,
                num_images_per_prompt=num_images_per_prompt,
                seed=seed,
                latents=latents,
                output_type=output_type,
                use_resolution_binning=use_resolution_binning,
                complex_human_instruction=complex_human_instruction,
                max_sequence_length=max_sequence_length,
                decoder_tile=decoder_tile,
            )
        )
        self._sessions.need(plan.decoder_graphs)  # what is damaged is better known before sampling than after
        conditioning = self.encode(plan)
        denoise = []
        for step in self.steps(plan, conditioning):
            denoise.append(step.seconds)
            if callback_on_step_end is not None:
                self._call_back(callback_on_step_end, step, plan)
        before_decoder = perf_counter()
        images = self.decode(plan, step.latents)
        ended = perf_counter()
        timings = Timings(
            conditioning.text_encoder_seconds,
            conditioning.context_seconds,
            tuple(denoise),
            ended - before_decoder,
            ended - started,
        )
        return SanaResult(images, plan.seeds, plan.output_height, plan.output_width, timings)

    def plan(self, request: Request) -> Plan:
        """Check a request and settle all that follows from it. Raises UsageError."""
        return make_plan(request, self.bundle, self.manifest)

    def encode(self, plan: Plan) -> Conditioning:
        """Run the text encoder and the context graph on the plan's prompts."""
        started = perf_counter()
        tokens = [
            [self.text.tokenize(text, max_sequence_length=plan.max_sequence_length, instruct=instruct) for text in texts]
            for texts, instruct in plan.texts
        ]
        embeddings = self.text.encode(tokens, self._run_text_encoder)
        encoded = perf_counter()
        # Embeddings and masks are repeated together, each prompt's images side by side.
        embeds, mask = (
            np.repeat(array, plan.images_per_prompt, axis=1) for array in (embeddings.prompt_embeds, embeddings.context_mask)
        )
        context = self._sessions["context"].run({"prompt_embeds": embeds})["context"]
        return Conditioning(context, self.backend.to_device(mask), encoded - started, perf_counter() - encoded)

    def steps(self, plan: Plan, conditioning: Conditioning) -> Iterator[Step]:
        """The sampling loop: one `Step` after each step. The last one's latents are the result.

        Every run draws the same noise, that of the plan's seeds.
        """
        schedule, to_device = plan.schedule, self.backend.to_device
        generators = [TorchGenerator(seed) for seed in plan.seeds]
        start = randn_batch(plan.latents_shape, generators) if plan.latents is None else plan.latents
        latents = to_device(start * np.float32(schedule.initial_noise_scale))
        x0 = noise = to_device(np.zeros(plan.latents_shape, dtype=np.float32))
        fixed = {
            "context": conditioning.context,
            "context_mask": conditioning.context_mask,
            "perturbed": to_device(plan.perturbed),
        }
        if plan.guidance is not None:
            fixed["guidance"] = to_device(plan.guidance)
        fed_timesteps = schedule.timesteps * np.float32(self.manifest.model.timestep_scale)
        for index, timestep in enumerate(schedule.timesteps):
            started = perf_counter()
            if schedule.needs_noise:
                noise = to_device(randn_batch(plan.latents_shape, generators))
            noise_pred = self._sessions["denoiser"].run(
                {"latents": latents, "timestep": fed_timesteps[index : index + 1], **fixed}
            )["noise_pred"]
            sampled = self._sessions["sampler"].run(
                {
                    "noise_pred": noise_pred,
                    "latents": latents,
                    "previous_x0": x0,
                    "noise": noise,
                    "coefficients": schedule.coefficients[index],
                    "weights": plan.weights[index],
                }
            )
            x0 = sampled["x0"]
            step = Step(index, float(timestep), sampled["next_latents"], x0, perf_counter() - started)
            yield step
            latents = step.latents

    def decode(self, plan: Plan, latents: DeviceTensor | Array) -> Images:
        """Latents [B, C, h, w] of the plan's shape to images of the plan's output type and size.

        Raises ArtifactError where the latents are not finite.
        """
        host = self.backend.to_host(latents)
        self._check_finite(host, "latents")
        if plan.output_type == "latent":
            return np.array(host)
        image = self._decode(plan, latents)
        # On a device it would have to be copied for that; tiles are on the host.
        if self.backend.device == "cpu" or plan.output_type == "np" or plan.decoder_tile:
            self._check_finite(self.backend.to_host(image), "an image")
        if plan.output_type == "np":
            resized = _resize(self.backend.to_host(image), plan.resize)
            return np.ascontiguousarray((resized * 0.5 + 0.5).clip(0, 1).transpose(0, 2, 3, 1))
        pixels = self._sessions["postprocess"].run({"image": image, **vars(plan.resize)})["pixels"]
        return [Image.fromarray(array) for array in np.array(self.backend.to_host(pixels))]

    def _decode(self, plan: Plan, latents: DeviceTensor | Array) -> DeviceTensor | Float32:
        """latents [B, C, h, w] to image float32 [B, 3, H, W], in one piece or in tiles as planned.

        Tiles are put together on the host; the features that they are cut from stay on the device.
        """
        if not plan.decoder_tile:
            return self._sessions["vae_decoder"].run({"latents": latents})["image"]
        model = self.manifest.model
        features = self._sessions["vae_decoder_head"].run({"latents": latents})["features"]

        def render(rows: Array, columns: Array) -> Float32:
            feeds = {"features": features, "row_index": rows, "column_index": columns}
            tile: Float32 = self.backend.to_host(self._sessions["vae_decoder_tail"].run(feeds)["image"])
            return tile

        batch, _, *size = plan.latents_shape
        height, width = (side * model.vae_scale_factor for side in size)
        scale = model.decoder_tile_scale
        windows = plan_windows(height // scale, width // scale, plan.decoder_tile // scale, model.decoder_tile_halo)
        return assemble(render, windows, np.empty((batch, 3, height, width), np.float32), scale)

    def _run_text_encoder(self, inputs_embeds: Float32, prefix: Float32) -> Float32:
        outputs = self._sessions["text_encoder"].run({"inputs_embeds": inputs_embeds, "prefix": prefix})
        return self.backend.to_host(outputs["prompt_embeds"])

    def _call_back(self, callback: StepCallback, step: Step, plan: Plan) -> None:
        """Hand a copy of the latents to the callback, and take those that it returns."""
        latents = np.array(self.backend.to_host(step.latents))
        returned = callback(self, step.index, step.timestep, {"latents": latents})
        if returned is None:
            return
        if not isinstance(returned, Mapping) or (unknown := set(returned) - {"latents"}):
            found = type(returned).__name__ if not isinstance(returned, Mapping) else ", ".join(map(str, unknown))
            raise UsageError("callback_on_step_end returned something unknown", found=found, wanted='None or {"latents": array}')
        if "latents" in returned:
            step.latents = self.backend.to_device(checked_latents(returned["latents"], plan.latents_shape))

    def _check_finite(self, values: Array, what: str) -> None:
        if bad := int(np.count_nonzero(~np.isfinite(values))):
            raise ArtifactError(
                f"sampling with {self.bundle} gave {what} with NaN or infinite values",
                found=f"{bad} of {values.size} values, with {self.manifest.options.precision} graphs on the backend"
                f" {self.backend.name}",
                wanted="finite values",
                fix=f"sana-export verify {self.bundle} --reference {self.manifest.checkpoint.source} --ranges"
                "  (shows which tensor leaves the range of the precision)",
            )


class _Sessions(dict[str, Session]):
    """Sessions by the names of their graphs, each loaded when it is asked for the first time."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self._backend = backend

    def __missing__(self, graph: str) -> Session:
        self[graph] = self._backend.load(graph)
        return self[graph]

    def need(self, graphs: Iterable[str]) -> None:
        """Load those of `graphs` that are not."""
        for graph in graphs:
            self[graph]


def _resize(image: Array, plan: ResizePlan) -> Array:
    """The `postprocess` graph's resampling on the host: float32 [B, 3, H, W] to [B, 3, H', W']."""
    (top, bottom), (left, right) = plan.row_weight[..., None], plan.column_weight
    rows = image[:, :, plan.row_index[0]] * top + image[:, :, plan.row_index[1]] * bottom
    resized: Array = rows[..., plan.column_index[0]] * left + rows[..., plan.column_index[1]] * right
    return resized
