"""From a prompt to an image with a bundle: plan, encode, steps, decode. The four can also be called one by one."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from sana_export.adapters import Lora
from sana_export.commands import export_command
from sana_export.contract import GRAPHS, WEIGHTS_OF
from sana_export.errors import ArtifactError, SanaExportError, UsageError
from sana_export.formats.arrays import Array, Float32
from sana_export.known_files import check_known_files
from sana_export.manifest import Manifest
from sana_export.runtime.backends import open_backend
from sana_export.runtime.backends.base import Backend, BackendSettings, DeviceTensor, Loader
from sana_export.runtime.decoding import check_finite, check_latents_shape, decode_latents, finish_images
from sana_export.runtime.lora import LoraStack
from sana_export.runtime.memory import AUTO, DENOISING_STAGE, MEMORY_MODES, SAMPLING_GRAPHS, TEXT_STAGE
from sana_export.runtime.prompt import PromptEmbeddings, PromptEncoder, PromptTokens
from sana_export.runtime.request import Plan, Request, checked_latents, make_plan, request_axes
from sana_export.runtime.results import Conditioning, Images, SanaResult, Step, Timings
from sana_export.runtime.sampling import CapturedLoop, LoopCache, SamplingLoop, check_conditioning, loop_inputs, take_loop
from sana_export.runtime.sessions import Sessions

LOG = logging.getLogger(__name__)

#: The number of the instruction's prefixes that stay on the device. Most prompts share the same number of its tokens.
KEPT_PREFIXES = 4
#: Called after each step with (runtime, step index, timestep, {"latents": float32 [B, C, h, w]}). It may return {"latents": array}
#: to continue with other latents.
StepCallback = Callable[["SanaRuntime", int, float, dict[str, Array]], Mapping[str, Any] | None]


class SanaRuntime:
    """A bundle loaded into a backend.

    Threads may share a runtime. Every public method holds the runtime's lock while it uses the device, so calls take turns. Calling
    the runtime is one turn; in `steps`, each step is one. Runs of `steps` may overlap, on one thread or on several, because each
    has its own memory. Use tensors on the device only through the runtime's methods (`to_host`, `decode`, `run`).
    """

    def __init__(self, backend: Backend, text: PromptEncoder, memory: str = "resident") -> None:
        self.bundle, self.manifest, self.backend = backend.bundle, backend.manifest, backend
        self.text, self.memory = text, memory
        self._lock = threading.RLock()
        self._loops = LoopCache()
        self._prefixes: dict[int, DeviceTensor] = {}
        self._loras = LoraStack(backend)
        self._closed = False
        #: The sessions by graph. Reading one loads it. From several threads, use `run` instead.
        self.sessions = Sessions(backend, self._loras, staged=memory != "resident")
        if not self.sessions.staged:
            self.sessions.require(SAMPLING_GRAPHS)

    @classmethod
    def from_pretrained(
        cls,
        bundle: str | Path,
        *,
        backend: str | Loader = AUTO,
        memory: str = AUTO,
        device: int | None = None,
        threads: int | None = None,
        backend_options: Mapping[str, Any] | None = None,
    ) -> SanaRuntime:
        """Check the bundle in the folder `bundle` and load it.

        backend: a name in `backends.BACKENDS`, "auto", or a function of `(bundle, manifest)` that returns a `Backend`.
        memory: one of `memory.MEMORY_MODES`.
        device: index of the GPU. None: the first one.
        threads: threads for work on the CPU. None: the default of the backend's library.
        backend_options: options of the backend's library, for ONNX Runtime {"session_options": {...}, "provider_options": {...}}.

        Raises ArtifactError if the bundle is damaged, incomplete or unfit for this machine; UsageError for an unknown backend, mode
        or option; DependencyError if the backend's package, a GPU or memory is missing.
        """
        if memory not in MEMORY_MODES:
            raise UsageError(f"unknown memory mode {memory!r}", wanted=", ".join(MEMORY_MODES), fix=f"--memory {AUTO}")
        bundle = Path(bundle)
        manifest = Manifest.load(bundle)
        fix = export_command(bundle, manifest)
        required = [name for name in GRAPHS if name not in WEIGHTS_OF]
        if missing := [name for name in required if name not in manifest.graphs]:
            raise ArtifactError(
                f"{bundle} is incomplete",
                found=f"no {', '.join(missing)}",
                wanted=f"the graphs {', '.join(required)}",
                fix=fix,
            )
        settings = BackendSettings(device, threads, backend_options or {})
        opened = open_backend(backend, bundle, manifest, settings)
        check_known_files(bundle, manifest.files, fix=fix)
        text = PromptEncoder.load(bundle, manifest, fix=fix)
        return cls(opened, text, opened.choose_memory_mode(memory))

    def close(self) -> None:
        """Release the memory of the runtime, which cannot be used afterwards. A `with` block does this at its end."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            errors: list[SanaExportError] = []
            clears = (self._loops.clear, self._prefixes.clear, self.sessions.clear)
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
        """Draw images for one or more prompts. `Request` documents the parameters.

        callback_on_step_end: called after every step (`StepCallback`). Raise an exception in it to cancel the call.

        Raises UsageError for a request that cannot be met, ArtifactError if the result is NaN or infinite, and DependencyError if
        memory runs out.
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
        with self._using():
            return self._generate(request, callback_on_step_end)

    def _generate(self, request: Request, callback: StepCallback | None) -> SanaResult:
        started, record_event = perf_counter(), self.backend.record_event
        plan = self.plan(request)
        if not self.sessions.staged:
            self.sessions.require(plan.decoder_graphs)  # report a damaged decoder before sampling, not after
        conditioning = self.encode(plan)
        before = record_event()
        latents, events = self._denoise(plan, conditioning, callback)
        after = events[-1] if events else record_event()
        images = self.decode(plan, latents)
        decoded, seconds = record_event(), self.backend.seconds
        timings = Timings(
            text_encoder=seconds(*conditioning.events[:2]),
            context=seconds(*conditioning.events[1:]),
            denoise=tuple(seconds(*pair) for pair in pairwise([before, *events])),
            denoise_loop=seconds(before, after),
            vae_decoder=seconds(after, decoded),
            total=perf_counter() - started,
        )
        return SanaResult(images, plan.seeds, plan.output_height, plan.output_width, timings)

    def _denoise(
        self, plan: Plan, conditioning: Conditioning, callback: StepCallback | None
    ) -> tuple[DeviceTensor | Array, list[Any]]:
        """The latents after the last step, and an event after each step if they ran one by one."""
        events: list[Any] = []
        with self._loop(plan, conditioning) as (loop, version):
            if callback is None and isinstance(loop, CapturedLoop):
                loop.run(0, len(plan.schedule.timesteps))
            else:
                for step in self._run_steps(plan, loop, version):
                    if callback is not None:
                        self._call_back(callback, step)
                    events.append(self.backend.record_event())
            return loop.result(), events

    def plan(self, request: Request) -> Plan:
        """Check a request and compute everything that follows from it.

        Raises UsageError if the checkpoint cannot meet the request or no engine supports its shapes, and ArtifactError if the
        bundle lacks a graph for it.
        """
        with self._using():
            plan = make_plan(request, self.bundle, self.manifest)
            self.backend.check_supported((*SAMPLING_GRAPHS, *plan.decoder_graphs), request_axes(plan, self.manifest))
            return plan

    def tokenize(self, plan: Plan) -> list[list[PromptTokens]]:
        """The tokens of the plan's prompts, for each guidance branch."""
        return self.text.tokenize_plan(plan.texts, plan.max_sequence_length)

    def embed(self, plan: Plan) -> PromptEmbeddings:
        """Run the text encoder on the plan's prompts, each once, whatever `num_images_per_prompt` is."""
        with self._using():
            self.sessions.require(TEXT_STAGE)
            return self.text.encode(self.tokenize(plan), self._run_text_encoder, self.backend.text_multiple)

    def encode(self, plan: Plan) -> Conditioning:
        """Run the text encoder and the context graph on the plan's prompts."""
        with self._using():
            start = self.backend.record_event()
            embeddings = self.embed(plan).repeated(plan.images_per_prompt)
            embeddings = embeddings.padded(self.backend.text_multiple, plan.max_sequence_length)
            gathered = self.backend.gather(embeddings)
            encoded = self.backend.record_event()
            context = self.sessions["context"].run({"prompt_embeds": gathered})["context"]
            mask = self.backend.to_device(embeddings.context_mask)
            events = (start, encoded, self.backend.record_event())
            return Conditioning(context, mask, embeddings.shape[:3], events)

    def steps(self, plan: Plan, conditioning: Conditioning) -> Generator[Step, None, None]:
        """The sampling loop: one `Step` after each step. The last one's latents are the result.

        Every run draws the same noise, from the plan's seeds. Close the iterator (`contextlib.closing`) to stop early.

        Raises UsageError if `conditioning` has another number of guidance branches or images, if latents of another shape were
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
            self.sessions.require(DENOISING_STAGE)
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
                self.sessions.require(DENOISING_STAGE)  # another call may have dropped them since the last step
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
        with self._using():
            check_latents_shape(latents, plan)
            if plan.output_type == "latent":
                return np.array(self._finite_latents(latents))
            self.sessions.require((*plan.decoder_graphs, "postprocess"))
            image = decode_latents(plan, latents, self.backend, self.sessions)
            self._finite_latents(latents)
            return finish_images(plan, image, self.backend, self.sessions)

    def decode_raw(self, plan: Plan, latents: DeviceTensor | Array) -> DeviceTensor | Float32:
        """The decoder's output for latents [B, C, h, w]: float32 [B, 3, H, W] in about [-1, 1], not resized and not checked."""
        with self._using():
            check_latents_shape(latents, plan)
            self.sessions.require(plan.decoder_graphs)
            return decode_latents(plan, latents, self.backend, self.sessions)

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

    def load_lora(self, path: str | Path, scale: float = 1.0) -> None:
        """Add `scale` times the LoRA in the file or folder `path` to the weights, on top of those already loaded (docs/lora.md).

        A `Conditioning` that was encoded before keeps the old weights. Raises UsageError if there is no LoRA at `path`,
        ArtifactError if it does not fit the checkpoint or the engines cannot change their weights, and DependencyError if the
        backend cannot or memory runs out. The weights are unchanged then.
        """
        with self._using():
            self._drop_loops()
            self._loras.add(Lora(Path(path), scale), self.sessions)

    def unload_lora(self) -> None:
        """Remove all LoRAs. The weights are the bundle's own again, bit for bit."""
        with self._using():
            self._drop_loops()
            self._loras.clear(self.sessions)

    def _drop_loops(self) -> None:
        """Drop the captured loops before weights change: they may read the old ones."""
        self.backend.wait()
        self._loops.clear()

    def _run_text_encoder(self, inputs_embeds: Float32, prefix: Float32) -> DeviceTensor:
        """Run the text encoder. Each prefix of the instruction's keys and values is uploaded once; its length identifies it."""
        shared = prefix.shape[3]
        if shared not in self._prefixes:
            while len(self._prefixes) >= KEPT_PREFIXES:
                del self._prefixes[next(iter(self._prefixes))]
            self._prefixes[shared] = self.backend.to_device(prefix)
        feeds = {"inputs_embeds": inputs_embeds, "prefix": self._prefixes[shared]}
        return self.sessions["text_encoder"].run(feeds)["prompt_embeds"]

    def _call_back(self, callback: StepCallback, step: Step) -> None:
        """Pass a copy of the latents to the callback, and assign the ones that it returns to the step."""
        returned = callback(self, step.index, step.timestep, {"latents": self.to_host(step.latents)})
        if returned is None:
            return
        if not isinstance(returned, Mapping) or (unknown := set(returned) - {"latents"}):
            found = type(returned).__name__ if not isinstance(returned, Mapping) else ", ".join(map(str, unknown))
            raise UsageError("callback_on_step_end returned an unknown value", found=found, wanted='None or {"latents": array}')
        if "latents" in returned:
            step.latents = returned["latents"]

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
