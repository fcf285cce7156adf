"""uvicorn's HTTP connection with limits of its own: open connections, slow clients, and errors in OpenAI's form.

uvicorn answers what is not HTTP as plain text, and waits for ever for the head of a request.
"""

from __future__ import annotations

import asyncio
import json
import sys
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from sana_export.serve.config import RequestLimits
from sana_export.serve.errors import Refusal, answer

#: Seconds for which a refused client may go on sending before the connection is closed. Closing at once would make the network
#: drop the error before the client reads it.
_LINGER_SECONDS = 1.0
#: Connections beyond the limit that get an error before they are closed. Others are closed at once.
_SURPLUS = 64


def protocol_class(limits: RequestLimits) -> type[H11Protocol]:
    """A protocol for uvicorn with these limits."""

    class Connection(LimitedConnection):
        limits_of_server = limits

    return Connection


class LimitedConnection(H11Protocol):
    """One connection."""

    limits_of_server = RequestLimits()

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.waiting_for_head: asyncio.TimerHandle | None = None
        self.waiting_for_reader: asyncio.TimerHandle | None = None
        self.refused = self.surplus = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        most = self.limits_of_server.connections
        if len(self.connections) > most + _SURPLUS:
            transport.abort()
        self.surplus = len(self.connections) > most
        self.watch_head()

    def connection_lost(self, error: Exception | None) -> None:
        for timer in (self.waiting_for_head, self.waiting_for_reader):
            if timer is not None:
                timer.cancel()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        if self.refused:
            return
        if self.surplus:
            self.refuse(Refusal("too_many_connections", "the server has too many open connections"))
            return
        if self.reading_head and len(data.partition(b"\r\n\r\n")[0]) > self.limits_of_server.head_bytes:
            self.head_too_large()  # h11 limits only heads that come in parts
            return
        super().data_received(data)
        self.watch_head()

    @property
    def reading_head(self) -> bool:
        """Whether the next bytes belong to the head of a request."""
        return self.cycle is None or self.cycle.response_complete

    def watch_head(self) -> None:
        """Wait for the head of a request for a while only."""
        reading = self.reading_head
        if reading and self.waiting_for_head is None:
            self.waiting_for_head = self.loop.call_later(self.limits_of_server.head_seconds, self.head_missing)
        elif not reading and self.waiting_for_head is not None:
            self.waiting_for_head.cancel()
            self.waiting_for_head = None

    def head_missing(self) -> None:
        """The head did not come in time."""
        self.waiting_for_head = None
        if not self.transport.is_closing() and self.reading_head:
            self.refuse(Refusal("request_timeout", "the head of the request did not arrive in time"))

    def send_400_response(self, msg: str) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            self.head_too_large()
        else:
            self.refuse(Refusal("invalid_http", "this is not a valid HTTP/1.1 request"))

    def head_too_large(self) -> None:
        self.refuse(Refusal("headers_too_large", f"the head has more than {self.limits_of_server.head_bytes} bytes"))

    def refuse(self, refusal: Refusal) -> None:
        """Send an error, unless an answer has begun, and close the connection after a moment."""
        self.refused = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # what the application still sends is dropped
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            found = answer(refusal)
            body = json.dumps(found.body).encode()
            named = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close", **found.headers}
            response = h11.Response(
                status_code=found.status, headers=list(named.items()), reason=HTTPStatus(found.status).phrase.encode()
            )
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.watch_reader(None)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.waiting_for_reader is not None:
            self.waiting_for_reader.cancel()
            self.waiting_for_reader = None

    def watch_reader(self, before: int | None) -> None:
        """Cut the connection of a client that reads nothing, or too slowly. `before`: bytes that waited for it a while ago."""
        waiting, limits = self.transport.get_write_buffer_size(), self.limits_of_server
        if before is not None and waiting > before - limits.read_rate * limits.read_seconds:
            self.transport.abort()
            return
        self.waiting_for_reader = self.loop.call_later(limits.read_seconds, self.watch_reader, waiting)
