"""Requests that are drawn together: `SanaRuntime.generate_many` draws those of the same shape in one batch."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np

from sana_export.errors import ArtifactError, SanaExportError, UsageError
from sana_export.formats.arrays import Float32
from sana_export.numeric import shown
from sana_export.runtime.plan import Plan
from sana_export.runtime.prompt import GivenEmbeddings
from sana_export.runtime.request import Request
from sana_export.runtime.results import SanaResult

LOG = logging.getLogger(__name__)

#: Requests that are read ahead to fill a batch, for each place in it.
READ_AHEAD = 4
#: Errors that belong to one request: the others can still be drawn.
OWN_ERRORS = (UsageError, ArtifactError)

#: The fields of plans that are joined image by image. All others have to be equal: the graphs take one value for the whole batch.
JOINED = ("texts", "embeddings", "latents_shape", "latents", "seeds")
EQUAL = (
    "images_per_prompt",
    "max_sequence_length",
    "schedule",
    "scheduler",
    "branches",
    "segments",
    "guidance_weights",
    "guidance",
    "resize",
    "output_height",
    "output_width",
    "output_type",
    "decoder_tile",
)
#: With one of these, a request is drawn alone.
ALONE = ("image", "control", "draw_noise")


@dataclass(frozen=True, eq=False)
class RequestJob:
    """A request with its plan."""

    request: Request
    plan: Plan

    @property
    def images(self) -> int:
        """The number of images."""
        return self.plan.latents_shape[0]


#: Draws jobs in one batch: the result of each, or its own error.
Draw = Callable[[Sequence[RequestJob]], list[SanaResult | SanaExportError]]


def batch_key(plan: Plan) -> Hashable:
    """Equal for plans that can be drawn in one batch. None: only alone.

    Images that continue one seed's stream belong together, so they are drawn alone.
    """
    if len(plan.seeds) != plan.latents_shape[0] or any(getattr(plan, name) is not None for name in ALONE):
        return None
    instructions = tuple(instruction for _, instruction in plan.texts)
    forms = (plan.latents_shape[1:], instructions, frozenset(plan.embeddings), plan.latents is None)
    return forms, tuple(_fingerprint(getattr(plan, item.name)) for item in fields(plan) if item.name not in JOINED + ALONE)


def joined(plans: Sequence[Plan]) -> Plan:
    """The plan that draws the images of all `plans`, whose `batch_key` is the same."""
    first = plans[0]
    if len(plans) == 1:
        return first
    count = sum(plan.latents_shape[0] for plan in plans)
    given = [plan.latents for plan in plans if plan.latents is not None]
    return replace(
        first,
        texts=tuple(
            (tuple(text for plan in plans for text in plan.texts[branch][0]), instruction)
            for branch, (_, instruction) in enumerate(first.texts)
        ),
        embeddings={branch: _stacked([plan.embeddings[branch] for plan in plans]) for branch in first.embeddings},
        latents=np.concatenate(given) if given else None,
        seeds=tuple(seed for plan in plans for seed in plan.seeds),
        latents_shape=(count, *first.latents_shape[1:]),
    )


class BatchLimit:
    """How many images are drawn together: those that the user allows, or fewer if no engine takes so many."""

    def __init__(self, batch_size: int, check: Callable[[Plan], None] = lambda plan: None) -> None:
        """`check` raises UsageError for a plan that no engine takes."""
        self.batch_size, self._check = batch_size, check
        self._warned = False

    def takes(self, plan: Plan, images: int) -> bool:
        """Whether `images` images can be drawn with plans like `plan`. Logs one warning, when the engines refuse."""
        if images > self.batch_size:
            return False
        try:
            self._check(replace(plan, latents_shape=(images, *plan.latents_shape[1:])))
        except OWN_ERRORS as error:
            if not self._warned:
                LOG.warning(
                    "batch size %d: no engine takes %s, so fewer images are drawn at a time; for larger batches: %s",
                    *(self.batch_size, error.found, error.fix),
                )
            self._warned = True
            return False
        return True


def draw_in_batches(requests: Iterable[Request], plan: Callable[[Request], Plan], draw: Draw, limit: BatchLimit) -> Iterator[Any]:
    """The result of each request, in their order; in place of a result, the request's own error (`OWN_ERRORS`).

    At most `READ_AHEAD` times `limit.batch_size` requests are held at a time, with the results that wait for their turn.
    """
    source = iter(requests)
    waiting: deque[_Place] = deque()
    ended = False
    while True:
        while not ended and len(waiting) < READ_AHEAD * limit.batch_size:
            try:
                waiting.append(_place(next(source), plan))
            except StopIteration:
                ended = True
        if not waiting:
            return
        if waiting[0].outcome is None:
            batch = _choose(waiting, limit)
            # Each place is filled before the next is read, so an error leaves no place half done.
            outcomes = draw([place.job for place in batch if place.job is not None])
            for place, outcome in zip(batch, outcomes, strict=True):
                place.outcome, place.job = outcome, None
        yield waiting.popleft().outcome


@dataclass(eq=False)
class _Place:
    """A request that waits for its turn, with its outcome as soon as there is one."""

    job: RequestJob | None
    key: Hashable
    outcome: SanaResult | SanaExportError | None = None


def _place(request: Any, plan: Callable[[Request], Plan]) -> _Place:
    try:
        if not isinstance(request, Request):
            raise UsageError("generate_many takes requests", found=shown(request), wanted="Request(prompt=..., seed=...)")
        planned = plan(request)
    except OWN_ERRORS as error:
        return _Place(None, None, error)
    return _Place(RequestJob(request, planned), batch_key(planned))


def _choose(waiting: Iterable[_Place], limit: BatchLimit) -> list[_Place]:
    """The first place that has no outcome, and later ones that can be drawn with it, up to the limit of images."""
    chosen: list[_Place] = []
    images = 0
    for place in waiting:
        if place.job is None or (chosen and (place.key is None or place.key != chosen[0].key)):
            continue
        if chosen and not limit.takes(place.job.plan, images + place.job.images):
            continue
        chosen.append(place)
        images += place.job.images
        if chosen[0].key is None or images >= limit.batch_size:
            break
    return chosen


def _stacked(given: Sequence[GivenEmbeddings]) -> GivenEmbeddings:
    """Embeddings of several requests, padded to the longest. The padding is masked."""
    longest = max(values.mask.shape[1] for values in given)
    padded: list[Float32] = [np.pad(v.embeds, ((0, 0), (0, longest - v.embeds.shape[1]), (0, 0))) for v in given]
    masks: list[Float32] = [np.pad(v.mask, ((0, 0), (0, longest - v.mask.shape[1]))) for v in given]
    return GivenEmbeddings(np.concatenate(padded), np.concatenate(masks))


def _fingerprint(value: Any) -> Hashable:
    """Equal for equal values, whatever they consist of."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__, tuple(_fingerprint(getattr(value, item.name)) for item in fields(value))
    if isinstance(value, Mapping):
        return tuple((key, _fingerprint(item)) for key, item in value.items())
    if isinstance(value, tuple | list):
        return tuple(map(_fingerprint, value))
    return value if isinstance(value, Hashable) else id(value)
