"""What Serve's own proxy is wrapped in: errors in OpenAI's form, and a second try if a front replica dies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("ray")

from ray.serve._private.http_util import validate_http_proxy_callback_return

from sana_export.serve.ray.proxy import KEPT_BYTES, SecondTry, middlewares

SCOPE = {"type": "http", "path": "/v1/images/generations", "headers": [(b"x-request-id", b"r7")]}
TEXT, JSON = [(b"content-type", b"text/plain"), (b"x-request-id", b"r7")], [(b"content-type", b"application/json")]


def exchanged(proxy: Any, parts: Sequence[bytes] = (b"{}",), path: str = "/v1/images/generations") -> list[Any]:
    """What a client gets that sends a body in these parts."""
    requests = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    requests[-1]["more_body"] = False
    messages: list[Any] = []

    async def receive() -> Any:
        return requests.pop(0) if requests else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        messages.append(message)

    asyncio.run(SecondTry(proxy)({**SCOPE, "path": path}, receive, send))
    return messages


def sent(status: int | None, headers: Any = (), body: bytes = b"", path: str = "/v1/images/generations") -> list[Any]:
    """What a client gets if Ray's proxy answers with these, or with nothing."""

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        if status is not None:
            await send({"type": "http.response.start", "status": status, "headers": list(headers)})
            await send({"type": "http.response.body", "body": body})

    return exchanged(proxy, path=path)


class Dying:
    """Ray's proxy whose front replica dies in the first tries, after it read so many messages of the body."""

    def __init__(self, deaths: int, reads: int) -> None:
        self.deaths, self.reads = deaths, reads
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope["path"] += "changed"  # Ray changes it, if the application has a prefix
        if len(self.bodies) < self.deaths:
            self.bodies.append(b"".join([(await receive()).get("body", b"") for _ in range(self.reads)]))
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": JSON})
        await send({"type": "http.response.body", "body": scope["path"].encode()})


@pytest.mark.parametrize("reads", [0, 1, 3])
def test_a_request_whose_front_died_goes_to_another_with_the_same_body(reads: int):
    proxy = Dying(1, reads)
    messages = exchanged(proxy, (b"a", b"b", b"c"))
    assert (messages[0]["status"], messages[1]["body"]) == (200, b"/v1/images/generationschanged")
    assert proxy.bodies == [b"abc"[:reads], b"abc"]


def test_there_is_no_third_try():
    proxy = Dying(2, 1)
    assert exchanged(proxy)[0]["status"] == 503
    assert len(proxy.bodies) == 2


def test_the_request_of_a_client_that_left_is_not_tried_again():
    proxy = Dying(1, 2)
    assert exchanged(proxy) == []
    assert len(proxy.bodies) == 1


def test_a_large_body_passes_but_is_not_kept():
    parts = [bytes(KEPT_BYTES // 2)] * 4
    proxy = Dying(0, 0)
    assert exchanged(proxy, parts)[0]["status"] == 200
    assert proxy.bodies == [b"".join(parts)]
    dying = Dying(1, 4)
    assert exchanged(dying, parts)[0]["status"] == 503
    assert len(dying.bodies) == 1


@pytest.mark.parametrize(
    ("status", "expected", "code", "kind", "retry"),
    [
        (None, 503, "not_ready", "server_error", b"5"),  # the front replica died
        (503, 503, "not_ready", "server_error", b"5"),
        (429, 429, "queue_full", "rate_limit_error", b"1"),
        (408, 504, "timeout", "server_error", None),
        (404, 404, "not_found", "invalid_request_error", None),
    ],
)
def test_plain_text_and_no_answer_become_errors_of_openai(status: Any, expected: int, code: str, kind: str, retry: Any):
    start, body = sent(status, TEXT, b"Request dropped due to backpressure")
    headers = dict(start["headers"])
    error = json.loads(body["body"])["error"]
    assert (start["status"], error["code"], error["type"], error["param"]) == (expected, code, kind, None)
    assert (headers[b"content-type"], headers[b"x-request-id"]) == (b"application/json", b"r7")
    assert headers.get(b"retry-after") == retry
    assert int(headers[b"content-length"]) == len(body["body"])


def test_other_answers_pass_unchanged():
    for answer in ((429, JSON, b"{}"), (200, TEXT, b"metrics"), (418, TEXT, b"?")):
        start, body = sent(*answer)
        assert (start["status"], start["headers"], body["body"]) == answer
    assert sent(404, TEXT, b"no", path="/-/routes")[1]["body"] == b"no"


def test_ray_takes_the_middlewares():
    assert validate_http_proxy_callback_return(middlewares())[0].cls is SecondTry
