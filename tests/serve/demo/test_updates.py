"""What a visitor sees while an image is drawn, and when something goes wrong."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from sana_export.errors import ArtifactError, Cancelled, UsageError
from sana_export.serve.demo.settings import DemoSettings
from sana_export.serve.demo.stream import as_they_come
from sana_export.serve.demo.studio import Painting, Preview, Waiting, Wish
from sana_export.serve.demo.updates import KEEP_SECONDS, drawing_updates, wish_of

INPUTS = {"prompt": "a cat", "width": 64, "height": 32, "steps": 2, "guidance_scale": 4.5, "seed": 3, "new_seed": False}
METADATA = {
    "request": {"prompt": "a cat"},
    "model": {"sha256": "0" * 64, "name": "tiny"},
    "loras": [],
    "sana_export": "0.1.0",
}
IMAGE = Image.new("RGB", (64, 32), (200, 10, 30))
OWN = Painting(IMAGE, "onnxruntime on cpu", 3, {"2 steps": 1.0}, METADATA)
OTHER = Painting(IMAGE, "SanaPipeline, eager on cpu", 3, {"2 steps": 2.5}, {}, reference=True)


def studio(draw: Callable[..., None], host: str = "127.0.0.1") -> Any:
    return SimpleNamespace(draw=draw, settings=DemoSettings(Path("bundle"), host=host), reference=None)


def updates(draw: Callable[..., None], files: Path, host: str = "127.0.0.1", **inputs: Any) -> list[dict[str, Any]]:
    return list(drawing_updates(studio(draw, host), {**INPUTS, **inputs}, threading.Event(), files))


def test_an_image_comes_with_previews_progress_and_times(tmp_path: Path) -> None:
    def draw(wish: Wish, show: Any, cancelled: Any) -> None:
        show(Preview(Image.new("RGB", (4, 2)), 1, 2))
        show(OWN)
        show(OTHER)

    start, preview, own, other, end = updates(draw, tmp_path, compare=True)
    assert (start["busy"], end) == (True, {"busy": False})
    assert preview["image"].size == (256, 128)
    assert preview["state"].startswith("Step 1 of 2")
    assert "width:50%" in preview["state"]
    assert (own["seed"], own["state"]) == (3, "Drawing with eager diffusers")
    with Image.open(own["image"]) as saved:
        assert saved.getpixel((5, 5)) == (200, 10, 30)
        assert "a cat" in str(saved.info)  # so that `generate --from-image` draws it again
    assert (other["state"], Path(other["reference"]).name) == ("Seed 3", "sana-3-diffusers.png")
    assert "2.5 times as fast as eager" in other["times"]


def test_the_place_in_the_queue_is_shown(tmp_path: Path) -> None:
    def draw(wish: Wish, show: Any, cancelled: Any) -> None:
        for before in (2, 1):
            show(Waiting(before))

    assert [each["state"] for each in updates(draw, tmp_path)[1:3]] == ["Waiting for 2 other images", "Waiting for 1 other image"]


def test_images_older_than_an_hour_are_deleted(tmp_path: Path) -> None:
    old, fresh = tmp_path / "sana-1.png", tmp_path / "sana-2.png"
    for path, age in ((old, KEEP_SECONDS + 60), (fresh, KEEP_SECONDS - 60)):
        path.write_bytes(b"")
        os.utime(path, (time.time() - age, time.time() - age))
    updates(lambda wish, show, cancelled: show(OWN), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"sana-2.png", "sana-3.png"}


@pytest.mark.parametrize("new_seed", [False, True])
def test_a_new_seed_replaces_the_one_in_the_field(new_seed: bool) -> None:
    wish = wish_of({**INPUTS, "new_seed": new_seed, "loras": ["ink"], "pag_scale": None})
    assert wish == Wish("a cat", 64, 32, 2, 4.5, seed=None if new_seed else 3, loras=("ink",))


@pytest.mark.parametrize(
    ("error", "host", "shown"),
    [
        (
            UsageError("guidance_scale is out of range", found="<1e9>", wanted="at most 1000", fix="--guidance-scale 5"),
            "0.0.0.0",
            "Guidance_scale is out of range. You gave: &lt;1e9&gt;. Possible: at most 1000.",
        ),
        (ArtifactError("/srv/bundle is damaged", fix="sana-export build /srv/bundle"), "127.0.0.1", "/srv/bundle is damaged"),
        (ArtifactError("/srv/bundle is damaged", fix="sana-export build /srv/bundle"), "0.0.0.0", "could not be drawn"),
        (RuntimeError("/srv/secret"), "127.0.0.1", "could not be drawn"),
    ],
)
def test_an_error_is_shown_in_plain_words_and_folders_only_to_this_machine(
    error: Exception, host: str, shown: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def draw(wish: Wish, show: Any, cancelled: Any) -> None:
        raise error

    _, problem, end = updates(draw, tmp_path, host)
    assert shown in problem["state"]
    assert 'role="alert"' in problem["state"]
    assert "sana-export build" not in problem["state"] or host == "127.0.0.1"
    assert ("/srv" in problem["state"]) == (host == "127.0.0.1" and isinstance(error, ArtifactError))
    assert end == {"busy": False}
    assert str(error).splitlines()[0] in caplog.text


def test_a_stopped_image_says_so(tmp_path: Path) -> None:
    def draw(wish: Wish, show: Any, cancelled: Any) -> None:
        raise Cancelled("stop")

    assert updates(draw, tmp_path)[1:] == [{"state": "Stopped"}, {"busy": False}]


def test_closing_the_iterator_stops_the_drawing(tmp_path: Path) -> None:
    stopped = threading.Event()

    def draw(wish: Wish, show: Any, cancelled: Any) -> None:
        show(Preview(IMAGE, 1, 9))
        while not cancelled():
            pass
        stopped.set()

    stop = threading.Event()
    iterator: Iterator[Any] = drawing_updates(studio(draw), INPUTS, stop, tmp_path)
    next(iterator), next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert stopped.wait(5)


def test_items_come_before_the_work_is_done() -> None:
    go_on = threading.Event()

    def work(put: Callable[[int], None]) -> None:
        put(1)
        assert go_on.wait(5)
        put(2)
        raise ValueError("end")

    items = as_they_come(work)
    assert next(items) == 1
    go_on.set()
    assert next(items) == 2
    with pytest.raises(ValueError, match="end"):
        next(items)
