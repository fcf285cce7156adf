"""A real server under a short load: nothing is lost or crossed. And the load script sees it if something is."""

from __future__ import annotations

import asyncio
import io
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from benchmarks.serve.images import References
from benchmarks.serve.load import Load, Round, measured, mix
from benchmarks.serve.report import summary
from benchmarks.serve.server import ServerProcess
from benchmarks.serve.traffic import Client, Outcome
from tests.support.serve_clients import small_images

STEPS, SIZE = 3, 64


@pytest.fixture(scope="module")
def serve_bundle(tiny_bundle: Path, build_cache: Path) -> Path:
    return small_images(tiny_bundle, build_cache)


@pytest.fixture(scope="module")
def references(serve_bundle: Path) -> References:
    return References(serve_bundle, SIZE, STEPS)


@pytest.fixture(scope="module")
def server(serve_bundle: Path) -> Iterator[ServerProcess]:
    with ServerProcess(serve_bundle, "--threads", 1, "--queue", 12) as started:
        yield started


def run(server: ServerProcess, references: References, load: Load, seconds: float) -> tuple[list[Outcome], dict[str, Any]]:
    """All outcomes of two rounds, and their summary."""

    async def rounds() -> list[Round]:
        client = Client(server.url, references)
        try:
            return await measured(load, 2, seconds, 4, client, server.meter)
        finally:
            await client.http.aclose()

    done = asyncio.run(rounds())
    outcomes = [outcome for one in done for outcome in one.outcomes]
    rates = [(one.bare, one.served) for one in done]
    return outcomes, summary(rates, outcomes, [sample for one in done for sample in one.memory])


def test_mixed_requests_of_eight_clients(server: ServerProcess, references: References) -> None:
    load = Load(8, 0.0, mix("valid=6,invalid=3,aborted=2,malformed=2"), seed=0)
    outcomes, figures = run(server, references, load, 4.0)
    assert figures["examples"] == []
    assert figures["failures"] == figures["lost"] == figures["crossed"] == figures["differs"] == 0
    assert {outcome.kind for outcome in outcomes} == set(load.mix)
    assert figures["images"] >= 20
    assert figures["memory_mib"]["last_quarter"] - figures["memory_mib"]["second_quarter"] < 16
    assert httpx.get(f"{server.url}/health/ready").status_code == 200


def test_more_requests_than_it_can_draw(server: ServerProcess, references: References) -> None:
    """What does not fit into the queue gets 429; what does gets its image."""
    outcomes, figures = run(server, references, Load(0, 200.0, {"valid": 1.0}, seed=1), 2.0)
    assert figures["failures"] == 0, figures["examples"]
    refused = [outcome for outcome in outcomes if outcome.status == 429]
    assert refused
    assert figures["images"] >= 10
    assert {outcome.status for outcome in outcomes} == {200, 429}


def png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def test_the_load_script_tells_wrong_images_from_right_ones(references: References) -> None:
    item, other = references.drawn[0], references.drawn[1]
    right, crossed = (references.pixels[each, each.seed] for each in (item, other))
    wrong = right.copy()
    wrong[5, 7, 1] ^= 1
    assert references.judge(item, [png(right)]) == "ok"
    assert references.judge(item, [png(crossed)]) == "crossed"
    assert references.judge(item, [png(wrong)]) == "differs"
    assert references.judge(item, [png(wrong)], most=1) == "ok"
    assert references.judge(item, [png(right), png(right)]) == "differs"
    assert references.judge(item, []) == "differs"
    assert not np.array_equal(right, crossed)


def test_requests_without_an_answer_are_lost(references: References) -> None:
    """A server that ends in the middle of a load."""

    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    async def outcomes() -> list[Outcome]:
        listener = await asyncio.start_server(cut, "127.0.0.1", 0)
        client = Client(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", references)
        async with listener:
            return [await client.send(kind, random.Random(0)) for kind in ("valid", "invalid", "malformed")]

    assert [outcome.verdict for outcome in asyncio.run(outcomes())] == ["lost"] * 3


def test_the_script_as_it_is_called(serve_bundle: Path, tmp_path: Path) -> None:
    words = ("--clients", 2, "--seconds", 2, "--rounds", 1, "--size", SIZE, "--steps", STEPS, "-o", tmp_path / "load")
    command = [sys.executable, "-m", "benchmarks.serve.load", serve_bundle, *words]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    result = json.loads((tmp_path / "load.json").read_text("utf-8"))
    assert result["conditions"]["clients"] == 2
    assert result["summary"]["images"] > 0
    assert result["summary"]["throughput_ratio"] > 0
    assert "| 2 clients |" in ran.stdout
