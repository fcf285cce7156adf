"""The sampling loop: the denoiser and then the sampler, once for each step.

There are two loops with one interface. `WaitingLoop` is for a backend whose sessions finish before they return. `CapturedLoop` is
for a backend that enqueues its work: everything that changes from step to step (timestep, coefficients, guidance weights, fresh
noise) is in tables on the device, and the latents alternate between two buffers. So a step is the same work at the same addresses
in every run, and any sequence of steps can be captured as one CUDA graph and replayed for another prompt, seed or guidance scale of
the same shapes.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from sana_export.contract import COEFFICIENTS
from sana_export.errors import SanaExportError, UsageError
from sana_export.formats.arrays import Array, Float32
from sana_export.runtime.backends.base import Backend, CapturingBackend, DeviceTensor, EnqueuedSession, Replay
from sana_export.runtime.noise import TorchGenerator, randn_batch
from sana_export.runtime.request import Plan, request_axes
from sana_export.runtime.results import Conditioning
from sana_export.runtime.sessions import Sessions

LOG = logging.getLogger(__name__)

#: The number of captured loops that are kept for later runs, with their buffers and graphs.
KEPT_LOOPS = 4


@dataclass(frozen=True)
class LoopShape:
    """Everything that the buffers and the captured steps of a loop depend on."""

    #: [B, C, h, w].
    latents: tuple[int, int, int, int]
    #: Shape of the context tensor (contract.CONTEXT).
    context: tuple[int, ...]
    #: K, the number of guidance branches.
    branches: int
    #: L, the number of text tokens in the context.
    text_tokens: int
    #: N, the number of steps.
    steps: int
    #: Whether the schedule adds fresh noise in every step.
    needs_noise: bool
    #: Whether the guidance scale is an input of the denoiser.
    guided: bool


@dataclass(frozen=True, eq=False)
class LoopInputs:
    """The inputs of one run."""

    #: float32 [B, C, h, w], scaled as the schedule requires.
    latents: Float32
    #: The fresh noise of each step, float32 [B, C, h, w].
    noise: Iterator[Float32]
    #: float32 [N], scaled for the denoiser.
    timesteps: Float32
    #: float32 [N, 6], with the columns contract.COEFFICIENTS.
    coefficients: Float32
    #: float32 [N, K].
    guidance_weights: Float32
    #: The denoiser's inputs that are the same in every step, by name.
    fixed: Mapping[str, DeviceTensor]


def check_conditioning(plan: Plan, conditioning: Conditioning) -> None:
    """Raise UsageError unless `conditioning` has the number of guidance branches and images of `plan`."""
    wanted, found = (len(plan.perturbed), plan.latents_shape[0]), conditioning.shape[:2]
    if found != wanted:
        raise UsageError(
            "the conditioning belongs to another plan",
            found="{} guidance branches of {} images".format(*found),
            wanted="{} guidance branches of {} images".format(*wanted),
            fix="runtime.steps(plan, runtime.encode(plan))",
        )


def loop_inputs(plan: Plan, conditioning: Conditioning, backend: Backend, timestep_scale: float) -> LoopInputs:
    """The inputs that sample `plan`. Every call draws the same noise, in torch's order."""
    generators = [TorchGenerator(seed) for seed in plan.seeds]
    start = randn_batch(plan.latents_shape, generators) if plan.latents is None else plan.latents
    fixed = {
        "context": conditioning.context,
        "context_mask": conditioning.context_mask,
        "perturbed": backend.to_device(plan.perturbed),
    }
    if plan.guidance is not None:
        fixed["guidance"] = backend.to_device(plan.guidance)
    return LoopInputs(
        latents=start * np.float32(plan.schedule.initial_noise_scale),
        noise=(randn_batch(plan.latents_shape, generators) for _ in plan.schedule.timesteps),
        timesteps=plan.schedule.timesteps * np.float32(timestep_scale),
        coefficients=plan.schedule.coefficients,
        guidance_weights=plan.guidance_weights,
        fixed=fixed,
    )


def sampler_feeds(
    noise_pred: DeviceTensor | Array,
    latents: DeviceTensor | Array,
    previous_x0: DeviceTensor | Array,
    noise: DeviceTensor | Array,
    coefficients: DeviceTensor | Array,
    guidance_weights: DeviceTensor | Array,
) -> dict[str, DeviceTensor | Array]:
    """The inputs of the graph `sampler` for one step, by name (contract.py has the shapes).

    `coefficients` is a row of the schedule's table, `guidance_weights` a row of the plan's.
    """
    return {
        "noise_pred": noise_pred,
        "latents": latents,
        "previous_x0": previous_x0,
        "noise": noise,
        "coefficients": coefficients,
        "weights": guidance_weights,
    }


