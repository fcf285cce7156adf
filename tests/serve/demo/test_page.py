"""The page's handlers without a browser: each session has one image, and a stop is never lost, whenever it comes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio", reason="gradio is not installed (pip install '.[demo]')")

from sana_export.errors import Cancelled
from sana_export.manifest import Manifest
from sana_export.serve.demo.page import DemoPage
from sana_export.serve.demo.settings import DemoSettings
from tests.support.serving import wait_for

ME, OTHER = SimpleNamespace(session_hash="me"), SimpleNamespace(session_hash="other")
SKIPPED = {"__type__": "update"}


class Studio:
    """Draws until it is told to stop."""

    reference, loras, backends, backend, device, sides = None, (), ("x",), "x", "cpu", (64, 128)

    def __init__(self, bundle: Path) -> None:
        self.settings, self.manifest = DemoSettings(bundle), Manifest.load(bundle)
        self.drawn = 0

    def draw(self, wish: Any, show: Any, cancelled: Any) -> None:
        self.drawn += 1
        wait_for(cancelled, 5)
        raise Cancelled("stop")


@pytest.fixture
def studio(bundle: Path) -> Studio:
    return Studio(bundle)


@pytest.fixture
def page(studio: Studio, tmp_path: Path) -> Iterator[DemoPage]:
    made = DemoPage(studio, tmp_path / "images")  # type: ignore[arg-type]
    yield made
    made.stop_all()


def draw(page: DemoPage, visitor: Any = ME) -> Iterator[Any]:
    """The updates of the page, as (state, whether it draws)."""
    inputs = {"prompt": "a cat", "width": 64, "height": 64, "steps": 2, "guidance_scale": 4.5, "seed": 3, "new_seed": False}
    return (told(page, changes) for changes in page.draw(visitor, *(inputs.get(name) for name in page._inputs)))


def told(page: DemoPage, changes: Any) -> tuple[Any, Any]:
    if changes == SKIPPED:
        return None, None
    stop = changes.get(page._stop)
    return changes.get(page._outputs["state"]), None if stop is None else stop["interactive"]


def test_a_stop_before_the_drawing_has_begun_holds(page: DemoPage, studio: Studio) -> None:
    assert told(page, page.wait(ME)) == ("Waiting", True)
    page.stop(ME)
    assert list(draw(page)) == [("Starting", True), ("Stopped", None), (None, False)]


def test_a_stop_while_it_draws_and_the_next_image(page: DemoPage, studio: Studio) -> None:
    for _ in range(2):
        assert told(page, page.wait(ME)) == ("Waiting", True)
        drawing = draw(page)
        assert next(drawing) == ("Starting", True)
        page.stop(OTHER)  # has nothing to do with it
        page.stop(ME)
        assert next(drawing) == ("Stopped", None)
        assert next(drawing) == (None, False)
        # The visitor can ask again before Gradio has noticed that the drawing has ended.
    assert studio.drawn == 2


def test_a_second_wish_does_not_disturb_the_image_that_is_drawn(page: DemoPage, studio: Studio) -> None:
    page.wait(ME)
    drawing = draw(page)
    next(drawing)
    assert told(page, page.wait(ME)) == (None, None)
    assert list(draw(page)) == []
    assert told(page, page.refuse(ME)) == (None, None)
    page.stop(ME)
    assert list(drawing) == [("Stopped", None), (None, False)]
    assert studio.drawn == 1


def test_after_a_refusal_the_visitor_can_ask_again(page: DemoPage) -> None:
    page.wait(ME)
    assert told(page, page.refuse(ME)) == ("Not drawn", False)
    assert list(draw(page)) == []
    assert told(page, page.wait(ME)) == ("Waiting", True)


def test_closing_the_page_ends_what_it_draws_and_leaves_nothing(page: DemoPage, studio: Studio) -> None:
    page.wait(ME)
    page.leave(ME)  # before it has begun
    assert list(draw(page)) == []
    page.wait(OTHER)
    drawing = draw(page, OTHER)
    next(drawing)
    page.leave(OTHER)
    assert list(drawing) == [("Stopped", None), (None, False)]
    page.wait(ME)
    lost = draw(page)
    next(lost)
    del lost  # Gradio closes it
    assert page._drawings == {}
