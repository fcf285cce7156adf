"""The example with OpenAI's official client draws what the runtime draws."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.serve.server import ServerProcess
from sana_export import SanaRuntime
from tests.support.serve_clients import small_images

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "examples" / "serve" / "openai_client.py"
KEY = "a-key-of-the-tests-0123456789"


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, build_cache: Path) -> Path:
    return small_images(tiny_bundle, build_cache)


@pytest.fixture(scope="module")
def runtime(bundle: Path) -> SanaRuntime:
    return SanaRuntime.from_pretrained(bundle, backend="onnxruntime", threads=1)


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[ServerProcess]:
    with ServerProcess(bundle, "--threads", 1, "--name", "small", environment={"SANA_EXPORT_API_KEYS": f"tests:{KEY}"}) as started:
        yield started


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path).convert("RGB"))


def drawn(runtime: SanaRuntime, prompt: str, **words: Any) -> Any:
    return np.asarray(runtime(prompt, **words).images[0])


def test_the_example(server: ServerProcess, runtime: SanaRuntime, tmp_path: Path) -> None:
    words = ("--url", f"{server.url}/v1", "--output", tmp_path)
    command = [sys.executable, PROGRAM, *words]
    ran = subprocess.run(
        list(map(str, command)), env={**os.environ, "OPENAI_API_KEY": KEY}, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[0] == "model: small"
    assert "404 model_not_found" in ran.stdout
    for number in range(2):
        assert np.array_equal(pixels(tmp_path / f"apple-{number}.png"), drawn(runtime, "a red apple", seed=7 + number))