class SamplingLoop(ABC):
    """Runs the steps of one run after another: `start`, then `run` for every step once, in order."""

    @abstractmethod
    def start(self, inputs: LoopInputs) -> None:
        """Begin a run with these inputs."""

    @abstractmethod
    def run(self, first: int, stop: int) -> None:
        """Run the steps from `first` up to but not including `stop`."""

    @abstractmethod
    def state(self, step: int) -> tuple[DeviceTensor, DeviceTensor]:
        """The latents and x0 [B, C, h, w] after `step`, in tensors that no later step changes."""

    @abstractmethod
    def result(self) -> DeviceTensor:
        """The latents [B, C, h, w] after the last step. The tensor is valid until the next `start`."""

    @abstractmethod
    def replace(self, step: int, latents: DeviceTensor | Array) -> None:
        """Continue after `step` with these latents [B, C, h, w]."""


class WaitingLoop(SamplingLoop):
    """The loop of a backend whose sessions finish before they return."""

    def __init__(self, backend: Backend, sessions: Sessions, plan: Plan) -> None:
        self._backend, self._sessions, self._needs_noise = backend, sessions, plan.schedule.needs_noise

    def start(self, inputs: LoopInputs) -> None:
        self._inputs = inputs
        self._latents = self._backend.to_device(inputs.latents)
        self._x0 = self._noise = self._backend.to_device(np.zeros_like(inputs.latents))

    def run(self, first: int, stop: int) -> None:
        inputs = self._inputs
        for index in range(first, stop):
            if self._needs_noise:
                self._noise = self._backend.to_device(next(inputs.noise))
            timestep = inputs.timesteps[index : index + 1]
            denoised = self._sessions["denoiser"].run({"latents": self._latents, "timestep": timestep, **inputs.fixed})
            noise_pred = denoised["noise_pred"]
            weights = inputs.guidance_weights[index]
            feeds = sampler_feeds(noise_pred, self._latents, self._x0, self._noise, inputs.coefficients[index], weights)
            sampled = self._sessions["sampler"].run(feeds)
            self._latents, self._x0 = sampled["next_latents"], sampled["x0"]

    def state(self, step: int) -> tuple[DeviceTensor, DeviceTensor]:
        return self._latents, self._x0

    def result(self) -> DeviceTensor:
        return self._latents

    def replace(self, step: int, latents: DeviceTensor | Array) -> None:
        self._latents = latents


class CapturedLoop(SamplingLoop):
    """The loop of a backend that enqueues its work: fixed buffers on the device, steps that are captured once and then replayed.

    With `capture` False every step is enqueued again.
    """

    def __init__(
        self,
        backend: CapturingBackend,
        sessions: Sessions,
        shape: LoopShape,
        context_dtype: str,
        *,
        capture: bool,
    ) -> None:
        self.shape = shape
        self._backend, self._sessions, self._capture = backend, sessions, capture
        #: The loop's own sessions, by graph, if it captures.
        self._separate: dict[str, EnqueuedSession] = {}
        batch, latents, rows = shape.latents[0], shape.latents, shape.steps
        zeros, table = backend.zeros, backend.table
        self._latents = [zeros(latents, "float32") for _ in range(2)]
        self._x0 = [zeros(latents, "float32") for _ in range(2)]
        self._noise_pred = zeros((shape.branches, *latents), "float32")
        self._timesteps = table(rows, (1,), "float32")
        self._coefficients = table(rows, (len(COEFFICIENTS),), "float32")
        self._guidance_weights = table(rows, (shape.branches,), "float32")
        self._noise = table(rows if shape.needs_noise else 1, latents, "float32")
        self._fixed = {
            "context": zeros(shape.context, context_dtype),
            "context_mask": zeros((shape.branches, batch, shape.text_tokens), "float32"),
            "perturbed": zeros((shape.branches,), "float32"),
            **({"guidance": zeros((1,), "float32")} if shape.guided else {}),
        }
        #: By first step and stop: the backend's generation at the capture, and the captured work.
        self._replays: dict[tuple[int, int], tuple[int, Replay]] = {}

    def start(self, inputs: LoopInputs) -> None:
        write, write_table = self._backend.write, self._backend.write_table
        write(self._latents[0], inputs.latents)
        write(self._x0[0], np.zeros_like(inputs.latents))
        write_table(self._timesteps, inputs.timesteps.reshape(-1, 1))
        write_table(self._coefficients, inputs.coefficients)
        write_table(self._guidance_weights, inputs.guidance_weights)
        noise = np.stack([*inputs.noise]) if self.shape.needs_noise else np.zeros((1, *self.shape.latents), np.float32)
        write_table(self._noise, noise)
        for name, target in self._fixed.items():
            write(target, inputs.fixed[name])

    def run(self, first: int, stop: int) -> None:
        replay = self._captured(first, stop) if self._capture else None
        if replay is None:
            self._enqueue(first, stop)
        else:
            replay()

    def state(self, step: int) -> tuple[DeviceTensor, DeviceTensor]:
        after = (step + 1) % 2
        return self._backend.copy(self._latents[after]), self._backend.copy(self._x0[after])

    def result(self) -> DeviceTensor:
        return self._latents[self.shape.steps % 2]

    def replace(self, step: int, latents: DeviceTensor | Array) -> None:
        self._backend.write(self._latents[(step + 1) % 2], latents)

    def finish(self) -> None:
        """Wait for the loop's work, so that it may be dropped: its sessions must not end before."""
        self._backend.wait()

    def _captured(self, first: int, stop: int) -> Replay | None:
        """The steps as captured work, or None if they cannot be captured.

        They are captured if they were not before, or if memory that they use has moved since.
        """
        generation, replay = self._replays.get((first, stop), (None, None))
        if replay is not None and generation == self._backend.generation:
            return replay
        # A session sets up a new shape in its first run, which must not happen during a capture. The replay runs this step again
        # from the same state: a step does not write what it reads.
        self._enqueue(first, first + 1)
        if not (self._session("denoiser").capturable and self._session("sampler").capturable):
            self._stop_capturing("an engine cannot be captured")
            return None
        generation = self._backend.generation
        try:
            replay = self._backend.capture(lambda: self._enqueue(first, stop))
        except Exception as error:  # any: if it has nothing to do with the capture, the steps will raise it again
            self._stop_capturing(str(error) if isinstance(error, SanaExportError) else repr(error))
            return None
        self._replays[first, stop] = generation, replay
        return replay

    def _stop_capturing(self, why: str) -> None:
        LOG.warning("the steps cannot be captured as a CUDA graph, so they are enqueued one by one: %s", why)
        self._capture = False

    def _session(self, graph: str) -> EnqueuedSession:
        """A session of `graph`: the loop's own one if steps are captured, so that no other run changes what they use.

        If not, it is looked up for each use: a staged runtime drops sessions, and a loop must not keep them alive.
        """
        if graph in self._separate:
            return self._separate[graph]
        session = _enqueued(self._sessions, graph)
        return self._separate.setdefault(graph, session.separate()) if self._capture else session

    def _enqueue(self, first: int, stop: int) -> None:
        denoiser, sampler = self._session("denoiser"), self._session("sampler")
        for index in range(first, stop):
            now, after = index % 2, (index + 1) % 2
            latents = self._latents[now]
            denoiser.run({"latents": latents, "timestep": self._timesteps[index], **self._fixed}, {"noise_pred": self._noise_pred})
            noise = self._noise[index if self.shape.needs_noise else 0]
            coefficients, weights = self._coefficients[index], self._guidance_weights[index]
            sampler.run(
                sampler_feeds(self._noise_pred, latents, self._x0[now], noise, coefficients, weights),
                {"next_latents": self._latents[after], "x0": self._x0[after]},
            )


