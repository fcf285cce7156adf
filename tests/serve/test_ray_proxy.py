"""Errors of Serve's own proxy in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

pytest.importorskip("ray")

from ray.serve._private.http_util import validate_http_proxy_callback_return

from sana_export.serve.ray.proxy import OpenAIErrors, middlewares

SCOPE = {"type": "http", "path": "/v1/images/generations", "headers": [(b"x-request-id", b"r7")]}
TEXT, JSON = [(b"content-type", b"text/plain"), (b"x-request-id", b"r7")], [(b"content-type", b"application/json")]


def sent(status: int | None, headers: Any = (), body: bytes = b"", path: str = "/v1/images/generations") -> list[Any]:
    """What a client gets if Ray's proxy answers with these, or with nothing."""

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        if status is not None:
            await send({"type": "http.response.start", "status": status, "headers": list(headers)})
            await send({"type": "http.response.body", "body": body})

    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    asyncio.run(OpenAIErrors(proxy)({**SCOPE, "path": path}, None, send))
    return messages


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
    assert validate_http_proxy_callback_return(middlewares())[0].cls is OpenAIErrors
