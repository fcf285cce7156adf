"""Clients that are slow, go away, flood the server or speak no HTTP: what they get, and that others still get their images."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest

from benchmarks.serve.server import ServerProcess, resident_mib
from benchmarks.serve.traffic import MALFORMED
from tests.support.serve_clients import (
    QUICK,
    code,
    connect,
    draw,
    faulty_server,
    in_background,
    metric,
    parsed,
    pixels,
    read_all,
    request_bytes,
    small_images,
    wait_for,
)

LOG = logging.getLogger(__name__)
#: Steps that take seconds.
LONG = 1000
PLACES = 64
CONNECTIONS = 100
#: What a client gets that sends to a closed connection.
CLOSED = (BrokenPipeError, ConnectionResetError)
#: Requests that wait at a time, in the test of clients that leave.
WAVE = 50


@pytest.fixture(scope="module")
def fault(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file whose word slows the server down."""
    return tmp_path_factory.mktemp("fault") / "word"


@pytest.fixture(scope="module")
def running(tiny_bundle: Path, build_cache: Path, fault: Path) -> Iterator[ServerProcess]:
    options = ("--threads", 1, "--max-steps", LONG, "--queue", PLACES, "--max-connections", CONNECTIONS, "--timeout", 3600)
    with faulty_server(small_images(tiny_bundle, build_cache), fault, *options) as server:
        yield server


@pytest.fixture
def server(running: ServerProcess) -> Iterator[ServerProcess]:
    """It draws, before and after the test."""
    expected = pixels(draw(running))
    yield running
    assert np.array_equal(pixels(draw(running)), expected)
    wait_for(lambda: metric(running, "sana_queue_waiting") == metric(running, "sana_queue_running") == 0)


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_requests(server: ServerProcess, name: str) -> None:
    content, statuses = MALFORMED[name]
    with connect(server) as connection:
        with suppress(*CLOSED):  # it may have answered before it read everything
            connection.sendall(content)
        status, word = code(parsed(read_all(connection)))
    assert status in statuses
    assert word


def test_a_head_that_does_not_end(server: ServerProcess) -> None:
    started = time.monotonic()
    with connect(server) as connection:
        connection.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        assert code(parsed(read_all(connection))) == (408, "request_timeout")
    assert 0.9 < time.monotonic() - started < 5


def test_a_head_that_comes_byte_by_byte(server: ServerProcess) -> None:
    started = time.monotonic()
    with connect(server) as connection, pytest.raises(CLOSED):
        drip(connection, b"GET /health/live HTTP/1.1\r\nX-Long: " + b"x" * 1000)
    assert time.monotonic() - started < 10


def drip(connection: socket.socket, content: bytes) -> None:
    for byte in content:
        connection.sendall(bytes([byte]))
        time.sleep(0.05)


def test_a_body_that_does_not_end(server: ServerProcess) -> None:
    content = request_bytes(json.dumps(QUICK).encode())
    with connect(server) as connection:
        connection.sendall(content[:-10])
        assert code(parsed(read_all(connection))) == (408, "request_timeout")


def test_a_client_that_reads_nothing(server: ServerProcess) -> None:
    """Its connection is cut, and what was kept for it is freed."""
    body = json.dumps({**QUICK, "size": "512x512", "n": 5}).encode()
    before = connections(server)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(request_bytes(body))
        wait_for(lambda: connections(server) > before)
        wait_for(lambda: connections(server) <= before)
        connection.settimeout(20)
        assert len(read_all(connection)) < 3 * 2**20, "the rest was not sent"


def connections(server: ServerProcess) -> int:
    """Open connections of the server, without those that wait to be closed by the kernel."""
    return sum(each.status == "ESTABLISHED" for each in server.meter.net_connections("tcp"))


