"""Prompt to image from a bundle, in four calls that can also be made one by one: plan, encode, steps, decode."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from sana_export.adapters import Lora
from sana_export.commands import export_line
from sana_export.contract import GRAPHS, WEIGHTS_OF
from sana_export.environment import return_free_memory
from sana_export.errors import ArtifactError, UsageError
from sana_export.manifest import Manifest, check_files
from sana_export.runtime.backends import AUTO, MEMORY_MODES, Array, Backend, DeviceTensor, Loader, Session, open_backend
from sana_export.runtime.decoding import assemble, plan_windows
from sana_export.runtime.lora import LoraStack
from sana_export.runtime.noise import TorchGenerator, randn_batch
from sana_export.runtime.prompt import PromptEncoder
from sana_export.runtime.request import Plan, Request, checked_latents, make_plan
from sana_export.runtime.resolution import ResizePlan
from sana_export.runtime.sampling import Capturing, EnqueuedSession, Loops, LoopShape, SamplingLoop

Float32 = npt.NDArray[np.float32]
Images = list[Image.Image] | Float32
#: What every image needs; which graphs decode it depends on its size.
SAMPLING_GRAPHS = ("text_encoder", "context", "denoiser", "sampler", "postprocess")
#: What is loaded together where memory is short, before what decodes.
TEXT_STAGE, DENOISING_STAGE = ("text_encoder", "context"), ("denoiser", "sampler")
#: Prefixes of the instruction that stay on the device: prompts after it share one length of it, or nearly so, the others another.
KEPT_PREFIXES = 4
#: Called after each step with (runtime, step index, timestep, {"latents": float32 [B, C, h, w]}); it may return latents to
#: go on with, as {"latents": array}.
StepCallback = Callable[["SanaRuntime", int, float, dict[str, Array]], Mapping[str, Any] | None]


@dataclass(frozen=True)
class Timings:
    """Seconds, of the device where there is one. text_encoder holds tokenizing, vae_decoder resizing and rounding; total holds all.

    denoise: each step, callbacks included; empty where all of them ran as one CUDA graph. denoise_loop: all steps.
    """

    text_encoder: float
    context: float
    denoise: tuple[float, ...]
    denoise_loop: float
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
    """What the denoiser knows of the prompts, on the device: context and context_mask (contract.py).

    marks: the backend's, before the text encoder, after it, and after the context graph.
    """

    context: DeviceTensor
    context_mask: DeviceTensor
    marks: tuple[Any, Any, Any]


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


class SanaRuntime:
    """A bundle loaded into a backend. Threads may share it: calls wait for each other, since they share one device."""

    def __init__(self, bundle: Path, manifest: Manifest, text: PromptEncoder, backend: Backend, memory: str = "resident") -> None:
        self.bundle, self.manifest, self.text, self.backend, self.memory = bundle, manifest, text, backend, memory
        self._lock = threading.RLock()
        self._loops = Loops()
        self._prefixes: dict[int, DeviceTensor] = {}
        self._loras = LoraStack(bundle, manifest, backend.check_refit)
        self._sessions = _Sessions(backend, self._loras, staged=memory != "resident")
        if not self._sessions.staged:
            self._sessions.need(SAMPLING_GRAPHS)

    @classmethod
    def from_pretrained(cls, bundle: str | Path, *, backend: str | Loader = AUTO, memory: str = AUTO) -> SanaRuntime:
        """Check and load the bundle in the folder `bundle` into `backend`: a name of `backends.BACKENDS`, "auto", or a loader.

        memory: a mode of `backends.MEMORY_MODES`. Raises ArtifactError where the bundle is damaged, incomplete or unfit for this
        machine, UsageError for an unknown backend or mode, DependencyError where the backend's package or memory is missing.
        """
        if memory not in MEMORY_MODES:
            raise UsageError(f"there is no memory mode {memory!r}", wanted=", ".join(MEMORY_MODES), fix=f"--memory {AUTO}")
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
        text = PromptEncoder.load(bundle, manifest, fix=fix)
        return cls(bundle, manifest, text, opened, opened.settle_memory(memory))

    def close(self) -> None:
        """Give back what the runtime holds; it is not used any more. `with SanaRuntime.from_pretrained(...) as runtime` does so."""
        with self._lock:
            self.backend.wait()
            self._loops.clear()
            self._prefixes.clear()
            self._sessions.clear()

    def __enter__(self) -> SanaRuntime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        request = Request(
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
        with self._lock:
            return self._generate(request, callback_on_step_end)

    def _generate(self, request: Request, callback: StepCallback | None) -> SanaResult:
        started, mark = perf_counter(), self.backend.mark
        plan = self.plan(request)
        if not self._sessions.staged:
            self._sessions.need(plan.decoder_graphs)  # what is damaged is better known before sampling than after
        conditioning = self.encode(plan)
        before = mark()
        latents, marks = self._denoise(plan, conditioning, callback)
        after = marks[-1] if marks else mark()
        images = self.decode(plan, latents)
        decoded, seconds = mark(), self.backend.seconds
        timings = Timings(
            text_encoder=seconds(*conditioning.marks[:2]),
            context=seconds(*conditioning.marks[1:]),
            denoise=tuple(seconds(*pair) for pair in pairwise([before, *marks])),
            denoise_loop=seconds(before, after),
            vae_decoder=seconds(after, decoded),
            total=perf_counter() - started,
        )
        return SanaResult(images, plan.seeds, plan.output_height, plan.output_width, timings)

    def _denoise(
        self, plan: Plan, conditioning: Conditioning, callback: StepCallback | None
    ) -> tuple[DeviceTensor | Array, list[Any]]:
        """The latents after all steps, and a mark after each step where they were run one by one."""
        if callback is None and (loop := self._start_loop(plan, conditioning)) is not None:
            loop.run(0, loop.shape.steps)
            return loop.after(loop.shape.steps - 1)[0], []
        marks = []
        for step in self.steps(plan, conditioning):
            if callback is not None:
                self._call_back(callback, step, plan)
            marks.append(self.backend.mark())
        return step.latents, marks

    @property
    def loras(self) -> tuple[Lora, ...]:
        """The LoRAs that were loaded, in their order."""
        return self._loras.loras

    def load_lora(self, path: str | Path, scale: float = 1.0) -> None:
        """Add `scale` times the LoRA in the file or folder `path` to the weights, on top of those loaded before (docs/lora.md).

        A `Conditioning` that was encoded before keeps the weights of then. Raises UsageError where nothing is there,
        ArtifactError naming the tensor for a LoRA that does not fit or weights that cannot be changed, DependencyError out of
        memory; nothing has changed then.
        """
        with self._lock:
            self.backend.wait()
            self._loops.clear()  # what was captured may hold the old weights
            self._loras.add(Lora(Path(path), scale), self._sessions)

    def unload_lora(self) -> None:
        """Take all LoRAs away: the weights are the bundle's again, bit by bit."""
        with self._lock:
            self.backend.wait()
            self._loops.clear()
            self._loras.clear(self._sessions)

    def plan(self, request: Request) -> Plan:
        """Check a request and settle all that follows from it. Raises UsageError, also for what the backend's engines cannot do."""
        plan = make_plan(request, self.bundle, self.manifest)
        self.backend.admit((*SAMPLING_GRAPHS, *plan.decoder_graphs), _axes(plan, self.manifest))
        return plan

    def encode(self, plan: Plan) -> Conditioning:
        """Run the text encoder and the context graph on the plan's prompts."""
        start = self.backend.mark()
        self._sessions.need(TEXT_STAGE)
        tokens = [
            [self.text.tokenize(text, max_sequence_length=plan.max_sequence_length, instruct=instruct) for text in texts]
            for texts, instruct in plan.texts
        ]
        embeddings = self.text.encode(tokens, self._run_text_encoder).repeated(plan.images_per_prompt)
        embeddings = embeddings.padded(self.backend.text_multiple, plan.max_sequence_length)
        gathered = self.backend.gather(embeddings)
        encoded = self.backend.mark()
        context = self._sessions["context"].run({"prompt_embeds": gathered})["context"]
        mask = self.backend.to_device(embeddings.context_mask)
        return Conditioning(context, mask, (start, encoded, self.backend.mark()))

    def steps(self, plan: Plan, conditioning: Conditioning) -> Iterator[Step]:
        """The sampling loop: one `Step` after each step. The last one's latents are the result.

        Every run draws the same noise, that of the plan's seeds. One run at a time: runs of one shape share their memory.
        """
        loop = self._start_loop(plan, conditioning)
        if loop is not None:
            yield from self._replayed_steps(plan, loop)
            return
        to_device = self.backend.to_device
        start, fresh = _noise(plan)
        latents = to_device(start)
        x0 = noise = to_device(np.zeros(plan.latents_shape, dtype=np.float32))
        fixed = self._fixed(plan, conditioning)
        fed_timesteps = self._fed_timesteps(plan)
        for index, timestep in enumerate(plan.schedule.timesteps):
            if plan.schedule.needs_noise:
                noise = to_device(next(fresh))
            noise_pred = self._sessions["denoiser"].run(
                {"latents": latents, "timestep": fed_timesteps[index : index + 1], **fixed}
            )["noise_pred"]
            sampled = self._sessions["sampler"].run(
                {
                    "noise_pred": noise_pred,
                    "latents": latents,
                    "previous_x0": x0,
                    "noise": noise,
                    "coefficients": plan.schedule.coefficients[index],
                    "weights": plan.weights[index],
                }
            )
            x0 = sampled["x0"]
            step = Step(index, float(timestep), sampled["next_latents"], x0)
            yield step
            latents = step.latents

    def _replayed_steps(self, plan: Plan, loop: SamplingLoop) -> Iterator[Step]:
        """The steps of a started loop one by one. What is given out is a copy, so that it stays as it is."""
        for index, timestep in enumerate(plan.schedule.timesteps):
            loop.run(index, index + 1)
            latents, x0 = loop.after(index)
            given = loop.backend.copy(latents)
            step = Step(index, float(timestep), given, loop.backend.copy(x0))
            yield step
            if step.latents is not given:
                loop.backend.write(latents, step.latents)

    def _start_loop(self, plan: Plan, conditioning: Conditioning) -> SamplingLoop | None:
        """The loop of the plan's shape with the request loaded; None for a backend that waits for every session."""
        self._sessions.need(DENOISING_STAGE)
        if not isinstance(self.backend, Capturing):
            return None
        backend, context = self.backend, conditioning.context
        shape = LoopShape(
            latents=plan.latents_shape,
            context=tuple(context.shape),
            branches=len(plan.perturbed),
            text_tokens=conditioning.context_mask.shape[-1],
            steps=len(plan.schedule.timesteps),
            needs_noise=plan.schedule.needs_noise,
            guided=plan.guidance is not None,
        )
        denoiser, sampler = (cast(EnqueuedSession, self._sessions[name]) for name in DENOISING_STAGE)

        def make() -> SamplingLoop:
            # What is loaded for one image is not worth capturing.
            capture = not self._sessions.staged
            return SamplingLoop(backend, denoiser, sampler, shape, context.dtype, capture=capture)

        loop = make() if self._sessions.staged else self._loops.get(shape, make)
        start, fresh = _noise(plan)
        noise = list(fresh) if shape.needs_noise else []
        loop.start(plan, start, noise, self._fed_timesteps(plan), self._fixed(plan, conditioning))
        return loop

    def _fixed(self, plan: Plan, conditioning: Conditioning) -> dict[str, DeviceTensor]:
        """What the denoiser is fed in every step."""
        fixed = {
            "context": conditioning.context,
            "context_mask": conditioning.context_mask,
            "perturbed": self.backend.to_device(plan.perturbed),
        }
        if plan.guidance is not None:
            fixed["guidance"] = self.backend.to_device(plan.guidance)
        return fixed

    def _fed_timesteps(self, plan: Plan) -> Float32:
        return plan.schedule.timesteps * np.float32(self.manifest.model.timestep_scale)

    def decode(self, plan: Plan, latents: DeviceTensor | Array) -> Images:
        """Latents [B, C, h, w] of the plan's shape to images of the plan's output type and size.

        Raises ArtifactError where the latents are not finite.
        """
        if plan.output_type == "latent":
            return np.array(self._finite_latents(latents))
        self._sessions.need((*plan.decoder_graphs, "postprocess"))
        image = self._decode(plan, latents)
        self._finite_latents(latents)
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

    def _run_text_encoder(self, inputs_embeds: Float32, prefix: Float32) -> DeviceTensor:
        """The instruction's keys and values go to the device once: how many of them are shared tells one `prefix` from another."""
        shared = prefix.shape[3]
        if shared not in self._prefixes:
            while len(self._prefixes) >= KEPT_PREFIXES:
                del self._prefixes[next(iter(self._prefixes))]
            self._prefixes[shared] = self.backend.to_device(prefix)
        feeds = {"inputs_embeds": inputs_embeds, "prefix": self._prefixes[shared]}
        return self._sessions["text_encoder"].run(feeds)["prompt_embeds"]

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

    def _finite_latents(self, latents: DeviceTensor | Array) -> Array:
        """The latents on the host. They are read after the decoder was enqueued, so that the device need not wait for it."""
        host = self.backend.to_host(latents)
        self._check_finite(host, "latents")
        return host

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
    """Sessions by the names of their graphs, each loaded when it is first asked for; `staged` lets go of those not needed."""

    def __init__(self, backend: Backend, loras: LoraStack, *, staged: bool) -> None:
        super().__init__()
        self._backend, self._loras, self.staged = backend, loras, staged

    def __missing__(self, graph: str) -> Session:
        session = self._backend.load(graph)
        self._loras.refit(graph, session)
        self[graph] = session
        return session

    def need(self, graphs: Iterable[str]) -> None:
        """Load those of `graphs` that are not, after letting go of the others where memory is short."""
        graphs = tuple(graphs)
        if self.staged and (others := self.keys() - set(graphs)):
            self._backend.wait()
            for graph in others:
                del self[graph]
            return_free_memory()
        for graph in graphs:
            self[graph]


