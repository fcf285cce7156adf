"""Clients of a real server, well-behaved and not: what the tests of load and faults share."""

from __future__ import annotations

import base64
import io
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks.serve.server import ServerProcess
from benchmarks.serve.traffic import PATH, has_error_form
from sana_export.manifest import Manifest
from tests.support.bundles import made_once

#: Names the file that makes a server fail (faulty_server.py).
VARIABLE = "SANA_EXPORT_TEST_FAULT"
#: A request that takes little time.
QUICK: dict[str, Any] = {"prompt": "a red apple", "seed": 5, "size": "64x64", "num_inference_steps": 2}
PATIENCE = 60.0


def small_images(bundle: Path, folder: Path) -> Path:
    """A copy of a bundle whose images may be small: without a table of resolutions, with 128 px as its native size."""

    def copy(target: Path) -> None:
        shutil.copytree(bundle, target)
        manifest = Manifest.load(target)
        replace(manifest, model=replace(manifest.model, sample_size=4)).save(target)

    return made_once(folder / f"{bundle.name}-128", copy)


@contextmanager
def faulty_server(bundle: Path, file: Path, *options: object) -> Iterator[ServerProcess]:
    """A server that fails as `file` says (tests/support/faulty_server.py), and whose slow clients have little time."""
    file.write_text("")
    words = {VARIABLE: str(file)}
    with ServerProcess(bundle, *options, module="tests.support.faulty_server", environment=words) as server:
        yield server


def draw(server: ServerProcess, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    """The answer to `QUICK` with other fields."""
    return httpx.post(server.url + PATH, json={**QUICK, **fields}, headers=headers, timeout=None)


def code(answer: httpx.Response) -> tuple[int, str]:
    """Status and code of an error, whose form is checked."""
    assert has_error_form(answer.content), answer.text
    return answer.status_code, answer.json()["error"]["code"]


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


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
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
    length = int({name.lower(): value for name, value in headers}.get("content-length", len(rest)))
    return httpx.Response(int(first.split()[1]), headers=headers, content=rest[:length])
