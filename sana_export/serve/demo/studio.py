"""The loaded bundle of a demo page: draws one image at a time, with the backend and the LoRAs that a visitor chose."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

from PIL import Image

from sana_export.adapters import Lora
from sana_export.environment import installed_version
from sana_export.errors import SanaExportError, UsageError
from sana_export.manifest import Manifest
from sana_export.runtime import Request, SanaRuntime
from sana_export.runtime.backends import BACKENDS, ENGINE_BACKENDS
from sana_export.runtime.callbacks import IsCancelled
from sana_export.serve.demo.settings import DemoSettings
from sana_export.serve.demo.turns import Turns

LOG = logging.getLogger(__name__)
#: The smallest side in pixels that the page offers, and the largest that it offers for any checkpoint.
LEAST_SIDE, MOST_SIDE = 64, 4096
#: A browser's numbers are exact up to here.
MOST_SEED = 2**53 - 1
#: The distributions without which a backend does not run at all.
_NEEDS = {
    "onnxruntime-cuda-graphs": "onnxruntime-gpu",
    "onnxruntime-tensorrt-rtx": "onnxruntime-ep-nv-tensorrt-rtx",
    "torch": "torch",
}
#: Not offered: a visitor would wait for minutes until it is compiled.
_SLOW_START = ("torch-compile",)


@dataclass(frozen=True)
class Wish:
    """What a visitor asks for."""

    prompt: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    negative_prompt: str = ""
    pag_scale: float = 0.0
    #: None draws one.
    seed: int | None = None
    #: Names of LoRAs (`Studio.loras`).
    loras: tuple[str, ...] = ()
    #: Name of a backend. None: the one that the page starts with.
    backend: str | None = None
    #: Draw it with the reference too.
    compare: bool = False

    def request(self, seed: int) -> Request:
        """The runtime's request. Raises UsageError for values that no checkpoint takes."""
        return Request(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            height=self.height,
            width=self.width,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            pag_scale=self.pag_scale,
            seed=seed,
        )


@dataclass(frozen=True, eq=False)
class Preview:
    """The image that the model predicts after a step."""

    image: Image.Image
    step: int
    steps: int


@dataclass(frozen=True, eq=False)
class Painting:
    """A finished image."""

    image: Image.Image
    #: What drew it.
    title: str
    seed: int
    #: Seconds of each stage, in their order. Their sum is the time of the whole call.
    seconds: Mapping[str, float]
    #: How it was drawn, for its file. Empty for the reference's.
    metadata: Mapping[str, Any]
    #: Whether the reference drew it.
    reference: bool = False


@dataclass(frozen=True)
class Waiting:
    """Other visitors draw first."""

    #: How many.
    before: int


#: What there is to show while an image is drawn.
Shown = Waiting | Preview | Painting
OnShown = Callable[[Shown], None]


class OtherPipeline(Protocol):
    """Another pipeline of the same checkpoint, such as eager diffusers."""

    def draw(self, request: Request, seed: int, loras: Sequence[Lora], cancelled: IsCancelled) -> Painting:
        """Draw one image. Raises Cancelled, at the next step, when `cancelled` returns True."""
        ...