def _noise(plan: Plan) -> tuple[Float32, Iterator[Float32]]:
    """What the plan's latents start from, and the fresh noise of one step after another, in the order that torch draws them."""
    generators = [TorchGenerator(seed) for seed in plan.seeds]
    start = randn_batch(plan.latents_shape, generators) if plan.latents is None else plan.latents
    fresh = (randn_batch(plan.latents_shape, generators) for _ in plan.schedule.timesteps)
    return start * np.float32(plan.schedule.initial_noise_scale), fresh


def _axes(plan: Plan, manifest: Manifest) -> dict[str, int]:
    """The axes of the plan's tensors that are known before its prompts are read."""
    batch, _, height, width = plan.latents_shape
    factor, scale = manifest.model.vae_scale_factor, manifest.model.decoder_tile_scale
    return {
        "batch": batch,
        "branches": len(plan.perturbed),
        "latent_height": height,
        "latent_width": width,
        "image_height": height * factor,
        "image_width": width * factor,
        "feature_height": height * factor // scale,
        "feature_width": width * factor // scale,
        "output_height": plan.output_height,
        "output_width": plan.output_width,
    }


def _resize(image: Array, plan: ResizePlan) -> Array:
    """The `postprocess` graph's resampling on the host: float32 [B, 3, H, W] to [B, 3, H', W']."""
    (top, bottom), (left, right) = plan.row_weight[..., None], plan.column_weight
    rows = image[:, :, plan.row_index[0]] * top + image[:, :, plan.row_index[1]] * bottom
    resized: Array = rows[..., plan.column_index[0]] * left + rows[..., plan.column_index[1]] * right
    return resized
