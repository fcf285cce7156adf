"""What every request passes: its id, its key, where it may come from, how much it may send, and the headers of every answer."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

from sana_export.errors import SanaExportError
from sana_export.serve.config import ServeConfig
from sana_export.serve.errors import Refusal, answer
from sana_export.serve.hosts import LOOPBACK, is_own_host
from sana_export.serve.metrics import Metrics

LOG = logging.getLogger("sana_export.serve.access")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

#: Headers of every answer, unless it has its own.
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
#: Paths that need no key: probes, the documentation, and images, whose names nobody can guess.
OPEN = ("/health/", "/docs", "/openapi.json", "/images/")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class Caller:
    """Who sent a request."""

    #: The id of the API key; "" without keys.
    key: str
    request_id: str


class ApiKeys:
    """The keys of a server. Only their hashes are kept, and all of them are compared, each in constant time."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        self._hashes = {name: _digest(key) for name, key in keys.items()}

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def find(self, authorization: str) -> str | None:
        """The id of the key in a header "Bearer KEY". None: it is not one of ours."""
        scheme, _, key = authorization.partition(" ")
        given, found = _digest(key.strip()), None
        for name, own in self._hashes.items():
            if hmac.compare_digest(own, given):
                found = name
        return found if scheme.lower() == "bearer" else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


class Guard:
    """The outermost layer of the application."""

    def __init__(self, app: Application, config: ServeConfig, metrics: Metrics) -> None:
        self._app, self._metrics, self._keys = app, metrics, ApiKeys(config.keys)
        public = urlsplit(config.public_url or "").hostname
        #: The names under which a server without keys may be reached, besides IP addresses. None: any.
        self._hosts = None if self._keys else {*LOOPBACK, config.host.lower(), public or ""} - {""}

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, started = Headers(scope=scope), perf_counter()
        own_id = headers.get("x-request-id", "")
        has_body = "content-length" in headers or "transfer-encoding" in headers
        exchange = _Exchange(own_id if _REQUEST_ID.fullmatch(own_id) else uuid.uuid4().hex, receive, send, read=not has_body)
        key = ""
        try:
            key = self._check(scope["path"], headers)
            scope["caller"] = Caller(key, exchange.request_id)
            await self._app(scope, exchange.receive, exchange.send)
        except Exception as error:  # any: the client gets an answer in OpenAI's form
            found = answer(error, scope.get("model"))
            self._metrics.failed(found.code)
            if not isinstance(error, SanaExportError):  # an engine logs its own
                LOG.error("request %s failed", exchange.request_id, exc_info=error)
            if not exchange.status:
                await JSONResponse(found.body, found.status, found.headers)(scope, exchange.receive, exchange.send)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.answered(path, exchange.status, key)
            took = 1000 * (perf_counter() - started)
            LOG.info("%s %s %s %d %.0f ms key=%s", exchange.request_id, scope["method"], path, exchange.status, took, key or "-")

    def _check(self, path: str, headers: Headers) -> str:
        """The id of the request's key. Raises Refusal for a request that may not come in."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._hosts is not None and not is_own_host(host, self._hosts):
            raise Refusal("misdirected", "without API keys this server answers under IP addresses and its own names only")
        if origin is not None and origin.partition("://")[2] != host:
            raise Refusal("forbidden_origin", "this server takes no requests from other web pages")
        if not self._keys:
            return ""
        key = self._keys.find(headers.get("authorization", ""))
        if key is None and not path.startswith(OPEN):
            raise Refusal(
                "invalid_api_key",
                "this server needs an API key: Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return key or ""


class _Exchange:
    """The messages of one request: what was sent, and whether the body has been read."""

    def __init__(self, request_id: str, receive: Receive, send: Send, *, read: bool) -> None:
        self.request_id, self._receive, self._send = request_id, receive, send
        self.status, self._read = 0, read

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body"):
            self._read = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(raw=message["headers"])
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            headers["X-Request-Id"] = self.request_id
            if self.status >= 400 and not self._read:
                headers["Connection"] = "close"  # the rest of the body is not read
        await self._send(message)