def test_many_slow_clients_do_not_keep_others_waiting(server: ServerProcess) -> None:
    with ExitStack() as stack:
        for number in range(CONNECTIONS // 2):
            connection = stack.enter_context(connect(server))
            connection.sendall(request_bytes(b"{}")[: 20 + number])
        wait_for(lambda: connections(server) >= CONNECTIONS // 2)
        assert draw(server).status_code == 200


def test_too_many_connections(server: ServerProcess) -> None:
    with ExitStack() as stack:
        opened = [stack.enter_context(connect(server)) for _ in range(CONNECTIONS + 20)]
        opened[-1].sendall(b"GET /health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        answer = parsed(read_all(opened[-1]))
    assert code(answer) == (503, "too_many_connections")
    assert int(answer.headers["retry-after"]) > 0


def test_a_request_and_then_garbage_on_one_connection(server: ServerProcess) -> None:
    with connect(server) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n\x00\x01 garbage \r\n\r\n")
        content = read_all(connection)
    assert parsed(content).status_code == 200
    second = content.partition(b'{"status":"ok"}')[2]
    assert code(parsed(second)) == (400, "invalid_http")


def test_pipelined_requests_are_answered_in_order(server: ServerProcess) -> None:
    seeds = (1, 2, 3)
    contents = [json.dumps({**QUICK, "seed": seed}).encode() for seed in seeds]
    with connect(server) as connection:
        connection.sendall(b"".join(map(request_bytes, contents[:2])) + request_bytes(contents[2], "Connection: close"))
        rest = read_all(connection)
    for seed in seeds:
        answer = parsed(rest)
        rest = rest[rest.index(b"\r\n\r\n") + 4 + len(answer.content) :]
        assert answer.json()["data"][0]["seed"] == seed
        assert np.array_equal(pixels(answer), pixels(draw(server, seed=seed)))
    assert rest == b""


def test_a_full_queue_refuses_while_the_others_wait(server: ServerProcess) -> None:
    with connect(server) as running, ExitStack() as stack:
        running.sendall(request_bytes(json.dumps({**QUICK, "num_inference_steps": LONG}).encode()))
        wait_for(lambda: metric(server, "sana_queue_running") > 0)
        body = json.dumps({**QUICK, "n": 10}).encode()
        for _ in range(PLACES // 10):
            stack.enter_context(connect(server)).sendall(request_bytes(body))
        wait_for(lambda: metric(server, "sana_queue_waiting") >= 10 * (PLACES // 10))
        answer = draw(server, n=10)
        assert code(answer) == (429, "queue_full")
        assert metric(server, "sana_queue_waiting") == 10 * (PLACES // 10), "none of them was drawn first"
        assert int(answer.headers["retry-after"]) > 0


def test_a_client_that_leaves_stops_its_sampling(server: ServerProcess) -> None:
    with connect(server) as connection:
        connection.sendall(request_bytes(json.dumps({**QUICK, "num_inference_steps": LONG, "size": "512x512"}).encode()))
        wait_for(lambda: metric(server, "sana_queue_running") == 1)
    wait_for(lambda: metric(server, "sana_queue_running") == 0, 3)


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_queued_requests_whose_clients_leave(server: ServerProcess, fault: Path, count: int) -> None:
    """Their places are free at once, memory stays flat, and the request before them gets its image."""
    content = request_bytes(json.dumps(QUICK).encode())
    expected = pixels(draw(server, num_inference_steps=LONG))
    fault.write_text("slow")
    with ThreadPoolExecutor(1) as pool:
        first = in_background(pool, server, num_inference_steps=LONG)
        wait_for(lambda: metric(server, "sana_queue_running") == 1)
        memory = []
        for _ in range(count // WAVE):
            with ExitStack() as stack:
                for _ in range(WAVE):
                    stack.enter_context(connect(server)).sendall(content)
                wait_for(lambda: metric(server, "sana_queue_waiting") == WAVE)
            wait_for(lambda: metric(server, "sana_queue_waiting") == 0)
            memory.append(resident_mib(server.meter))
        fault.write_text("")
        assert np.array_equal(pixels(first.result()), expected)
    tenths = [round(mib) for mib in memory[:: len(memory) // 10]]
    LOG.info("%d requests whose clients left; MiB of the server after each tenth: %s", count, tenths)
    assert memory[-1] - memory[len(memory) // 5] < 8
