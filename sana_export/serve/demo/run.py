"""Serves the page: loopback unless told otherwise, nothing from other servers, no analytics, until it is interrupted."""

from __future__ import annotations

import contextlib
import logging
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_export.environment import default_environment
from sana_export.errors import DependencyError
from sana_export.installation import install_command
from sana_export.serve import hosts
from sana_export.serve.demo.look import CSS, theme
from sana_export.serve.demo.settings import LOOPBACK, DemoSettings
from sana_export.serve.demo.studio import OtherPipeline, Studio
from sana_export.serve.sockets import listening

if TYPE_CHECKING:
    from fastapi import FastAPI

    from sana_export.serve.demo.page import DemoPage

LOG = logging.getLogger(__name__)
#: The page has nothing to upload.
_MOST_UPLOAD_BYTES = 1024
#: Gradio reads these when it is imported.
_ENVIRONMENT = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
#: Pages that are open keep a connection, which is cut after this time.
_STOP_SECONDS = 1
#: The browser loads nothing from another server, whatever Gradio asks it to, and no other page shows this one in a frame.
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; font-src 'self' data:; "
    "style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; worker-src 'self' blob:; "
    "connect-src 'self'; frame-ancestors 'none'; form-action 'self'; base-uri 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@contextlib.contextmanager
def serving(settings: DemoSettings, reference: OtherPipeline | None = None) -> Iterator[str]:
    """Load the bundle and serve its page while the block runs. Yields the page's address.

    Raises the errors of loading a bundle, and DependencyError if Gradio is missing or the address cannot be used.
    """
    with (
        tempfile.TemporaryDirectory(prefix="sana-demo-") as folder,
        default_environment({**_ENVIRONMENT, "GRADIO_TEMP_DIR": str(Path(folder) / "gradio")}),
        listening("page", settings.host, settings.port) as listener,
    ):
        page_class = _page_class()
        studio = Studio(settings, reference)
        with contextlib.closing(studio):
            page = page_class(studio, Path(folder) / "images")
            with _uvicorn(create_app(page), listener):
                yield _address(settings.host, listener.getsockname()[1])
                page.stop_all()


def create_app(page: DemoPage) -> FastAPI:
    """The page as an application, without pages about its API."""
    import gradio as gr
    from fastapi import FastAPI

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    settings = page.studio.settings
    gr.mount_gradio_app(
        app,
        page.blocks,
        path="/",
        server_name=settings.host,
        server_port=settings.port,
        footer_links=[],
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
        run_history=False,
        max_file_size=_MOST_UPLOAD_BYTES,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        allowed_paths=[str(page.files)],
        theme=theme(),
        css=CSS,
    )
    app.add_middleware(_Headers)
    if settings.local:
        app.add_middleware(_OwnHosts)
    return app


class _Headers:
    """Adds `_HEADERS` to every response."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Any]) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        await self.app(scope, receive, send_with_headers)


class _OwnHosts:
    """Refuses requests under foreign names, so that no page of another server reaches this one through its own name."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.datastructures import Headers
        from starlette.responses import PlainTextResponse

        if scope["type"] == "http" and not hosts.is_own_host(Headers(scope=scope).get("host", ""), hosts.LOOPBACK):
            await PlainTextResponse("This page answers under localhost and IP addresses only.", 421)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def _page_class() -> type[DemoPage]:
    try:
        from sana_export.serve.demo.page import DemoPage
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sana_export"):
            raise
        raise DependencyError(
            "the demo page needs Gradio", found=f"no module {error.name}", wanted="gradio 6", fix=install_command("demo")
        ) from error
    return DemoPage


@contextlib.contextmanager
def _uvicorn(app: FastAPI, listener: socket.socket) -> Iterator[None]:
    """Serve `app` in a thread while the block runs. The main thread stays free for signals."""
    import uvicorn

    # Gradio logs what fails in a handler. uvicorn would log a traceback for each page that is open at the end.
    config = uvicorn.Config(app, log_level="critical", access_log=False, timeout_graceful_shutdown=_STOP_SECONDS)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(3 * _STOP_SECONDS)


def _address(host: str, port: int) -> str:
    """What a browser opens. An address that means all of them is shown as loopback."""
    shown = {"0.0.0.0": LOOPBACK, "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}/"
