"""What Serve's own HTTP proxy needs besides: a second try for a request whose front replica died, and OpenAI's form for its errors.

Name `middlewares` in the environment of every Ray process (`ray start`, the pods of KubeRay):

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=sana_export.serve.ray.proxy.middlewares

Without it, such a request gets Ray's plain text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from starlette.middleware import Middleware

from sana_export.serve.errors import Refusal, answer
from sana_export.serve.security import Application, Message, Receive, Send

#: The code of `CODES` by the status of Ray's plain text.
CODE_OF = {404: "not_found", 408: "timeout", 429: "queue_full", 503: "not_ready"}
TEXTS = {
    "not_found": "there is no such path here",
    "timeout": "the request took too long",
    "queue_full": "the queue is full; try again later",
    "not_ready": "the server cannot answer now; try again later",
}
#: Paths of the proxy itself, for health checks of a load balancer.
OWN_PATHS = "/-/"


#: Bytes of a body that is kept for a second try. Requests without images are smaller.
KEPT_BYTES = 2**20


def middlewares() -> list[Middleware]:
    """What Serve's proxy wraps its own ASGI application in."""
    return [Middleware(SecondTry)]


class SecondTry:
    """Gives a request to another front replica if the first one died before it answered, and answers in OpenAI's form if Ray does.

    Drawing has no side effects, so trying twice is safe. A body larger than `KEPT_BYTES` is not kept: its request gets a 503.
    """

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """As of ASGI."""
        if scope["type"] != "http" or scope["path"].startswith(OWN_PATHS):
            await self._app(scope, receive, send)
            return
        body, answering = _Body(receive), _Answering(send, scope)
        await self._app(dict(scope), body.receive, answering)
        if not answering.started and body.again():
            await self._app(dict(scope), body.receive, answering)
        if not answering.started and not body.gone:
            await answering.refuse("not_ready")


class _Body:
    """The messages of a client, which can be received again from the first one."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._kept: list[Message] = []
        self._next = self._bytes = 0
        #: Whether the client has closed the connection.
        self.gone = False

    async def receive(self) -> Message:
        """The next message."""
        if self._next == len(self._kept):
            message = await self._receive()
            self.gone |= message["type"] == "http.disconnect"
            self._bytes += len(message.get("body", b""))
            if self._bytes > KEPT_BYTES:
                self._kept.clear()
                self._next = 0
                return message
            self._kept.append(message)
        self._next += 1
        return self._kept[self._next - 1]

    def again(self) -> bool:
        """Start from the first message. False: the client is gone, or the body was too large to keep."""
        self._next = 0
        return not self.gone and self._bytes <= KEPT_BYTES


class _Answering:
    """Passes an answer on, once it is known not to be one of Ray's own."""

    def __init__(self, send: Send, scope: Message) -> None:
        self._send, self._scope = send, scope
        self.started = False
        self._replaced = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            code = CODE_OF.get(message["status"]) if _is_text(message) else None
            if code is not None:
                self._replaced = True
                await self.refuse(code)
                return
            self.started = True
        if not self._replaced:
            await self._send(message)

    async def refuse(self, code: str) -> None:
        """Answer with an error."""
        self.started = True
        refusal = answer(Refusal(code, TEXTS[code]))
        body = json.dumps(refusal.body).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            **refusal.headers,
            **_request_id(self._scope),
        }
        await self._send({
            "type": "http.response.start",
            "status": refusal.status,
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        })  # fmt: skip
        await self._send({"type": "http.response.body", "body": body})


def _request_id(scope: Message) -> Mapping[str, str]:
    """The header of the answer with the request's id, which Ray adds to requests that have none."""
    ids = [value.decode("latin-1") for name, value in scope["headers"] if name.lower() == b"x-request-id"]
    return {"x-request-id": ids[-1]} if ids else {}


def _is_text(start: Message) -> bool:
    return any(name.lower() == b"content-type" and value.startswith(b"text/plain") for name, value in start["headers"])