class Studio:
    """Holds at most one runtime. `draw` may be called from several threads: they take turns."""

    def __init__(self, settings: DemoSettings, reference: OtherPipeline | None = None) -> None:
        self.settings, self.reference = settings, reference
        self.manifest = Manifest.load(settings.bundle)
        #: The LoRAs by the names that a visitor sees.
        self.loras = named_loras(settings.loras)
        self._turns, self._lock = Turns(settings.limits.waiting), threading.Lock()
        self._runtime: SanaRuntime | None = None
        self._loaded: tuple[str, ...] = ()
        self._asked: str = settings.backend
        with self._lock:
            #: What the page starts with: the backend and its device.
            self.backend, self.device = self._start()

    def _start(self) -> tuple[str, str]:
        runtime = self._with(self.settings.backend, ())
        return runtime.backend.name, runtime.backend.device

    @property
    def backends(self) -> list[str]:
        """The backends that a visitor may choose."""
        built = {engine.backend for engine in self.manifest.engines}
        usable = [
            name
            for name in BACKENDS
            if name not in _SLOW_START
            and (name in built or name not in ENGINE_BACKENDS)
            and (name not in _NEEDS or installed_version(_NEEDS[name]) is not None)
        ]
        return list(dict.fromkeys([self.backend, *usable]))

    @property
    def sides(self) -> tuple[int, int]:
        """The least and the largest side of an image in pixels."""
        most = int(self.manifest.model.native_size * self.settings.limits.native_sizes)
        return min(LEAST_SIDE, self.manifest.model.native_size), max(min(most, MOST_SIDE), self.manifest.model.native_size)

    def draw(self, wish: Wish, show: OnShown, cancelled: IsCancelled) -> None:
        """Draw what a visitor asks for, and `show` it as it comes: places in the queue, previews, the image, the reference's image.

        Raises UsageError for a wish beyond the limits or that the checkpoint or its engines cannot meet, or if too many wait, the
        errors of loading a backend or a LoRA, and Cancelled.
        """
        self._check(wish)
        seed = secrets.randbelow(2**32) if wish.seed is None else wish.seed
        request = wish.request(seed)
        chosen = [self.loras[name] for name in wish.loras]
        with self._turns.take(cancelled, lambda before: show(Waiting(before))), self._lock:
            runtime = self._with(wish.backend or self.backend, wish.loras)
            show(_draw(runtime, request, show, cancelled))
            if wish.compare and self.reference is not None:
                show(self.reference.draw(request, seed, chosen, cancelled))

    def close(self) -> None:
        """Release the runtime's memory."""
        with self._lock:
            self._drop()

    def _with(self, backend: str, loras: tuple[str, ...]) -> SanaRuntime:
        """The runtime with this backend and these LoRAs. A change of the backend closes the old one first: two may not fit."""
        if self._runtime is None or backend not in (self._asked, self._runtime.backend.name):
            self._drop()
            settings = self.settings
            self._runtime = SanaRuntime.from_pretrained(
                settings.bundle,
                backend=backend,
                memory=settings.memory,
                device=settings.device,
                threads=settings.threads,
                prompt_cache_bytes=0,  # the page shows what each stage takes; the reference keeps no prompts either
            )
            self._asked, self._loaded = backend, ()
        if loras != self._loaded:
            self._runtime.unload_lora()
            self._loaded = ()
            for name in loras:
                self._runtime.load_lora(self.loras[name].path, self.loras[name].scales)
                self._loaded = (*self._loaded, name)
        return self._runtime

    def _drop(self) -> None:
        runtime, self._runtime, self._loaded = self._runtime, None, ()
        if runtime is not None:
            with suppress(SanaExportError):
                runtime.close()

    def _check(self, wish: Wish) -> None:
        """Raise UsageError for a wish beyond the limits of the page. Browsers cannot send one; other clients can."""
        limits, (least, most) = self.settings.limits, self.sides
        for name, found, wanted in (
            ("the prompt is too long", len(wish.prompt), range(limits.prompt_characters + 1)),
            ("the negative prompt is too long", len(wish.negative_prompt), range(limits.prompt_characters + 1)),
            ("the width is out of range", wish.width, range(least, most + 1)),
            ("the height is out of range", wish.height, range(least, most + 1)),
            ("the number of steps is out of range", wish.steps, range(1, limits.steps + 1)),
        ):
            if found not in wanted:
                raise UsageError(name, found=found, wanted=f"{wanted.start} to {wanted.stop - 1}")
        if not wish.prompt.strip():
            raise UsageError("there is no prompt", found="nothing", wanted="a description of the image")
        for kind, names, known in (("LoRA", wish.loras, self.loras), ("backend", [wish.backend or self.backend], self.backends)):
            if unknown := [name for name in names if name not in known]:
                raise UsageError(f"there is no {kind} of that name", found=unknown[0], wanted=", ".join(known) or "none")


def _draw(runtime: SanaRuntime, request: Request, show: OnShown, cancelled: IsCancelled) -> Painting:
    plan = runtime.plan(request)
    steps, showing = len(plan.schedule.timesteps), 0.0

    def on_step(runtime: SanaRuntime, index: int, timestep: float, tensors: object) -> None:
        nonlocal showing
        started = perf_counter()
        if index + 1 < steps:
            show(Preview(runtime.preview()[0], index + 1, steps))
        showing += perf_counter() - started

    result = runtime.draw(request, plan, callback_on_step_end=on_step, cancelled=cancelled)
    times = result.timings
    seconds = {
        "text encoder": times.text_encoder,
        "context": times.context,
        f"{steps} steps": max(times.denoise_loop - showing, 0.0),
        "previews": showing,
        "decoder": times.vae_decoder,
    }
    seconds["other"] = max(times.total - sum(seconds.values()), 0.0)
    title = f"{runtime.backend.name} on {runtime.backend.device}"
    return Painting(result.images[0], title, result.seeds[0], seconds, result.metadata[0])


def named_loras(loras: Sequence[Lora]) -> dict[str, Lora]:
    """The LoRAs by the names of their files, with their folders if two have the same name."""
    names = [lora.path.stem for lora in loras]
    return {name if names.count(name) == 1 else lora.path.as_posix(): lora for name, lora in zip(names, loras, strict=True)}
