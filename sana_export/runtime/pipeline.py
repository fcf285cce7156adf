"""From a prompt to an image with a bundle: plan, encode, steps, decode. The four can also be called one by one."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Never, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from sana_export.adapters import Lora, lora_at
from sana_export.commands import export_command, repair_command
from sana_export.contract import GRAPH_GROUPS, WEIGHTS_OF
from sana_export.errors import ArtifactError, SanaExportError, UsageError
from sana_export.formats.arrays import Array, Float32
from sana_export.hub.bundles.source import find_bundle
from sana_export.hub.client import Hub
from sana_export.known_files import check_known_files
from sana_export.manifest import Manifest
from sana_export.numeric import MAX_IMAGES, MOST_DEVICES, MOST_THREADS, integer, shown
from sana_export.runtime.backends import check_backend, open_backend
from sana_export.runtime.backends.base import Backend, BackendSettings, DeviceTensor, Loader
from sana_export.runtime.batches import OWN_ERRORS, BatchLimit, RequestJob, draw_in_batches, joined
from sana_export.runtime.callbacks import IsCancelled, StepCallback, call_back, check_callbacks, check_cancelled
from sana_export.runtime.control import CONDITIONING_SCALE
from sana_export.runtime.decoding import check_finite, check_latents_shape, decode_latents, finish_images, one_by_one
from sana_export.runtime.embeddings_cache import MOST_CACHE_BYTES, PROMPT_CACHE_BYTES, EmbeddingsCache
from sana_export.runtime.encoded_prompts import EncodedPrompts, prompt_texts, to_arrays
from sana_export.runtime.encoding import encode_image
from sana_export.runtime.guidance import WHOLE, Interval
from sana_export.runtime.images import encoder_graphs
from sana_export.runtime.inputs import checked_latents
from sana_export.runtime.loop_inputs import check_conditioning, loop_inputs
from sana_export.runtime.loops import LoopCache, take_loop
from sana_export.runtime.lora import LoraStack
from sana_export.runtime.memory import AUTO, MEMORY_MODES, SAMPLING_GRAPHS
from sana_export.runtime.metadata import ImageOrigin, image_metadata
from sana_export.runtime.plan import Plan, make_plan, request_axes
from sana_export.runtime.plan_encoder import PlanEncoder
from sana_export.runtime.preview import Previews
from sana_export.runtime.prompt import PromptEmbeddings, PromptEncoder, PromptTokens
from sana_export.runtime.request import Request
from sana_export.runtime.results import Conditioning, Images, SanaResult, Step, Timings
from sana_export.runtime.sampling import CapturedLoop, SamplingLoop
from sana_export.runtime.schedule import SPRINT_INTERMEDIATE_TIMESTEP, SPRINT_MAX_TIMESTEP
from sana_export.runtime.scheduler_choice import Choice
from sana_export.runtime.sessions import Sessions
from sana_export.runtime.unpicklable import OfThisProcess
from sana_export.runtime.words import CALL_WORDS, ENCODING_WORDS, LOADING_WORDS, METHODS, check_words, parameters_of
from sana_export.user_paths import user_path

LOG = logging.getLogger(__name__)
Drawn = TypeVar("Drawn")


class SanaRuntime(OfThisProcess):
    """A bundle loaded into a backend.

    Threads may share a runtime. Every public method holds the runtime's lock while it uses the device, so calls take turns. Calling
    the runtime is one turn; in `steps`, each step is one. Runs of `steps` may overlap, on one thread or on several, because each
    has its own memory. Use tensors on the device only through the runtime's methods (`to_host`, `decode`, `run`).
    """

    def __init__(
        self,
        backend: Backend,
        text: PromptEncoder,
        memory: str = "resident",
        prompt_cache_bytes: int = PROMPT_CACHE_BYTES,
    ) -> None:
        self.bundle, self.manifest, self.backend = backend.bundle, backend.manifest, backend
        self.text, self.memory = text, memory
        self._lock = threading.RLock()
        self._loops = LoopCache()
        self._loras = LoraStack(backend)
        self._origin = ImageOrigin.of(backend.manifest, backend.name)
        self._previews = Previews()
        #: The encoded prompts that are kept.
        self.prompt_cache = EmbeddingsCache(prompt_cache_bytes)
        self._closed = False
        self._interrupt = False
        #: The step whose callback is running.
        self._step: Step | None = None
        #: The sessions by graph. Reading one loads it. From several threads, use `run` instead.
        self.sessions = Sessions(backend, self._loras, staged=memory != "resident")
        if not self.sessions.staged:
            self.sessions.require(SAMPLING_GRAPHS)
        self._encoder = PlanEncoder(text, backend, self.sessions, self.prompt_cache)

    @classmethod
    def from_pretrained(
        cls,
        bundle: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        backend: str | Loader = AUTO,
        memory: str = AUTO,
        device: int | None = None,
        threads: int | None = None,
        backend_options: Mapping[str, Any] | None = None,
        prompt_cache_bytes: int = PROMPT_CACHE_BYTES,
        **others: Never,
    ) -> SanaRuntime:
        """Check a bundle and load it: the folder `bundle`, or if there is none of that name, the repository on the hub.

        revision: branch, tag or commit of a repository. None: its main branch.
        token: access token of the hub. None: the one of `hf auth login` or HF_TOKEN, if any.
        cache_dir: the folder of files from the hub. None: huggingface_hub's.
        local_files_only: use only what is there already; do not contact the hub.
        backend: a name in `backends.BACKENDS`, "auto", or a function of `(bundle, manifest)` that returns a `Backend`.
        memory: one of `memory.MEMORY_MODES`.
        device: index of the GPU. None: the first one.
        threads: threads for work on the CPU. None: the default of the backend's library.
        backend_options: options of the backend's library, for ONNX Runtime {"session_options": {...}, "provider_options": {...}}.
        prompt_cache_bytes: the most that encoded prompts may take that are kept for later calls. 0 keeps none.

        Raises ArtifactError if the bundle is damaged, incomplete, unfit for this machine, or neither a folder nor a repository;
        UsageError for an unknown backend, mode, option, repository or revision, and for other words of diffusers, saying what to
        write; DependencyError if the backend's package, a GPU or memory is missing, or the hub cannot be reached or refuses.
        """
        check_words("from_pretrained", others, LOADING_WORDS, LOADING_PARAMETERS)
        if memory not in MEMORY_MODES:
            raise UsageError(f"unknown memory mode {memory!r}", wanted=", ".join(MEMORY_MODES), fix=f"--memory {AUTO}")
        device = None if device is None else integer("device", device, 0, MOST_DEVICES)
        threads = None if threads is None else integer("threads", threads, 1, MOST_THREADS)
        prompt_cache_bytes = integer("prompt_cache_bytes", prompt_cache_bytes, 0, MOST_CACHE_BYTES)
        cache = None if cache_dir is None else user_path(cache_dir, "cache_dir")
        check_backend(backend)
        named = backend if isinstance(backend, str) and backend != AUTO else None
        bundle = find_bundle(bundle, revision, Hub(token, cache, local_files_only), backend=named, device=device)
        manifest = Manifest.load(bundle)
        fix = export_command(bundle, manifest)
        required = [name for name in GRAPH_GROUPS["default"] if name not in WEIGHTS_OF]
        if missing := [name for name in required if name not in manifest.graphs]:
            raise ArtifactError(
                f"{bundle} is incomplete",
                found=f"no {', '.join(missing)}",
                wanted=f"the graphs {', '.join(required)}",
                fix=fix,
            )
        settings = BackendSettings(device, threads, backend_options or {})
        opened = open_backend(backend, bundle, manifest, settings)
        repair = repair_command(bundle, manifest)
        check_known_files(bundle, manifest.files, fix=repair)
        text = PromptEncoder.load(bundle, manifest, fix=repair)
        return cls(opened, text, opened.choose_memory_mode(memory), prompt_cache_bytes)

    def close(self) -> None:
        """Release the memory of the runtime, which cannot be used afterwards. A `with` block does this at its end."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            errors: list[SanaExportError] = []
            clears = (self._loops.clear, self._encoder.clear, self.prompt_cache.clear, self.sessions.clear)
            for step in (self.backend.wait, *clears, self.backend.release_memory):
                try:
                    step()
                except SanaExportError as error:  # memory is released all the same
                    errors.append(error)
            if errors:
                raise errors[0]

    def __enter__(self) -> SanaRuntime:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except SanaExportError as error:
            if kind is None:
                raise
            LOG.warning("closing the runtime of %s failed after another error: %s", self.bundle, error)

    @contextlib.contextmanager
    def _using(self) -> Iterator[None]:
        """Hold the runtime's lock. Raises UsageError if the runtime is closed."""
        with self._lock:
            if self._closed:
                raise UsageError(
                    f"the runtime of {self.bundle} is closed",
                    found="a call after close()",
                    wanted="an open runtime",
                    fix=f"SanaRuntime.from_pretrained({str(self.bundle)!r})",
                )
            yield

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *positional: Never,
        negative_prompt: str | Sequence[str] | None = "",
        image: Any = None,
        strength: float | None = None,
        mask: Any = None,
        control_image: Any = None,
        controlnet_conditioning_scale: float = CONDITIONING_SCALE,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        pag_scale: float = 0.0,
        pag_adaptive_scale: float = 0.0,
        guidance_interval: Interval = WHOLE,
        pag_interval: Interval = WHOLE,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        latents: npt.ArrayLike | None = None,
        output_type: str = "pil",
        use_resolution_binning: bool | None = None,
        complex_human_instruction: bool | Sequence[str] | None = True,
        max_sequence_length: int | None = None,
        decoder_tile: int | None = None,
        prompt_embeds: npt.ArrayLike | None = None,
        prompt_attention_mask: npt.ArrayLike | None = None,
        negative_prompt_embeds: npt.ArrayLike | None = None,
        negative_prompt_attention_mask: npt.ArrayLike | None = None,
        max_timesteps: float = SPRINT_MAX_TIMESTEP,
        intermediate_timesteps: float | None = SPRINT_INTERMEDIATE_TIMESTEP,
        scheduler: Choice | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        callback_on_step_end: StepCallback | None = None,
        cancelled: IsCancelled | None = None,
        return_dict: bool = True,
        **others: Never,
    ) -> SanaResult:
        """Draw images for one or more prompts. `Request` documents the parameters.

        callback_on_step_end: called after every step (`StepCallback`). It may set `runtime.interrupt = True` (or, as
        in diffusers, `_interrupt`): no further step runs, and the call returns the images as they are.
        cancelled: called between stages, steps and tiles, from the thread that makes the call. If it returns True, the call raises
        Cancelled. It may look at a `threading.Event` that another thread sets.
        return_dict: False returns the tuple (images,), as in diffusers.

        Raises UsageError for a request that cannot be met, and for other words of diffusers, saying what to write; ArtifactError if
        the result is NaN or infinite; DependencyError if memory runs out; Cancelled.
        """
        if positional:
            found = ", ".join(map(shown, positional))
            raise UsageError("only the prompt may be given without a name", found=found, wanted="runtime(prompt, name=value)")
        check_words("the runtime", others, CALL_WORDS, CALL_PARAMETERS)
        request = Request(
            prompt=prompt,
            negative_prompt=negative_prompt,
            image=image,
            strength=strength,
            mask=mask,
            control_image=control_image,
            controlnet_conditioning_scale=controlnet_conditioning_scale,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            pag_scale=pag_scale,
            pag_adaptive_scale=pag_adaptive_scale,
            guidance_interval=guidance_interval,
            pag_interval=pag_interval,
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
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            max_timesteps=max_timesteps,
            intermediate_timesteps=intermediate_timesteps,
            scheduler=scheduler,
            timesteps=timesteps,
            sigmas=sigmas,
        )
        result = self.draw(request, callback_on_step_end=callback_on_step_end, cancelled=cancelled)
        # Overloads that say so would repeat all parameters.
        return result if return_dict else (result.images,)  # type: ignore[return-value]

    def draw(
        self,
        request: Request,
        plan: Plan | None = None,
        *,
        callback_on_step_end: StepCallback | None = None,
        cancelled: IsCancelled | None = None,
    ) -> SanaResult:
        """Draw the images of a request, as a call with its parameters does. `plan` is its plan, if it has been made (`plan`)."""
        check_callbacks(callback_on_step_end, cancelled)
        check_cancelled(cancelled)
        return self._turn(lambda: self._draw([RequestJob(request, plan or self.plan(request))], callback_on_step_end, cancelled)[0])

    def generate_many(
        self,
        requests: Iterable[Request],
        *,
        batch_size: int = 1,
        callback_on_step_end: StepCallback | None = None,
        cancelled: IsCancelled | None = None,
        return_errors: bool = False,
    ) -> Generator[Any, None, None]:
        """Draw requests of any number, and yield the `SanaResult` of each, in their order.

        Requests are read as they are needed: at most `batches.READ_AHEAD` times `batch_size` are held with their results. Other
        calls may run between two results. Close the iterator (`contextlib.closing`) to stop early.

        batch_size: the most images that are sampled at a time; fewer, with a warning, if no engine takes so many. Requests that
        differ only in prompts, negative prompts, seeds, given embeddings and latents are sampled together. 1: each image is what a
        call of its own gives.
        callback_on_step_end, cancelled: as in a call; the callback sees the latents of the whole batch.
        return_errors: a request's own UsageError or ArtifactError takes the place of its result, and the others are drawn. If not,
        it is raised in its turn, and the iterator ends.

        Raises the errors of a call.
        """
        batch_size = integer("batch_size", batch_size, 1, MAX_IMAGES)
        check_callbacks(callback_on_step_end, cancelled)

        def draw(jobs: Sequence[RequestJob]) -> list[Any]:
            try:
                return self._turn(lambda: self._draw(jobs, callback_on_step_end, cancelled))
            except OWN_ERRORS as error:
                # The others of the batch are fine by themselves.
                return [error] if len(jobs) == 1 else [outcome for job in jobs for outcome in draw([job])]

        def results() -> Generator[Any, None, None]:
            for outcome in draw_in_batches(requests, self.plan, draw, BatchLimit(batch_size, self._check_supported)):
                if isinstance(outcome, SanaExportError) and not return_errors:
                    raise outcome
                yield outcome

        return results()

    def _turn(self, draw: Callable[[], Drawn]) -> Drawn:
        """`draw()` while no other thread uses the runtime, with an `interrupt` of its own."""
        with self._using():
            interrupted, self._interrupt = self._interrupt, False
            try:
                return draw()
            finally:
                self._interrupt = interrupted  # of the call whose callback made this one

    def _draw(self, jobs: Sequence[RequestJob], callback: StepCallback | None, cancelled: IsCancelled | None) -> list[SanaResult]:
        """Draw the images of `jobs`, whose `batch_key` is the same, in one batch."""
        started, record_event = perf_counter(), self.backend.record_event
        check_cancelled(cancelled)  # it may have waited for its turn
        plan = joined([job.plan for job in jobs])
        if len(jobs) > 1:
            self._check_supported(plan)
        if not self.sessions.staged:
            self.sessions.require((*plan.image_graphs, *plan.decoder_graphs))  # report a damaged one before sampling, not after
        conditioning = self._encoder.encode(plan, cancelled)
        check_cancelled(cancelled)
        before = record_event()
        latents, events = self._denoise(plan, conditioning, callback, cancelled)
        after = events[-1] if events else record_event()
        images = self._decode(plan, latents, cancelled)
        decoded, seconds = record_event(), self.backend.seconds
        timings = Timings(
            text_encoder=seconds(*conditioning.events[:2]),
            context=seconds(*conditioning.events[1:3]),
            denoise=tuple(seconds(*pair) for pair in pairwise([before, *events])),
            denoise_loop=seconds(before, after),
            vae_decoder=seconds(after, decoded),
            total=perf_counter() - started,
            vae_encoder=0.0 if plan.image is None and plan.control is None else seconds(conditioning.events[2], before),
        )
        results, first = [], 0
        for job in jobs:
            own = images[first : first + job.images]
            first += job.images
            intervals = (job.request.guidance_interval, job.request.pag_interval)
            metadata = image_metadata(job.request, job.plan, self._origin)
            size = (plan.output_height, plan.output_width)
            results.append(SanaResult(own, job.plan.seeds, *size, *intervals, timings, plan.scheduler, metadata))
        return results

    def _denoise(
        self, plan: Plan, conditioning: Conditioning, callback: StepCallback | None, cancelled: IsCancelled | None
    ) -> tuple[DeviceTensor | Array, list[Any]]:
        """The latents after the last step, and an event after each step if they ran one by one."""
        events: list[Any] = []
        with self._loop(plan, conditioning) as (loop, version):
            if callback is None and cancelled is None and isinstance(loop, CapturedLoop):
                loop.run(0, len(plan.schedule.timesteps))
                return loop.result(), events
            for step in self._run_steps(plan, loop, version):
                if callback is not None:
                    outer, self._step = self._step, step
                    try:
                        call_back(callback, self, step, plan)
                    finally:
                        self._step = outer
                events.append(self.backend.record_event())
                if cancelled is not None:
                    self.backend.wait()  # otherwise all steps are enqueued before the first one is done
                    check_cancelled(cancelled)
                if self._interrupt:
                    break
            return self._predicted(plan, conditioning, step), events

    def _predicted(self, plan: Plan, conditioning: Conditioning, step: Step) -> DeviceTensor:
        """The latents to decode after the last step that ran.

        As in diffusers: SANA-Sprint's pipeline decodes what the step predicts, the others its latents. What a mask protects stays.
        """
        if plan.guidance is None:
            return step.latents
        if plan.image is None or plan.image.mask is None:
            return step.x0
        image = conditioning.image_latents
        feeds = {"latents": step.x0, "image_latents": image, "noise": image, "mask": plan.image.mask}
        with self._using():
            self.sessions.require(plan.loop_graphs)
            return self.sessions["blend"].run({**feeds, "noise_level": np.zeros(1, np.float32)})["blended"]

    def plan(self, request: Request) -> Plan:
        """Check a request and compute everything that follows from it.

        Raises UsageError if the checkpoint cannot meet the request or no engine supports its shapes, and ArtifactError if the
        bundle lacks a graph for it.
        """
        with self._using():
            plan = make_plan(request, self.bundle, self.manifest)
            self._check_supported(plan)
            return plan

    def _check_supported(self, plan: Plan) -> None:
        graphs = (*SAMPLING_GRAPHS, *plan.image_graphs, *plan.decoder_graphs)
        for branches in {part.branches: None for part in plan.segments}:
            self.backend.check_supported(graphs, request_axes(plan, self.manifest) | branches.axes)

    def tokenize(self, plan: Plan) -> list[list[PromptTokens]]:
        """The tokens of the plan's prompts, for each branch with prompts of its own."""
        return self.text.tokenize_plan(plan.texts, plan.max_sequence_length)

    def embed(self, plan: Plan) -> PromptEmbeddings:
        """Run the text encoder on the plan's prompts, each once, whatever `num_images_per_prompt` is; not on those in the cache."""
        with self._using():
            return self._encoder.embed(self.tokenize(plan), plan.embeddings)

    def encode(self, plan: Plan) -> Conditioning:
        """Run the text encoder and the context graph on the plan's prompts, and the VAE's encoder on its images."""
        with self._using():
            return self._encoder.encode(plan, None)

    def encode_image(self, plan: Plan) -> Float32:
        """Run the VAE's encoder on the images of a plan that has some.

        Returns float32 [B, C, h, w], the latents of each drawn image's own image, as the sampler uses them.
        """
        if plan.image is None:
            raise UsageError("this plan has no image", found="a request without image", wanted="Request(image=...)")
        with self._using():
            return self._encoder.encode_images(plan.image, None)

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        do_classifier_free_guidance: bool = True,
        *,
        negative_prompt: str | Sequence[str] | None = "",
        complex_human_instruction: bool | Sequence[str] | None = True,
        max_sequence_length: int | None = None,
        **others: Never,
    ) -> EncodedPrompts:
        """Encode prompts to keep them: a call takes the result in place of prompts, `runtime(**encoded.arrays)`.

        The parameters are those of `Request`. Without `do_classifier_free_guidance`, and for a SANA-Sprint checkpoint, there are no
        negative ones. The rows are on the host, padded to `max_sequence_length` as in diffusers, so they can be added and averaged.

        Raises UsageError, also for other words of diffusers, saying what to write.
        """
        check_words("encode_prompt", others, ENCODING_WORDS, ENCODING_PARAMETERS)
        model, guided = self.manifest.model, do_classifier_free_guidance
        asked = prompt_texts(model, prompt, negative_prompt, complex_human_instruction, max_sequence_length, guided=guided)
        with self._using():
            tokens = self.text.tokenize_plan(asked.texts, asked.max_sequence_length)
            return to_arrays(self._encoder.embed(tokens, {}), self.backend.to_host, asked.max_sequence_length)

    def preview(self, latents: DeviceTensor | Array | None = None, method: str = "linear") -> list[Image.Image]:
        """Small images of latents [B, C, h, w], for a person who waits.

        latents: an array, or a tensor on the device. None, in a callback: the image that the model predicts at this step.
        method: "linear": w x h pixels, a linear projection of each latent pixel, fitted to the bundle's decoder when it is first
        needed (preview.py). "decoder": the decoder's image.

        Raises UsageError for latents of another kind, and for None outside a callback.
        """
        with self._using():
            return self._previews.show(self, self._step.x0 if latents is None and self._step is not None else latents, method)

    def steps(self, plan: Plan, conditioning: Conditioning) -> Generator[Step, None, None]:
        """The sampling loop: one `Step` after each step. The last one's latents are the result.

        Every run draws the same noise, from the plan's seeds. Close the iterator (`contextlib.closing`) to stop early.

        Raises UsageError if `conditioning` has other branches or another number of images, if latents of another shape were
        assigned to a step, or if a LoRA was loaded or unloaded since the run began.
        """
        with self._loop(plan, conditioning) as (loop, version):
            yield from self._run_steps(plan, loop, version)

    @contextlib.contextmanager
    def _loop(self, plan: Plan, conditioning: Conditioning) -> Iterator[tuple[SamplingLoop, int]]:
        """A loop that no other run uses, started for the plan, and the version of the weights at its start.

        The lock is held only while the loop is taken and given back.
        """
        with self._using():
            check_conditioning(plan, conditioning)
            version = self._loras.version
            self.sessions.require(plan.loop_graphs)
            loop = take_loop(plan, conditioning, self.backend, self.sessions, self._loops)
            loop.start(loop_inputs(plan, conditioning, self.backend, self.manifest.model.timestep_scale))
        try:
            yield loop, version
        finally:
            with self._lock:
                keep = not self.sessions.staged and version == self._loras.version and not self._closed
                if isinstance(loop, CapturedLoop) and keep:
                    self._loops.give_back(loop)

    def _run_steps(self, plan: Plan, loop: SamplingLoop, version: int) -> Iterator[Step]:
        """Run the steps one by one. The lock is held in each step, and not between two."""
        for index, timestep in enumerate(plan.schedule.timesteps):
            with self._using():
                if version != self._loras.version:
                    raise UsageError(
                        "the weights changed while steps were running",
                        found="a LoRA was loaded or unloaded",
                        wanted="the same weights in every step",
                        fix="start again: runtime.steps(plan, runtime.encode(plan))",
                    )
                self.sessions.require(plan.loop_graphs)  # another call may have dropped them since the last step
                loop.run(index, index + 1)
                latents, x0 = loop.state(index)
            step = Step(index, float(timestep), latents, x0)
            yield step
            if step.latents is not latents:
                with self._using():
                    loop.replace(index, self._assigned_latents(step.latents, latents, plan))

    def decode(self, plan: Plan, latents: DeviceTensor | Array) -> Images:
        """Latents [B, C, h, w] of the plan's shape to images of the plan's output type and size.

        Raises UsageError for latents of another shape, and ArtifactError if they are not finite.
        """
        return self._decode(plan, latents, None)

    def _decode(self, plan: Plan, latents: DeviceTensor | Array, cancelled: IsCancelled | None) -> Images:
        with self._using():
            check_latents_shape(latents, plan)
            if plan.output_type == "latent":
                return np.array(self._finite_latents(latents))
            if plan.latents_shape[0] > 1:
                return one_by_one(self.backend.to_host(latents), lambda own: self._decode(plan.one_image, own, cancelled))
            self.sessions.require((*plan.decoder_graphs, "postprocess"))
            image = decode_latents(plan, latents, self.backend, self.sessions, partial(check_cancelled, cancelled))
            self._finite_latents(latents)
            return finish_images(plan, image, self.backend, self.sessions)

    def decode_raw(self, plan: Plan, latents: DeviceTensor | Array) -> DeviceTensor | Float32:
        """The decoder's output for latents [B, C, h, w]: float32 [B, 3, H, W] in about [-1, 1], not resized and not checked."""
        with self._using():
            check_latents_shape(latents, plan)
            self.sessions.require(plan.decoder_graphs)
            return decode_latents(plan, latents, self.backend, self.sessions)

    def encode_raw(self, image: Float32, tile: int = 0) -> Float32:
        """The encoder's output for an image [1, 3, H, W] in [-1, 1]: the sampler's latents float32 [1, C, h, w], not checked.

        `tile` is the side of the encoder's tiles in image pixels, 0 for one piece.
        """
        with self._using():
            self.sessions.require(encoder_graphs(tile))
            return encode_image(image, tile, self.backend, self.sessions)

    def run(self, graph: str, feeds: Mapping[str, DeviceTensor | Array]) -> dict[str, DeviceTensor]:
        """Run one graph on its inputs by name (contract.py), arrays or tensors on the device. The outputs stay on the device."""
        with self._using():
            if graph not in self.manifest.graphs:
                raise UsageError(f"{self.bundle} has no graph {graph!r}", wanted=", ".join(self.manifest.graphs))
            self.sessions.require((graph,))
            return self.sessions[graph].run(feeds)

    def to_host(self, tensor: DeviceTensor | Array) -> Array:
        """A copy of a float32 or integer tensor as a numpy array."""
        with self._using():
            return np.array(self.backend.to_host(tensor))

    @property
    def loras(self) -> tuple[Lora, ...]:
        """The loaded LoRAs, in the order in which they were loaded."""
        return self._loras.loras

    @property
    def interrupt(self) -> bool:
        """Whether the current call stops after this step. A callback sets it, or `_interrupt` as in diffusers."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, stop: bool) -> None:
        self._interrupt = stop

    @property
    def weights_version(self) -> int:
        """A number that grows whenever a LoRA may have changed the weights."""
        return self._loras.version

    if not TYPE_CHECKING:  # a type checker would take every name

        def __getattr__(self, name: str) -> Any:
            """Raises AttributeError; for a method of diffusers, with what to write instead."""
            instead = f": write {METHODS[name]}" if name in METHODS else ""
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{instead}")

    def load_lora(self, path: str | Path, scale: float | Mapping[str, float] = 1.0) -> None:
        """Add `scale` times the LoRA in the file or folder `path` to the weights, on top of those already loaded (docs/lora.md).

        A mapping has scales for some layers, such as `{"attn2": 0.5}`; the others have 1.
        A `Conditioning` that was encoded before keeps the old weights. Raises UsageError if there is no LoRA at `path`,
        ArtifactError if it does not fit the checkpoint or the engines cannot change their weights, and DependencyError if the
        backend cannot or memory runs out. The weights are unchanged then.
        """
        with self._using():
            self._drop_loops()
            lora = lora_at(path, scale)
            recorded = self._loras.add(lora, self.sessions)
            self._origin = self._origin.with_loras((*self._origin.loras, recorded))

    def unload_lora(self) -> None:
        """Remove all LoRAs. The weights are the bundle's own again, bit for bit."""
        with self._using():
            self._drop_loops()
            self._loras.clear(self.sessions)
            self._origin = self._origin.with_loras(())

    def _drop_loops(self) -> None:
        """Drop the captured loops before weights change: they may read the old ones."""
        self.backend.wait()
        self._loops.clear()

    def _assigned_latents(self, assigned: Any, current: DeviceTensor, plan: Plan) -> DeviceTensor:
        """The latents that the caller assigned in place of `current`, on the device. Raises UsageError for another shape."""
        if isinstance(assigned, type(current)) and not isinstance(assigned, np.ndarray):
            check_latents_shape(assigned, plan)
            return assigned
        return self.backend.to_device(checked_latents(assigned, plan.latents_shape))

    def _finite_latents(self, latents: DeviceTensor | Array) -> Array:
        """The latents on the host, checked. Called after the decoder is enqueued, so that the device does not wait for the host."""
        host = self.backend.to_host(latents)
        check_finite(host, "latents", self.backend)
        return host


CALL_PARAMETERS, LOADING_PARAMETERS = parameters_of(SanaRuntime.__call__), parameters_of(SanaRuntime.from_pretrained)
ENCODING_PARAMETERS = parameters_of(SanaRuntime.encode_prompt)
