"""A real server whose disk, bundle, memory or backend fails, and what its clients see. docs/serving.md has the table."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from benchmarks.serve.server import ServerProcess
from tests.support.serve_clients import code, draw, faulty_server, in_background, metric, pixels, small_images, wait_for

#: Steps that take seconds.
LONG = 1000
UNLIMITED = (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY)


@pytest.fixture(scope="module")
def fault(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file whose word makes the server fail."""
    return tmp_path_factory.mktemp("fault") / "word"


@pytest.fixture(scope="module")
def serve_bundle(tiny_bundle: Path, build_cache: Path) -> Path:
    return small_images(tiny_bundle, build_cache)


@pytest.fixture(scope="module")
def other(serve_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second model's bundle, with files of its own."""
    import shutil

    return Path(shutil.copytree(serve_bundle, tmp_path_factory.mktemp("models") / "other"))


@pytest.fixture(scope="module")
def running(
    serve_bundle: Path, other: Path, fault: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ServerProcess, Path]]:
    """The server of all tests here, and its folder of image files."""
    folder = tmp_path_factory.mktemp("urls")
    options = ("--threads", 1, "--max-steps", LONG, "--model", f"other={other}", "--url-dir", folder)
    with faulty_server(serve_bundle, fault, *options) as server:
        yield server, folder


@pytest.fixture
def server(running: tuple[ServerProcess, Path], fault: Path) -> Iterator[ServerProcess]:
    """It draws, before and after the test."""
    expected = pixels(draw(running[0]))
    yield running[0]
    fault.write_text("")
    assert np.array_equal(pixels(draw(running[0])), expected)


def test_a_full_disk_refuses_urls_alone(server: ServerProcess, running: tuple[ServerProcess, Path]) -> None:
    before = set(running[1].rglob("*"))
    server.meter.rlimit(psutil.RLIMIT_FSIZE, (100, psutil.RLIM_INFINITY))
    try:
        refused, drawn = draw(server, response_format="url"), draw(server)
    finally:
        server.meter.rlimit(psutil.RLIMIT_FSIZE, UNLIMITED)
    assert code(refused) == (507, "disk_full")
    assert int(refused.headers["retry-after"]) > 0
    assert drawn.status_code == 200
    assert set(running[1].rglob("*")) == before, "nothing half written stays"
    url = draw(server, response_format="url", output_format="png").json()["data"][0]["url"]
    assert httpx.get(url).content.startswith(b"\x89PNG")


def damage(bundle: Path) -> tuple[Path, bytes]:
    """Change the denoiser's weights on the disk. Returns the file and what it was."""
    file = max((bundle / "onnx" / "denoiser").iterdir(), key=lambda path: path.stat().st_size)
    before = file.read_bytes()
    file.write_bytes(before[: len(before) // 2] + bytes(1000) + before[len(before) // 2 + 1000 :])
    return file, before


def test_a_model_that_is_damaged_before_it_is_loaded(server: ServerProcess, other: Path) -> None:
    file, before = damage(other)
    assert code(draw(server, model="other")) == (500, "model_damaged")
    assert draw(server).status_code == 200
    file.write_bytes(before)
    assert np.array_equal(pixels(draw(server, model="other")), pixels(draw(server))), "a repaired bundle is loaded"


def test_a_model_that_is_damaged_while_it_is_loaded(server: ServerProcess, other: Path) -> None:
    """ONNX Runtime maps the weights: it would draw another image, and the process would end if the file were shorter."""
    expected = pixels(draw(server, model="other"))
    file, before = damage(other)
    assert code(draw(server, model="other")) == (500, "model_damaged")
    file.write_bytes(before)
    assert np.array_equal(pixels(draw(server, model="other")), expected)
    with file.open("r+b") as opened:
        opened.truncate(len(before) // 2)
    assert code(draw(server, model="other")) == (500, "model_damaged")
    file.write_bytes(before)
    assert np.array_equal(pixels(draw(server, model="other")), expected)
    file.rename(file.with_suffix(".away"))
    assert np.array_equal(pixels(draw(server, model="other")), expected), "what is deleted stays loaded"
    file.with_suffix(".away").rename(file)


def test_memory_that_runs_out(server: ServerProcess, fault: Path) -> None:
    fault.write_text("memory")
    with ThreadPoolExecutor(3) as pool:
        answers = [each.result() for each in [in_background(pool, server) for _ in range(3)]]
    assert [code(answer) for answer in answers] == [(503, "out_of_resources")] * 3
    assert all(int(answer.headers["retry-after"]) > 0 for answer in answers)


def test_an_error_that_nobody_expected_says_nothing_of_the_server(server: ServerProcess, fault: Path) -> None:
    fault.write_text("unexpected")
    answer = draw(server)
    assert code(answer) == (500, "internal_error")
    assert fault.name not in answer.text
    assert f"cannot read {fault}" in server.log()


def test_a_call_that_does_not_return(server: ServerProcess, fault: Path) -> None:
    """Its client and those that wait get 504 in time, and their places are free."""
    fault.write_text("hang")
    started = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        wanted = [pool.submit(draw, server, headers={"X-Request-Timeout": "1"}) for _ in range(3)]
        answers = [each.result() for each in wanted]
    assert [code(answer) for answer in answers] == [(504, "timeout")] * 3
    assert 1 <= time.monotonic() - started < 5
    assert metric(server, "sana_queue_waiting") == 0


def test_a_request_that_takes_too_long_stops_at_the_next_step(server: ServerProcess, fault: Path) -> None:
    fault.write_text("slow")
    started = time.monotonic()
    answer = draw(server, num_inference_steps=LONG, headers={"X-Request-Timeout": "1"})
    assert code(answer) == (504, "timeout")
    wait_for(lambda: metric(server, "sana_queue_running") == 0, 3)
    assert time.monotonic() - started < 6


def test_sigterm_under_load(serve_bundle: Path, fault: Path) -> None:
    """What runs is drawn to its end, what waits gets 503, and the exit code is 0."""
    with faulty_server(serve_bundle, fault, "--threads", 1, "--batch", 1) as server, ThreadPoolExecutor(6) as pool:
        expected = pixels(draw(server, num_inference_steps=3))
        fault.write_text("slow")
        first = in_background(pool, server, num_inference_steps=3)
        wait_for(lambda: metric(server, "sana_queue_running") == 1)
        waiting = [in_background(pool, server) for _ in range(4)]
        wait_for(lambda: metric(server, "sana_queue_waiting") == 4)
        assert server.stop() == 0
        assert np.array_equal(pixels(first.result()), expected)
        for each in waiting:
            assert code(each.result()) == (503, "shutting_down")
            assert int(each.result().headers["retry-after"]) > 0


def test_sigterm_while_a_call_does_not_return(serve_bundle: Path, fault: Path) -> None:
    """Its client gets 503 and the server ends, without the call."""
    with faulty_server(serve_bundle, fault, "--threads", 1, "--shutdown-timeout", 1) as server, ThreadPoolExecutor(1) as pool:
        fault.write_text("hang")
        first = in_background(pool, server)
        wait_for(lambda: metric(server, "sana_queue_running") == 1)
        assert server.stop(20) == 0
        assert code(first.result()) == (503, "shutting_down")
        assert "a step does not end" in server.log()
