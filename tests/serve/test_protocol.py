"""Connections: what is not HTTP, floods, and clients that are slow or many."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace

import pytest

from sana_export.serve.config import ModelConfig, RequestLimits, ServeConfig
from tests.support.serving import StandInEngine, running, wait_for

LIMITS = RequestLimits(head_bytes=8192, head_seconds=0.4, body_seconds=0.4, read_seconds=0.4, connections=4)
CONFIG = ServeConfig((ModelConfig("first", "unused"),), port=0, limits=LIMITS)
POST = b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def engine() -> StandInEngine:
    return StandInEngine()


@pytest.fixture(scope="module")
def port(engine: StandInEngine) -> Iterator[int]:
    with running(engine, CONFIG) as address:
        yield int(address.rpartition(":")[2])


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def exchange(port: int, *pieces: bytes) -> tuple[int, str]:
    """The status and the code of the error that a server answers before it closes the connection."""
    with connected(port) as client:
        for piece in pieces:
            client.sendall(piece)
        return error_of(client)


def error_of(client: socket.socket) -> tuple[int, str]:
    content = b""
    while received := client.recv(65536):
        content += received
    head, _, body = content.partition(b"\r\n\r\n")
    assert b"\r\nconnection: close" in head.lower()
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(head.split()[1]), error["code"]


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"\x16\x03\x01\x00\xa5 is TLS\r\n\r\n", 400, "invalid_http"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "invalid_http"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n", 400, "invalid_http"),
        (POST + b"Content-Length: -5\r\n\r\n", 400, "invalid_http"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400, "invalid_http"),
        (POST + b"Content-Length: 99999999999\r\n\r\n", 413, "body_too_large"),
        (POST + b"Expect: 100-continue\r\nContent-Length: 9999999\r\n\r\n", 413, "body_too_large"),
        (POST + b"Content-Length: 20\r\n\r\n{", 408, "request_timeout"),
        (b"GET / HT", 408, "request_timeout"),
        (b"", 408, "request_timeout"),
    ],
)
def test_every_error_is_openais(port: int, content: bytes, status: int, code: str) -> None:
    assert exchange(port, content) == (status, code)


def test_a_flood_of_headers_gets_an_answer(port: int) -> None:
    flood = (b"X-%d: %s\r\n" % (index, b"a" * 1000) for index in range(2000))
    assert exchange(port, b"GET / HTTP/1.1\r\nHost: localhost\r\n", *flood) == (431, "headers_too_large")


def test_a_second_head_on_the_same_connection_has_the_same_time(port: int) -> None:
    with connected(port) as client:
        client.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in client.recv(65536)
        started = time.monotonic()
        client.sendall(b"GET /he")
        assert error_of(client) == (408, "request_timeout")
        assert time.monotonic() - started > 0.3


def test_too_many_connections_get_503_and_then_none(port: int) -> None:
    with ExitStack() as opened:
        idle = [opened.enter_context(connected(port)) for _ in range(LIMITS.connections)]  # they are accepted in this order
        assert exchange(port, b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n") == (503, "too_many_connections")
        for client in idle:
            client.close()

    def answered() -> bool:
        with connected(port) as client:
            client.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            return b"200 OK" in client.recv(65536)

    wait_for(answered)


def test_a_client_that_does_not_read_is_cut_off(engine: StandInEngine) -> None:
    class Large(StandInEngine):
        def models(self):  # type: ignore[no-untyped-def]
            [card, _] = super().models()
            return (replace(card, name="x" * 30_000_000),)

    with running(Large(), CONFIG) as address, connected(int(address.rpartition(":")[2])) as client:
        client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(5 * LIMITS.read_seconds)
        client.settimeout(5)
        received = 0
        with suppress(ConnectionResetError):
            while content := client.recv(1 << 20):
                received += len(content)
        assert received < 30_000_000


def test_a_client_that_drips_is_cut_off() -> None:
    class Large(StandInEngine):
        def models(self):  # type: ignore[no-untyped-def]
            [card, _] = super().models()
            return (replace(card, name="x" * 60_000_000),)

    config = replace(CONFIG, limits=replace(LIMITS, read_rate=20_000_000))
    with running(Large(), config) as address, connected(int(address.rpartition(":")[2])) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        received = 0
        with suppress(ConnectionResetError):
            while content := client.recv(1 << 17):  # at most 6.5 MB in a second
                received += len(content)
                time.sleep(0.02)
        assert 0 < received < 60_000_000


def test_a_client_that_reads_slowly_is_not(engine: StandInEngine) -> None:
    class Large(StandInEngine):
        def models(self):  # type: ignore[no-untyped-def]
            [card, _] = super().models()
            return (replace(card, name="x" * 12_000_000),)

    with running(Large(), CONFIG) as address, connected(int(address.rpartition(":")[2])) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
        client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        received, started = 0, time.monotonic()
        while content := client.recv(1 << 20):
            received += len(content)
            time.sleep(0.03)
        assert received > 12_000_000
        assert time.monotonic() - started > 2 * LIMITS.read_seconds


def test_a_storm_of_clients_that_leave_at_once_keeps_nothing(engine: StandInEngine) -> None:
    body = b'{"prompt":"a"}'
    request = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    waiting = StandInEngine()
    waiting.endless = True
    with running(waiting, replace(CONFIG, limits=replace(LIMITS, connections=100))) as address:
        port = int(address.rpartition(":")[2])
        for _ in range(300):
            with connected(port) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not an end
                client.sendall(request)
        wait_for(lambda: len(waiting.left) == len(waiting.jobs))
        waiting.endless = False
        with connected(port) as client:
            client.sendall(request)
            assert b"200 OK" in client.recv(65536)
    assert len(waiting.jobs) > 1