class LoopCache:
    """The captured loops of one runtime that no run is using, one for each shape. A run owns its loop, so runs may overlap."""

    def __init__(self) -> None:
        self._kept: dict[LoopShape, CapturedLoop] = {}

    def take(self, shape: LoopShape, make: Callable[[], CapturedLoop]) -> CapturedLoop:
        """A loop of `shape`, which belongs to the caller until it is given back."""
        return self._kept.pop(shape, None) or make()

    def give_back(self, loop: CapturedLoop) -> None:
        """Keep `loop` for the next run of its shape. Beyond `KEPT_LOOPS` the least recently used loop is dropped."""
        self._drop(loop.shape)  # another run of this shape may have been faster
        self._kept[loop.shape] = loop
        while len(self._kept) > KEPT_LOOPS:
            self._drop(next(iter(self._kept)))

    def clear(self) -> None:
        """Drop all loops. Their work is done."""
        self._kept.clear()

    def _drop(self, shape: LoopShape) -> None:
        if (loop := self._kept.pop(shape, None)) is not None:
            loop.finish()


def take_loop(plan: Plan, conditioning: Conditioning, backend: Backend, sessions: Sessions, cache: LoopCache) -> SamplingLoop:
    """A loop for `plan`, from `cache` if it is captured."""
    if not isinstance(backend, CapturingBackend):
        return WaitingLoop(backend, sessions, plan)
    context = conditioning.context
    shape = LoopShape(
        latents=plan.latents_shape,
        context=tuple(context.shape),
        branches=len(plan.perturbed),
        text_tokens=conditioning.shape[2],
        steps=len(plan.schedule.timesteps),
        needs_noise=plan.schedule.needs_noise,
        guided=plan.guidance is not None,
    )
    if sessions.staged:  # sessions that are loaded for one image are not worth capturing
        return CapturedLoop(backend, sessions, shape, context.dtype, capture=False)
    if plan.output_type != "latent":
        _reserve_for_decoding(plan, backend, sessions)
    return cache.take(shape, lambda: CapturedLoop(backend, sessions, shape, context.dtype, capture=True))


def _reserve_for_decoding(plan: Plan, backend: CapturingBackend, sessions: Sessions) -> None:
    """Reserve the decoder's memory before the loop is captured, which would have to be captured again afterwards."""
    axes = request_axes(plan.one_image, backend.manifest)
    for graph in (*plan.decoder_graphs, "postprocess"):
        _enqueued(sessions, graph).reserve(axes)


def _enqueued(sessions: Sessions, graph: str) -> EnqueuedSession:
    session = sessions[graph]
    assert isinstance(session, EnqueuedSession)  # a CapturingBackend loads no others
    return session
