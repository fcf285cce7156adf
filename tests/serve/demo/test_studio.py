"""What a studio draws is what the runtime draws, and it draws one image at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sana_export.adapters import Lora
from sana_export.errors import Cancelled, UsageError
from sana_export.runtime import Request, SanaRuntime
from sana_export.serve.demo.settings import DemoLimits, DemoSettings
from sana_export.serve.demo.studio import Painting, Preview, Studio, Waiting, Wish, named_loras
from tests.support.lora_files import diffusers_lora, load_transformer
from tests.support.serving import wait_for

WISH = Wish("a red circle", width=256, height=256, steps=3, guidance_scale=4.5, seed=7)
LIMITS = DemoLimits(prompt_characters=12, steps=4, waiting=1)
SIZE = {"height": 256, "width": 256}


class Echo:
    """In place of eager diffusers: draws the seed."""

    def __init__(self) -> None:
        self.asked: list[tuple[Request, int, Sequence[Lora]]] = []

    def draw(self, request: Request, seed: int, loras: Sequence[Lora], cancelled: Any) -> Painting:
        from PIL import Image

        self.asked.append((request, seed, loras))
        return Painting(Image.new("RGB", (8, 8)), "echo", seed, {"all": 2.0}, {}, reference=True)


@pytest.fixture(scope="module")
def lora(tiny_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Lora:
    return Lora(diffusers_lora(load_transformer(tiny_checkpoint), tmp_path_factory.mktemp("style")), 2.0)


@pytest.fixture(scope="module")
def studio(tiny_bundle: Path, lora: Lora) -> Iterator[Studio]:
    made = Studio(DemoSettings(tiny_bundle, loras=(lora,), backend="onnxruntime", threads=1, limits=LIMITS), Echo())
    yield made
    made.close()


def drawn(studio: Studio, wish: Wish) -> list[Preview | Painting]:
    shown: list[Preview | Painting] = []
    studio.draw(wish, shown.append, lambda: False)
    return shown


def pixels(picture: Preview | Painting) -> np.ndarray:
    return np.asarray(picture.image, np.int16)


def test_previews_come_first_and_the_image_is_the_runtimes(studio: Studio, tiny_runtime: SanaRuntime) -> None:
    *previews, painting = drawn(studio, WISH)
    assert [(preview.step, preview.steps) for preview in previews] == [(1, 3), (2, 3)]  # type: ignore[union-attr]
    assert isinstance(painting, Painting)
    wanted = tiny_runtime(WISH.prompt, num_inference_steps=3, guidance_scale=4.5, seed=7, **SIZE)
    assert np.abs(pixels(painting) - np.asarray(wanted.images[0], np.int16)).max() <= 1
    assert painting.seed == 7
    assert painting.title == "onnxruntime on cpu"
    assert list(painting.seconds) == ["text encoder", "context", "3 steps", "previews", "decoder", "other"]
    assert all(value >= 0 for value in painting.seconds.values())
    assert painting.metadata == wanted.metadata[0]


def test_every_word_of_a_wish_reaches_the_request() -> None:
    wish = replace(WISH, negative_prompt="blue", pag_scale=2.0, width=128)
    request = wish.request(9)
    found = (request.prompt, request.negative_prompt, request.pag_scale, request.width, request.height, request.seed)
    assert found == ("a red circle", "blue", 2.0, 128, 256, 9)
    assert (request.num_inference_steps, request.guidance_scale) == (3, 4.5)


def test_without_a_seed_each_image_has_its_own(studio: Studio) -> None:
    seeds = {drawn(studio, replace(WISH, seed=None, steps=1))[-1].seed for _ in range(2)}  # type: ignore[union-attr]
    assert len(seeds) == 2


def test_a_lora_is_loaded_when_it_is_chosen_and_unloaded_when_it_is_not(studio: Studio, tiny_bundle: Path, lora: Lora) -> None:
    (name,) = studio.loras
    plain, styled, again = (drawn(studio, replace(WISH, loras=chosen))[-1] for chosen in ((), (name,), ()))
    with SanaRuntime.from_pretrained(tiny_bundle, backend="onnxruntime", threads=1) as runtime:
        runtime.load_lora(lora.path, lora.scales)
        wanted = runtime(WISH.prompt, num_inference_steps=3, guidance_scale=4.5, seed=7, **SIZE).images[0]
    assert np.abs(pixels(styled) - np.asarray(wanted, np.int16)).max() <= 1
    assert np.abs(pixels(styled) - pixels(plain)).max() > 8
    assert np.array_equal(pixels(again), pixels(plain))


def test_another_backend_replaces_the_runtime(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, closed = [], []
    load, close = SanaRuntime.from_pretrained, SanaRuntime.close
    monkeypatch.setattr(SanaRuntime, "close", lambda runtime: (closed.append(runtime.backend.name), close(runtime)))

    def counted(bundle: Path, **options: Any) -> SanaRuntime:
        opened.append((options["backend"], len(closed)))
        return load(bundle, **options)

    monkeypatch.setattr(SanaRuntime, "from_pretrained", counted)
    first = drawn(studio, WISH)[-1]
    second = drawn(studio, replace(WISH, backend="torch"))[-1]
    drawn(studio, WISH)
    assert opened == [("torch", 1), ("onnxruntime", 2)]
    assert closed == ["onnxruntime", "torch"]
    assert second.title == "torch on cpu"  # type: ignore[union-attr]
    difference = np.abs(pixels(second) - pixels(first))
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.999


def test_the_reference_draws_after_the_runtime_with_the_same_seed_and_loras(studio: Studio) -> None:
    (name,) = studio.loras
    *_, own, other = drawn(studio, replace(WISH, seed=None, steps=1, loras=(name,), compare=True))
    assert not own.reference and other.reference  # type: ignore[union-attr]  # noqa: PT018
    request, seed, loras = studio.reference.asked[-1]  # type: ignore[union-attr]
    assert seed == own.seed == request.seed  # type: ignore[union-attr]
    assert list(loras) == [studio.loras[name]]


def test_it_stops_after_the_step_that_runs(studio: Studio) -> None:
    shown: list[Preview | Painting] = []
    with pytest.raises(Cancelled):
        studio.draw(WISH, shown.append, lambda: bool(shown))
    assert len(shown) == 1


def test_two_visitors_take_turns(studio: Studio) -> None:
    order: list[int] = []
    begun, seen = threading.Event(), list[Any]()

    def first(shown: Any) -> None:
        order.append(1)
        begun.set()
        if len(order) == 1:
            wait_for(lambda: seen == [Waiting(1)])

    def second(shown: Any) -> None:
        (seen if isinstance(shown, Waiting) else order).append(shown if isinstance(shown, Waiting) else 2)

    one = threading.Thread(target=studio.draw, args=(replace(WISH, seed=1), first, lambda: False))
    one.start()
    assert begun.wait(20)
    studio.draw(replace(WISH, seed=2), second, lambda: False)
    one.join()
    assert order == [1, 1, 1, 2, 2, 2]


def test_who_leaves_the_queue_does_not_draw_and_more_than_the_places_are_refused(studio: Studio) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def first(shown: Any) -> None:
        begun.set()
        go_on.wait(20)

    one = threading.Thread(target=studio.draw, args=(WISH, first, lambda: False))
    one.start()
    assert begun.wait(20)
    left, seen = threading.Event(), list[Any]()

    def wait_and_leave() -> None:
        with pytest.raises(Cancelled):
            studio.draw(WISH, seen.append, left.is_set)
        seen.append("left")

    two = threading.Thread(target=wait_and_leave)
    two.start()
    wait_for(lambda: seen == [Waiting(1)])
    with pytest.raises(UsageError, match="1 images wait already"):
        studio.draw(WISH, seen.append, lambda: False)
    left.set()
    two.join(5)
    assert seen == [Waiting(1), "left"]
    go_on.set()
    one.join()
    assert len(drawn(studio, WISH)) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "x" * 13}, "the prompt is too long"),
        ({"negative_prompt": "x" * 13}, "the negative prompt is too long"),
        ({"prompt": " "}, "there is no prompt"),
        ({"width": 1040}, "the width is out of range"),
        ({"height": 32}, "the height is out of range"),
        ({"steps": 5}, "the number of steps is out of range"),
        ({"loras": ("other",)}, "there is no LoRA of that name"),
        ({"backend": "tensorrt"}, "there is no backend of that name"),
        ({"backend": "torch-compile"}, "there is no backend of that name"),
    ],
)
def test_a_wish_beyond_the_limits_is_refused(studio: Studio, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        studio.draw(replace(WISH, **changes), lambda _: None, lambda: False)


def test_loras_with_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    loras = (
        Lora(tmp_path / "a" / "style.safetensors"),
        Lora(tmp_path / "b" / "style.safetensors"),
        Lora(tmp_path / "ink.safetensors"),
    )
    names = list(named_loras(loras))
    assert names == [loras[0].path.as_posix(), loras[1].path.as_posix(), "ink"]
