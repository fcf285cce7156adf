"""A server of one process: sockets, signals, and the order in which everything starts and ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import socket
from collections.abc import Callable, Iterator
from shlex import quote

import uvicorn
from fastapi import FastAPI

from sana_export.errors import UsageError
from sana_export.serve.app import create_app
from sana_export.serve.config import ServeConfig
from sana_export.serve.engine import EndingEngine
from sana_export.serve.hosts import LOOPBACK
from sana_export.serve.keys import NEW_FILE
from sana_export.serve.protocol import protocol_class
from sana_export.serve.sockets import BACKLOG, listening
from sana_export.serve.worker import LocalEngine

LOG = logging.getLogger(__name__)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(config: ServeConfig, started: Callable[[str], None] = lambda address: None) -> None:
    """Serve until SIGTERM or SIGINT: running requests then finish, waiting and new ones get 503. A second signal stops them.

    started: called with the server's address when it accepts connections.

    Raises UsageError for a configuration that is not safe, DependencyError if the address cannot be used, and what the bundles
    raise. Needs the main thread.
    """
    check_config(config)
    with listening("server", config.host, config.port) as listener:
        engine = LocalEngine(config)
        try:
            engine.load()
            host, port = listener.getsockname()[:2]
            address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            server = GracefulServer(server_settings(create_app(engine, config), config), engine, lambda: started(address))
            asyncio.run(server.serve([listener]))
        finally:
            engine.close()


def check_config(config: ServeConfig) -> None:
    """Raise UsageError for a server that anyone in the network could use, unless that is wanted, and for limits without sense."""
    if config.host not in LOOPBACK and not config.keys and not config.allow_without_keys:
        raise UsageError(
            "a server without API keys may only listen on loopback",
            found=f"host {config.host} and no keys",
            wanted="API keys, or --allow-without-keys if everybody who reaches the address may draw",
            fix=f"{NEW_FILE}; sana-export serve {quote(str(config.models[0].bundle))} --host {config.host} --api-keys api-keys",
        )
    others = max(len(config.keys) - 1, 0)
    if config.queue.places < (least := config.limits.images + others):
        kept = f" and one for each of the {others} other API keys" if others else ""
        raise UsageError(
            "the queue has no room for one request",
            found=f"{config.queue.places} places",
            wanted=f"at least {least}: {config.limits.images} for the images of one request{kept}",
            fix=f"--queue {least}",
        )


def server_settings(app: FastAPI, config: ServeConfig) -> uvicorn.Config:
    """How uvicorn runs the application."""
    return uvicorn.Config(
        app,
        http=protocol_class(config.limits),
        host=config.host,
        port=config.port,
        backlog=BACKLOG,
        ws="none",
        h11_max_incomplete_event_size=config.limits.head_bytes,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=max(1, round(config.shutdown_seconds)),
    )


class GracefulServer(uvicorn.Server):
    """uvicorn's server, which drains its engine when it is told to end, and then returns."""

    def __init__(self, config: uvicorn.Config, engine: EndingEngine, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._engine, self._announce = engine, started
        self._signals, self._ending = 0, list[asyncio.Task[None]]()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(NotImplementedError):  # on Windows, Ctrl-C ends the process as it ends other commands
            for number in _SIGNALS:
                loop.add_signal_handler(number, self._end)
        try:
            yield
        finally:
            with contextlib.suppress(NotImplementedError):
                for number in _SIGNALS:
                    loop.remove_signal_handler(number)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce()

    def _end(self) -> None:
        """The first time, what waits and what comes is refused and what runs finishes. The second time that is stopped, too."""
        self._signals += 1
        if self._signals == 1:
            LOG.info("shutting down: running requests finish, others get 503; again to stop them")
            self._ending.append(asyncio.create_task(self._drain()))
        elif self._signals == 2:
            self._ending.append(asyncio.create_task(self._stop()))
        else:
            self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        seconds, loop = self.config.timeout_graceful_shutdown or 0, asyncio.get_running_loop()
        until = loop.time() + seconds
        try:
            await asyncio.wait_for(self._engine.drain(), seconds)
        except TimeoutError:
            LOG.warning("requests still run: they are stopped")
            await self._stop()
        # uvicorn waits for the answers in what is left of the time
        self.config.timeout_graceful_shutdown = max(1, math.ceil(until - loop.time()))
        self.should_exit = True

    async def _stop(self) -> None:
        await asyncio.to_thread(self._engine.close)
