"""The page's server: what it answers, to whom, and what it refuses to start with."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from sana_export.errors import DependencyError
from sana_export.manifest import Manifest
from sana_export.serve.demo import look
from sana_export.serve.demo.run import serving
from sana_export.serve.demo.settings import DemoSettings
from sana_export.serve.demo.studio import Painting

pytest.importorskip("gradio", reason="gradio is not installed (pip install '.[demo]')")


@pytest.fixture(scope="module")
def page(tiny_bundle: Path) -> Iterator[str]:
    with serving(DemoSettings(tiny_bundle, port=0, backend="onnxruntime", threads=1)) as address:
        yield address


def test_the_page_is_served_on_loopback_with_headers_that_keep_it_to_itself(page: str) -> None:
    assert page.startswith("http://127.0.0.1:")
    answer = httpx.get(page)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "http" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert '"analytics_enabled":false' in answer.text.replace(" ", "")


@pytest.mark.parametrize("path", ["docs", "redoc", "openapi.json", "gradio_api/runs"])
def test_pages_about_its_api_are_off(page: str, path: str) -> None:
    assert httpx.get(page + path).status_code == 404


def test_the_functions_of_the_page_are_no_api(page: str) -> None:
    assert httpx.get(page + "gradio_api/info").json() == {"named_endpoints": {}, "unnamed_endpoints": {}}


def test_another_name_for_this_machine_is_refused(page: str) -> None:
    """A page of another site whose name leads here (DNS rebinding) reaches nothing."""
    assert httpx.get(page, headers={"host": "evil.example"}).status_code == 421
    assert httpx.get(page, headers={"host": "localhost:7860"}).status_code == 200


def test_every_loopback_address_refuses_other_names(tiny_bundle: Path) -> None:
    with serving(DemoSettings(tiny_bundle, "127.0.0.2", port=0, backend="onnxruntime", threads=1)) as address:
        assert address.startswith("http://127.0.0.2:")
        assert httpx.get(address).status_code == 200
        assert httpx.get(address, headers={"host": "evil.example"}).status_code == 421


def test_nothing_large_can_be_uploaded(page: str) -> None:
    answer = httpx.post(page + "gradio_api/upload", files={"files": ("x.png", b"0" * 5000)})
    assert answer.status_code == 413


def test_files_of_the_machine_are_not_served(page: str, tiny_bundle: Path) -> None:
    assert httpx.get(f"{page}gradio_api/file={tiny_bundle / 'manifest.json'}").status_code == 403


def test_a_port_that_is_in_use_is_named(tiny_bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DependencyError, match=f"port {port}") as raised, serving(DemoSettings(tiny_bundle, port=port)):
            pass
    assert raised.value.fix == f"--port {port + 1}"


def test_without_gradio_the_error_names_the_extra(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sana_export.serve.demo.page", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(DependencyError, match="needs Gradio") as raised, serving(DemoSettings(tiny_bundle, port=0)):
        pass
    assert "[demo]" in str(raised.value.fix)


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("a.b", False)]
)
def test_which_addresses_only_this_machine_reaches(host: str, local: bool) -> None:
    assert DemoSettings(Path("b"), host=host).local == local


def test_names_and_stages_are_escaped_and_bars_share_a_scale(tiny_bundle: Path) -> None:
    paintings = [
        Painting(None, "<b>", 1, {"text encoder": 0.25, "4 steps": 0.25, "previews": 0.5}, {}),  # type: ignore[arg-type]
        Painting(None, "eager", 1, {"4 steps": 2.0}, {}, reference=True),  # type: ignore[arg-type]
    ]
    html = look.times(paintings)
    assert "&lt;b&gt;" in html
    assert [f"width:{share}.00%" in html for share in ("12.50"[:2], "25", "100")] == [False, True, True]
    assert html.count("width:12.50%") == 2
    assert "4 times as fast as eager" in html  # 2 s against 0.5 s without previews
    assert "random weights, fp32, x on y, trained at 512 × 512 px" in look.head(Manifest.load(tiny_bundle), "x", "y")
