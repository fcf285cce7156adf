"""`sana-export serve` as a process: its start, its end by a signal, and its exit codes."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from sana_export.cli.main import parse
from sana_export.cli.verbs.serve import serve_config
from sana_export.serve.config import ModelConfig, ServeConfig
from sana_export.serve.run import GracefulServer, server_settings
from tests.support.command_line import Cli, command
from tests.support.serving import StandInEngine, wait_for

PROMPT = {"prompt": "a cat", "num_inference_steps": 6}


@contextmanager
def served(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process and its address."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command("serve", *arguments, "--port", 0, "--threads", 1),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.match(r"(http://\S+) serves", line):
                yield process, found[1]
                break
        else:
            raise AssertionError("".join(lines))
    finally:
        process.kill()
        process.communicate()


def test_a_signal_finishes_what_runs_refuses_what_waits_and_exits_0(tiny_bundle: Path) -> None:
    def ask(address: str, seed: int) -> httpx.Response:
        return httpx.post(f"{address}/v1/images/generations", json={**PROMPT, "seed": seed}, timeout=60)

    def state(address: str, name: str) -> float:
        text = httpx.get(f"{address}/metrics").text
        return float((re.search(rf"^sana_queue_{name} (\S+)$", text, re.MULTILINE) or ["", "-1"])[1])

    with served(tiny_bundle, "--batch", 1, "--name", "tiny") as (process, address), ThreadPoolExecutor(3) as pool:
        running = pool.submit(ask, address, 1)
        wait_for(lambda: state(address, "running") == 1)
        waiting = [pool.submit(ask, address, seed) for seed in (2, 3)]
        wait_for(lambda: state(address, "waiting") == 2)
        process.send_signal(signal.SIGTERM)
        for each in waiting:
            assert each.result().status_code == 503
            assert each.result().json()["error"]["code"] == "shutting_down"
            assert each.result().headers["retry-after"] == "5"
        assert running.result().status_code == 200
        assert process.wait(30) == 0


def test_a_second_signal_stops_what_runs(tiny_bundle: Path) -> None:
    with served(tiny_bundle) as (process, address), ThreadPoolExecutor(1) as pool:
        endless = pool.submit(
            httpx.post, f"{address}/v1/images/generations", json={**PROMPT, "num_inference_steps": 100, "n": 10}, timeout=60
        )
        wait_for(lambda: "sana_queue_running 4.0" in httpx.get(f"{address}/metrics").text)
        process.send_signal(signal.SIGINT)
        wait_for(lambda: httpx.get(f"{address}/health/ready").status_code == 503)
        process.send_signal(signal.SIGTERM)
        assert endless.result().status_code == 503
        assert process.wait(30) == 0


def test_what_cannot_be_served_is_said_at_once(
    cli: Cli, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = cli("serve", tiny_bundle, "--host", "0.0.0.0")
    assert (ran.code, "may only listen on loopback" in ran.err) == (2, True)
    ran = cli("serve", tmp_path / "none")
    assert ran.code == 4
    ran = cli("serve", tiny_bundle, "--queue", 2)
    assert (ran.code, "--queue 10" in ran.err) == (2, True)
    ran = cli("serve", tiny_bundle, "--content-filter", "no_such_module:x", "--port", 0)
    assert (ran.code, "no_such_module" in ran.err) == (2, True)
    monkeypatch.setenv("SANA_EXPORT_API_KEYS", "short")
    ran = cli("serve", tiny_bundle)
    assert (ran.code, "openssl rand" in ran.err) == (2, True)
    monkeypatch.delenv("SANA_EXPORT_API_KEYS")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ran = cli("serve", tiny_bundle, "--port", taken.getsockname()[1])
        assert (ran.code, "cannot listen on 127.0.0.1" in ran.err) == (3, True)


def config_of(*arguments: object) -> Any:
    return serve_config(parse(["serve", *map(str, arguments)]))


def test_options_become_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SANA_EXPORT_API_KEYS", raising=False)
    keys = tmp_path / "keys"
    keys.write_text("me:0123456789abcdef\n")
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    config = config_of(
        *("models/my bundle", "--model", "other=someone/repo@main", "--memory-budget", "20G", "--device", 1),
        *("--lora", f"style={tmp_path}/a.safetensors:0.5", "--lora", f"style={tmp_path}/b.safetensors"),
        *("--host", "0.0.0.0", "--port", 9, "--api-keys", keys, "--queue", 20, "--batch", 2, "--batch-wait", 5.5, "--timeout", 30),
        *("--max-prompt", 9, "--max-pixels", 8, "--max-images", 7, "--max-steps", 6, "--max-body", "1M", "--max-connections", 5),
        *("--shutdown-timeout", 4, "--url-dir", tmp_path, "--url-seconds", 60, "--log-prompts", "--content-filter", "m:f"),
    )
    assert [(model.name, str(model.bundle), model.device) for model in config.models] == [
        ("my-bundle", "models/my bundle", 1),
        ("other", "someone/repo@main", 1),
        ("style", "models/my bundle", 1),
    ]
    assert [(lora.path.name, lora.scale) for lora in config.models[2].loras] == [("a.safetensors", 0.5), ("b.safetensors", 1.0)]
    assert (config.host, config.port, dict(config.keys), config.memory_budget) == (
        "0.0.0.0",
        9,
        {"me": "0123456789abcdef"},
        20 * 2**30,
    )
    queue, limits = config.queue, config.limits
    assert (queue.places, queue.max_batch, queue.batch_wait_ms, queue.timeout) == (20, 2, 5.5, 30)
    assert (limits.prompt_characters, limits.pixels, limits.images, limits.steps) == (9, 8, 7, 6)
    assert (limits.body_bytes, limits.connections) == (2**20, 5)
    assert (config.shutdown_seconds, config.url_folder, config.url_seconds) == (4, tmp_path, 60)
    assert (config.log_prompts, config.content_filters, config.preview, config.image_metadata) == (True, ("m:f",), "linear", False)


def test_the_default_configuration_is_that_of_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SANA_EXPORT_API_KEYS", raising=False)
    assert config_of("bundle") == ServeConfig((ModelConfig("bundle", "bundle"),))


@pytest.mark.parametrize(
    "arguments",
    [
        *(("--model", "x"), ("--model", "a b=c"), ("--lora", "=x"), ("--memory-budget", "lots"), ("--name", "a/b"), ("--name", "")),
        *(("--shutdown-timeout", "inf"), ("--timeout", "nan"), ("--timeout", "0"), ("--timeout", "-3"), ("--timeout", "soon")),
        *(("--batch-wait", "nan"), ("--batch-wait", "-1"), ("--timeout", "1e300")),
        *(("--public-url", "foo"), ("--public-url", "ftp://a"), ("--public-url", "http://[a"), ("--public-url", "http://a?b=c")),
    ],
)
def test_bad_options(cli: Cli, arguments: tuple[str, str]) -> None:
    ran = cli("serve", "bundle", *arguments)
    assert ran.code == 2
    assert arguments[1] in ran.err


def test_answers_get_the_rest_of_the_time_after_draining() -> None:
    class Slow(StandInEngine):
        async def drain(self) -> None:
            await asyncio.sleep(1.1)

    async def left(seconds: float) -> int | None:
        config = ServeConfig((ModelConfig("x", "unused"),), shutdown_seconds=seconds)
        server = GracefulServer(server_settings(FastAPI(), config), Slow(), lambda: None)
        await server._drain()
        assert server.should_exit
        return server.config.timeout_graceful_shutdown

    async def main() -> list[int | None]:
        return await asyncio.gather(left(100), left(1))

    long, short = asyncio.run(main())
    assert long is not None
    assert 50 < long <= 99
    assert short == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "bundle=other"),
        ("--model", "large=other", "--model", "large=third"),
        ("--model", "large=other", "--lora", "large=x.safetensors"),
        ("--lora", "bundle=x.safetensors"),
    ],
)
def test_a_name_of_two_models_is_refused(cli: Cli, arguments: tuple[str, ...]) -> None:
    ran = cli("serve", "bundle", *arguments)
    assert (ran.code, f"two models have the name {arguments[-1].partition('=')[0]}" in ran.err) == (2, True)
