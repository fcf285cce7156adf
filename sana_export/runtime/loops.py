"""The sampling loops of a runtime: which one a run takes, and those that are kept for later runs."""

from __future__ import annotations

from collections.abc import Callable

from sana_export.runtime.backends.base import Backend, CapturingBackend
from sana_export.runtime.control import residuals_shape
from sana_export.runtime.loop_buffers import LoopShape
from sana_export.runtime.plan import Plan, request_axes
from sana_export.runtime.results import Conditioning
from sana_export.runtime.sampling import CapturedLoop, SamplingLoop, WaitingLoop, enqueued
from sana_export.runtime.sessions import Sessions

#: The number of captured loops that are kept for later runs, with their buffers and graphs.
KEPT_LOOPS = 4


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
        segments=plan.segments,
        text_tokens=conditioning.shape[2],
        steps=len(plan.schedule.timesteps),
        needs_noise=plan.schedule.needs_noise,
        guided=plan.guidance is not None,
        perturbable=bool(backend.manifest.options.pag_layers),
        blended=plan.image is not None and plan.image.mask is not None,
        residuals=residuals_shape(backend.manifest, plan.latents_shape, plan.branches),
        control_context=None if conditioning.control is None else tuple(conditioning.control.context.shape),
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
        enqueued(sessions, graph).reserve(axes)
