"""Clients of a real server, well-behaved and not: what the tests of load and faults share."""

from __future__ import annotations

import io
import base64
import re
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks.serve.server import ServerProcess

PATH = "/v1/images/generations"
#: A request that takes little time.
QUICK: dict[str, Any] = {"prompt": "a red apple", "seed": 5, "size": "64x64", "num_inference_steps": 2}
PATIENCE = 60.0


def draw(server: ServerProcess, **fields: Any) -> httpx.Response:
    """The answer to `QUICK` with other fields."""
    return httpx.post(server.url + PATH, json={**QUICK, **fields}, timeout=PATIENCE)


def code(answer: httpx.Response) -> tuple[int, str]:
    """Status and code of an error, whose form is checked."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    assert "/" not in error["message"] or "application/json" in error["message"] or "multipart" in error["message"], error
    assert "Traceback" not in answer.text
    return answer.status_code, error["code"]


def pixels(answer: httpx.Response, image: int = 0) -> np.ndarray[Any, Any]:
    """One image of an answer."""
    assert answer.status_code == 200, answer.text
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][image]["b64_json"]))).convert("RGB"))


def in_background(pool: ThreadPoolExecutor, server: ServerProcess, **fields: Any) -> Future[httpx.Response]:
    return pool.submit(draw, server, **fields)


def metric(server: ServerProcess, name: str) -> float:
    """The sum of a metric over its labels."""
    text = httpx.get(f"{server.url}/metrics", timeout=PATIENCE).text
    found = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
    assert found, f"no metric {name} in:\n{text}"
    return sum(map(float, found))


def wait_for(condition: Any, seconds: float = 30.0) -> None:
    """Returns when `condition()` is true. AssertionError if that takes too long."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


def request_bytes(body: bytes, *headers: str) -> bytes:
    """A request as it goes over the wire."""
    head = (f"POST {PATH} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", f"Content-Length: {len(body)}", *headers)
    return "\r\n".join((*head, "", "")).encode() + body


def connect(server: ServerProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)


def read_all(connection: socket.socket) -> bytes:
    """Everything until the server closes the connection."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def parsed(content: bytes) -> httpx.Response:
    """The first answer in what a server sent."""
    head, _, rest = content.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = [tuple(line.split(": ", 1)) for line in lines]
    length = int(dict((name.lower(), value) for name, value in headers).get("content-length", len(rest)))
    return httpx.Response(int(first.split()[1]), headers=headers, content=rest[:length])
