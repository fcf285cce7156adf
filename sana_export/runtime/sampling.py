"""The sampling loop: the denoiser and then the sampler, once for each step.

There are two loops with one interface. `WaitingLoop` is for a backend whose sessions finish before they return. `CapturedLoop` is
for a backend that enqueues its work: everything that changes from step to step (timestep, coefficients, guidance weights, fresh
noise) is in tables on the device, and latents and x0 rotate through a few buffers. So a step is the same work at the same addresses
in every run, and any sequence of steps can be captured as one CUDA graph and replayed for another prompt, seed or guidance scale of
the same shapes.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sana_export.contract import COEFFICIENTS, HISTORY
from sana_export.errors import SanaExportError
from sana_export.formats.arrays import Array
from sana_export.runtime.backends.base import Backend, CapturingBackend, DeviceTensor, EnqueuedSession, Replay
from sana_export.runtime.guidance import Branches, Segment, parts
from sana_export.runtime.loop_buffers import LoopShape, branch_buffers
from sana_export.runtime.loop_inputs import LoopInputs
from sana_export.runtime.memory import DENOISING_STAGE
from sana_export.runtime.plan import Plan
from sana_export.runtime.sessions import Sessions

LOG = logging.getLogger(__name__)


def sampler_feeds(
    noise_pred: DeviceTensor | Array,
    latents: DeviceTensor | Array,
    history: Sequence[DeviceTensor | Array],
    noise: DeviceTensor | Array,
    coefficients: DeviceTensor | Array,
    guidance_weights: DeviceTensor | Array,
) -> dict[str, DeviceTensor | Array]:
    """The inputs of the graph `sampler` for one step, by name (contract.py has the shapes).

    `history` is the x0 of the steps before, newest first, for contract.HISTORY. `coefficients` is a row of the schedule's table,
    `guidance_weights` a row of the plan's.
    """
    return {
        "noise_pred": noise_pred,
        "latents": latents,
        **dict(zip(HISTORY, history, strict=True)),
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
        self._branches = [part.branches for part in plan.segments for _ in range(part.first, part.stop)]

    def start(self, inputs: LoopInputs) -> None:
        self._inputs = inputs
        self._latents = self._backend.to_device(inputs.latents)
        self._noise = self._backend.to_device(np.zeros_like(inputs.latents))
        self._x0 = (self._noise,) * len(HISTORY)

    def run(self, first: int, stop: int) -> None:
        inputs = self._inputs
        for index in range(first, stop):
            if self._needs_noise:
                self._noise = self._backend.to_device(next(inputs.noise))
            branches = self._branches[index]
            step = {"latents": self._latents, "timestep": inputs.timesteps[index : index + 1]}
            residuals = {} if inputs.control is None else self._sessions["controlnet"].run({**step, **inputs.control[branches]})
            noise_pred = self._sessions["denoiser"].run({**step, **inputs.fixed[branches], **residuals})["noise_pred"]
            weights = inputs.guidance_weights[branches][index]
            feeds = sampler_feeds(noise_pred, self._latents, self._x0, self._noise, inputs.coefficients[index], weights)
            sampled = self._sessions["sampler"].run(feeds)
            self._latents, self._x0 = sampled["next_latents"], (sampled["x0"], *self._x0[:-1])
            if inputs.blending is not None:
                feeds = {"latents": self._latents, "noise_level": inputs.blending.noise_levels[index : index + 1]}
                self._latents = self._sessions["blend"].run({**feeds, **inputs.blending.fixed})["blended"]

    def state(self, step: int) -> tuple[DeviceTensor, DeviceTensor]:
        return self._latents, self._x0[0]

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
        #: The loop's own sessions, by graph and branches, if it captures.
        self._separate: dict[tuple[str, Branches], EnqueuedSession] = {}
        batch, latents, rows = shape.latents[0], shape.latents, shape.steps
        zeros, table = backend.zeros, backend.table
        self._latents = [zeros(latents, "float32") for _ in range(2)]
        #: The x0 of this step and of those before it, each for as long as it is an input.
        self._x0 = [zeros(latents, "float32") for _ in range(1 + len(HISTORY))]
        self._timesteps = table(rows, (1,), "float32")
        self._coefficients = table(rows, (len(COEFFICIENTS),), "float32")
        self._noise = table(rows if shape.needs_noise else 1, latents, "float32")
        self._branches = branch_buffers(backend, shape, context_dtype)
        self._blending: dict[str, DeviceTensor] = {}
        if shape.blended:
            self._unblended = zeros(latents, "float32")
            self._noise_levels = table(rows, (1,), "float32")
            mask = (batch, 1, *latents[2:])
            shapes = {"image_latents": latents, "noise": latents, "mask": mask}
            self._blending = {name: zeros(one, "float32") for name, one in shapes.items()}
        #: By first step and stop: the backend's generation at the capture, and the captured work.
        self._replays: dict[tuple[int, int], tuple[int, Replay]] = {}

    def start(self, inputs: LoopInputs) -> None:
        write, write_table = self._backend.write, self._backend.write_table
        write(self._latents[0], inputs.latents)
        *older, newest = self._x0[1:]  # what the first step reads
        write(newest, np.zeros_like(inputs.latents))
        for x0 in older:
            write(x0, newest)
        write_table(self._timesteps, inputs.timesteps.reshape(-1, 1))
        write_table(self._coefficients, inputs.coefficients)
        noise = np.stack([*inputs.noise]) if self.shape.needs_noise else np.zeros((1, *self.shape.latents), np.float32)
        write_table(self._noise, noise)
        for branches, buffers in self._branches.items():
            write_table(buffers.guidance_weights, inputs.guidance_weights[branches])
            for name, value in inputs.fixed[branches].items():
                write(buffers.fixed[name], value)
            if self._capture and len(self._branches) > 1:  # so that memory moves before the first capture, not between two
                for graph in self._graphs:
                    self._session(graph, branches).reserve(self.shape.axes(branches))
            for name, target in buffers.control.items():
                write(target, (inputs.control or {})[branches][name])
        if inputs.blending is not None:
            write_table(self._noise_levels, inputs.blending.noise_levels.reshape(-1, 1))
            for name, target in self._blending.items():
                write(target, inputs.blending.fixed[name])

    def run(self, first: int, stop: int) -> None:
        for part in parts(self.shape.segments, first, stop):
            replay = self._captured(part) if self._capture else None
            if replay is None:
                self._enqueue(part)
            else:
                replay()

    def state(self, step: int) -> tuple[DeviceTensor, DeviceTensor]:
        return self._backend.copy(self._latents[(step + 1) % 2]), self._backend.copy(self._x0[step % len(self._x0)])

    def result(self) -> DeviceTensor:
        return self._latents[self.shape.steps % 2]

    def replace(self, step: int, latents: DeviceTensor | Array) -> None:
        self._backend.write(self._latents[(step + 1) % 2], latents)

    def finish(self) -> None:
        """Wait for the loop's work, so that it may be dropped: its sessions must not end before."""
        self._backend.wait()

    def _captured(self, part: Segment) -> Replay | None:
        """The steps of `part` as captured work, or None if they cannot be captured.

        They are captured if they were not before, or if memory that they use has moved since.
        """
        generation, replay = self._replays.get((part.first, part.stop), (None, None))
        if replay is not None and generation == self._backend.generation:
            return replay
        # A session sets up a new shape in its first run, which must not happen during a capture. The replay runs this step again
        # from the same state: a step does not write what it reads.
        self._enqueue(replace(part, stop=part.first + 1))
        if not all(self._session(graph, part.branches).capturable for graph in self._graphs):
            self._stop_capturing("an engine cannot be captured")
            return None
        generation = self._backend.generation
        try:
            replay = self._backend.capture(lambda: self._enqueue(part))
        except Exception as error:  # any: if it has nothing to do with the capture, the steps will raise it again
            self._stop_capturing(str(error) if isinstance(error, SanaExportError) else repr(error))
            return None
        self._replays[part.first, part.stop] = generation, replay
        return replay

    @property
    def _graphs(self) -> tuple[str, ...]:
        """The graphs of a step."""
        controlled = ("controlnet",) if self.shape.controlled else ()
        return (*controlled, *DENOISING_STAGE, *(("blend",) if self.shape.blended else ()))

    def _stop_capturing(self, why: str) -> None:
        LOG.warning("the steps cannot be captured as a CUDA graph, so they are enqueued one by one: %s", why)
        self._capture = False

    def _session(self, graph: str, branches: Branches) -> EnqueuedSession:
        """A session of `graph`: the loop's own one for these branches if steps are captured, so that nothing changes what they use.

        If not, it is looked up for each use: a staged runtime drops sessions, and a loop must not keep them alive.
        """
        if (graph, branches) in self._separate:
            return self._separate[graph, branches]
        session = enqueued(self._sessions, graph)
        return self._separate.setdefault((graph, branches), session.separate()) if self._capture else session

    def _enqueue(self, part: Segment) -> None:
        denoiser, sampler = (self._session(graph, part.branches) for graph in DENOISING_STAGE)
        buffers = self._branches[part.branches]
        for index in range(part.first, part.stop):
            now, after = index % 2, (index + 1) % 2
            latents = self._latents[now]
            step = {"latents": latents, "timestep": self._timesteps[index]}
            if self.shape.controlled:
                residuals = {"residuals": buffers.fixed["residuals"]}
                self._session("controlnet", part.branches).run({**step, **buffers.control}, residuals)
            denoiser.run({**step, **buffers.fixed}, {"noise_pred": buffers.noise_pred})
            noise = self._noise[index if self.shape.needs_noise else 0]
            coefficients, weights = self._coefficients[index], buffers.guidance_weights[index]
            history = [self._x0[(index - back) % len(self._x0)] for back in range(1, len(self._x0))]
            sampled = self._unblended if self.shape.blended else self._latents[after]
            sampler.run(
                sampler_feeds(buffers.noise_pred, latents, history, noise, coefficients, weights),
                {"next_latents": sampled, "x0": self._x0[index % len(self._x0)]},
            )
            if self.shape.blended:
                feeds = {"latents": sampled, "noise_level": self._noise_levels[index], **self._blending}
                self._session("blend", part.branches).run(feeds, {"blended": self._latents[after]})


def enqueued(sessions: Sessions, graph: str) -> EnqueuedSession:
    """The session of `graph` of a `CapturingBackend`, which loads no others."""
    session = sessions[graph]
    assert isinstance(session, EnqueuedSession)
    return session
