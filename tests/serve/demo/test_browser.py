"""The page in headless Chromium: it draws the runtime's image, stops, fits a phone, and talks to its own server only."""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sana_export.adapters import Lora
from sana_export.serve.demo.run import serving
from sana_export.serve.demo.settings import DemoSettings
from tests.support.lora_files import diffusers_lora, load_transformer

pytest.importorskip("gradio", reason="gradio is not installed (pip install '.[demo]')")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install '.[dev]')")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
#: Height and width of a common phone.
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None and os.environ.get("CI"):
        pytest.fail(f"no browser: install one of {', '.join(BROWSERS)} (.ci/run does on Debian)")
    if found is None:
        pytest.skip("no browser is installed (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(tiny_bundle: Path, tiny_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    lora = Lora(diffusers_lora(load_transformer(tiny_checkpoint), tmp_path_factory.mktemp("style")))
    with serving(DemoSettings(tiny_bundle, port=0, loras=(lora,), backend="onnxruntime", threads=1)) as found:
        yield found


def opened(browser: Any, address: str, viewport: dict[str, int]) -> tuple[Any, list[str]]:
    """The page, with a prompt and 2 steps, and the list that requests to other servers are added to."""
    page, foreign = browser.new_page(viewport=viewport), list[str]()
    page.on("request", lambda request: None if request.url.startswith((address, "data:", "blob:")) else foreign.append(request.url))
    page.goto(address)
    page.fill("#prompt textarea", "a red circle")
    page.get_by_label("number input for Steps").fill("2")
    page.uncheck("#new-seed input")
    page.fill("#seed input", "7")
    return page, foreign


def state(page: Any, text: str) -> None:
    page.locator("#state").get_by_text(re.compile(text)).first.wait_for(timeout=60_000)


def test_it_draws_the_runtimes_image_on_a_phone(browser: Any, address: str, tiny_runtime: Any) -> None:
    page, foreign = opened(browser, address, PHONE)
    page.click("#draw")
    state(page, "Seed 7")
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]  # nothing to scroll to the side
    columns = [page.locator(f".{name}").bounding_box() for name in ("ask", "results", "options")]
    assert columns[0]["y"] + columns[0]["height"] <= columns[1]["y"]
    assert columns[1]["y"] + columns[1]["height"] <= columns[2]["y"]
    shown = page.locator("#image img")
    assert shown.bounding_box()["width"] > 0.8 * PHONE["width"]
    with Image.open(io.BytesIO(page.request.get(shown.get_attribute("src")).body())) as file:
        found = np.asarray(file.convert("RGB"), np.int16)
        assert "a red circle" in str(file.info)  # the downloaded file says how it was drawn
    wanted = np.asarray(tiny_runtime("a red circle", num_inference_steps=2, seed=7).images[0], np.int16)
    assert np.abs(found - wanted).max() <= 1
    for stage in ("text encoder", "2 steps", "decoder"):
        assert stage in page.inner_text("#times")
    assert not foreign
    page.close()


def test_it_stops_and_draws_again(browser: Any, address: str) -> None:
    page, foreign = opened(browser, address, {"width": 1100, "height": 800})
    other, _ = opened(browser, address, PHONE)
    for label, value in (("Steps", "100"), ("Width", "256"), ("Height", "256")):  # long enough for all that happens meanwhile
        page.get_by_label(f"number input for {label}").fill(value)
    page.click("#draw")
    state(page, r"Step \d+ of 100")
    other.click("#draw")
    state(other, "Waiting for 1 other image")  # another visitor sees the place in the queue
    other.click("#stop")  # and can leave it
    state(other, "Stopped")
    assert re.search(r"Step \d+ of 100", page.inner_text("#state"))
    page.click("#stop")
    state(page, "Stopped")
    other.close()
    page.get_by_label("number input for Steps").fill("1")
    page.fill("#prompt textarea", "")
    page.click("#draw")
    state(page, r"There is no prompt\.")
    page.fill("#prompt textarea", "a blue square")
    page.click("#draw")
    state(page, "Seed 7")
    left, right = page.locator(".ask").bounding_box(), page.locator(".results").bounding_box()
    assert left["x"] + left["width"] <= right["x"]  # side by side
    assert not foreign
    page.close()
