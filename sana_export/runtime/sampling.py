"""The sampling loop of a backend that enqueues its work: state that stays in place on the device, steps that are captured once.

Everything that changes from step to step (timestep, coefficients, guidance weights, fresh noise) lies in tables on the device, and
the latents go to and fro between two buffers. So a step is the same work at the same addresses every time, and any run of steps
can be captured as one CUDA graph and replayed for another prompt, seed or guidance scale of the same shapes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from sana_export.runtime.backends import Array, DeviceTensor
from sana_export.runtime.request import Plan

LOG = logging.getLogger(__name__)

Float32 = npt.NDArray[np.float32]
#: Loops whose buffers and graphs are kept, the latest used last.
KEPT_LOOPS = 4
#: Enqueues captured work again.
Replay = Callable[[], None]


class EnqueuedSession(Protocol):
    """A session whose `run` returns before the work is done, and which can be told where its outputs go."""

    def run(
        self, feeds: Mapping[str, DeviceTensor | Array], outputs: Mapping[str, DeviceTensor] | None = None
    ) -> dict[str, DeviceTensor]:
        """As `Session.run`; an output that `outputs` names is written there. With all of them given nothing is allocated."""
        ...

    @property
    def capturable(self) -> bool:
        """Whether the work of the last run can be captured."""
        ...


@runtime_checkable
class Capturing(Protocol):
    """What a backend offers whose sessions are `EnqueuedSession`s: everything happens in one order, that of the calls."""

    def zeros(self, shape: Sequence[int], dtype: str) -> DeviceTensor:
        """A new tensor on the device; `dtype` as the contract names it."""
        ...

    def table(self, rows: int, shape: Sequence[int], dtype: str) -> Sequence[DeviceTensor]:
        """`rows` tensors of `shape` in one block of memory, each where a session can read it."""
        ...

    def write(self, target: DeviceTensor, value: DeviceTensor | Array) -> None:
        """Copy `value` into `target`, which has its shape and dtype."""
        ...

    def write_table(self, target: Sequence[DeviceTensor], rows: Array) -> None:
        """Copy the rows of `rows` into a `table`, in one transfer."""
        ...

    def copy(self, value: DeviceTensor) -> DeviceTensor:
        """A new tensor with the values of `value`."""
        ...

    def capture(self, work: Callable[[], None]) -> Replay:
        """What `work` enqueues, as one graph; calling it enqueues all of it again. `work` itself is not run."""
        ...

    @property
    def generation(self) -> int:
        """Changes when memory that captured work uses has moved; what was captured before must not be replayed."""
        ...


@dataclass(frozen=True)
class LoopShape:
    """What a loop's buffers and captured steps depend on: B, C, h, w of the latents, K branches, L text tokens, N steps."""

    latents: tuple[int, int, int, int]
    context: tuple[int, ...]
    branches: int
    text_tokens: int
    steps: int
    needs_noise: bool
    guided: bool


class SamplingLoop:
    """The steps of one shape on `backend`. `start` loads a request, then every step is run once, in order."""

    def __init__(
        self,
        backend: Capturing,
        denoiser: EnqueuedSession,
        sampler: EnqueuedSession,
        shape: LoopShape,
        context_dtype: str,
        *,
        capture: bool,
    ) -> None:
        self.backend, self.denoiser, self.sampler, self.shape = backend, denoiser, sampler, shape
        self._capture = capture
        batch, latents, rows = shape.latents[0], shape.latents, shape.steps
        zeros, table = backend.zeros, backend.table
        self.latents = [zeros(latents, "float32") for _ in range(2)]
        self.x0 = [zeros(latents, "float32") for _ in range(2)]
        self.noise_pred = zeros((shape.branches, *latents), "float32")
        self.timesteps = table(rows, (1,), "float32")
        self.coefficients = table(rows, (6,), "float32")
        self.weights = table(rows, (shape.branches,), "float32")
        self.noise = table(rows if shape.needs_noise else 1, latents, "float32")
        self.fixed = {
            "context": zeros(shape.context, context_dtype),
            "context_mask": zeros((shape.branches, batch, shape.text_tokens), "float32"),
            "perturbed": zeros((shape.branches,), "float32"),
            **({"guidance": zeros((1,), "float32")} if shape.guided else {}),
        }
        self._replays: dict[tuple[int, int], Replay] = {}
        self._generation = -1

    def start(
        self, plan: Plan, latents: Float32, noise: Sequence[Float32], timesteps: Float32, fixed: Mapping[str, DeviceTensor | Array]
    ) -> None:
        """Load a request. `noise`: the fresh noise of every step where the schedule needs it; `fixed`: see `self.fixed`."""
        write = self.backend.write
        write(self.latents[0], latents)
        write(self.x0[0], np.zeros_like(latents))
        write_table = self.backend.write_table
        write_table(self.timesteps, timesteps.reshape(-1, 1))
        write_table(self.coefficients, plan.schedule.coefficients)
        write_table(self.weights, plan.weights)
        write_table(self.noise, np.stack(noise) if noise else np.zeros((1, *latents.shape), dtype=np.float32))
        for name, target in self.fixed.items():
            write(target, fixed[name])

    def run(self, first: int, stop: int) -> None:
        """Enqueue the steps from `first` up to `stop`: replayed where they were captured, or captured now."""
        if not self._capture:
            self._enqueue(first, stop)
            return
        if self._generation != self.backend.generation:
            self._replays.clear()
        if (first, stop) not in self._replays and not self._prepare(first, stop):
            self._enqueue(first, stop)
            return
        self._replays[first, stop]()

    def after(self, step: int) -> tuple[DeviceTensor, DeviceTensor]:
        """The latents and x0 [B, C, h, w] after `step` (from 0), until the step after the next one."""
        return self.latents[(step + 1) % 2], self.x0[(step + 1) % 2]

    def _prepare(self, first: int, stop: int) -> bool:
        """Capture the steps; False where the sessions cannot be captured."""
        # A session settles what a new shape needs when it runs, which must not happen while it is captured. The step is run again
        # from the same state afterwards: it does not write what it reads.
        self._enqueue(first, first + 1)
        if not (self.denoiser.capturable and self.sampler.capturable):
            LOG.warning("the steps cannot be captured as a CUDA graph: they are enqueued one by one")
            self._capture = False
            return False
        self._generation = self.backend.generation
        self._replays[first, stop] = self.backend.capture(lambda: self._enqueue(first, stop))
        return True

    def _enqueue(self, first: int, stop: int) -> None:
        for index in range(first, stop):
            here, there = index % 2, (index + 1) % 2
            self.denoiser.run(
                {"latents": self.latents[here], "timestep": self.timesteps[index], **self.fixed},
                {"noise_pred": self.noise_pred},
            )
            self.sampler.run(
                {
                    "noise_pred": self.noise_pred,
                    "latents": self.latents[here],
                    "previous_x0": self.x0[here],
                    "noise": self.noise[index if self.shape.needs_noise else 0],
                    "coefficients": self.coefficients[index],
                    "weights": self.weights[index],
                },
                {"next_latents": self.latents[there], "x0": self.x0[there]},
            )


class Loops:
    """The latest used loops of one runtime, by shape."""

    def __init__(self) -> None:
        self._kept: dict[LoopShape, SamplingLoop] = {}

    def get(self, shape: LoopShape, make: Callable[[], SamplingLoop]) -> SamplingLoop:
        loop = self._kept.pop(shape, None) or make()
        self._kept[shape] = loop
        while len(self._kept) > KEPT_LOOPS:
            del self._kept[next(iter(self._kept))]
        return loop

    def clear(self) -> None:
        self._kept.clear()
