"""OpenAI's official client, unchanged, with a real server: the images are those of the runtime."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai import AuthenticationError, BadRequestError, OpenAI
from PIL import Image

from benchmarks.serve.server import ServerProcess
from sana_export import SanaRuntime
from tests.support.serve_clients import small_images

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "examples" / "serve" / "openai_client.py"
KEY = "a-key-of-the-tests-0123456789"
QUICK = {"num_inference_steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def bundle(img2img_bundle: Path, build_cache: Path) -> Path:
    return small_images(img2img_bundle, build_cache)


@pytest.fixture(scope="module")
def runtime(bundle: Path) -> SanaRuntime:
    return SanaRuntime.from_pretrained(bundle, backend="onnxruntime", threads=1)


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[ServerProcess]:
    with ServerProcess(bundle, "--threads", 1, "--name", "small", environment={"SANA_EXPORT_API_KEYS": f"tests:{KEY}"}) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def pixels(file: bytes | str) -> Any:
    content = base64.b64decode(file) if isinstance(file, str) else file
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def drawn(runtime: SanaRuntime, prompt: str, **words: Any) -> Any:
    return np.asarray(runtime(prompt, **words).images[0])


def test_images(client: OpenAI, runtime: SanaRuntime) -> None:
    answer = client.images.generate(model="small", prompt="a panda", n=2, size="64x64", extra_body=QUICK)
    assert answer.size == "64x64"
    for number, image in enumerate(answer.data):
        assert image.seed == 3 + number
        expected = drawn(runtime, "a panda", seed=3 + number, height=64, width=64, num_inference_steps=2)
        assert np.array_equal(pixels(image.b64_json), expected)


def test_a_stream(client: OpenAI, runtime: SanaRuntime) -> None:
    body = {"num_inference_steps": 6, "seed": 3}
    events = list(client.images.generate(prompt="a panda", size="64x64", stream=True, partial_images=2, extra_body=body))
    assert [event.type.partition(".")[2] for event in events] == ["partial_image", "partial_image", "completed"]
    assert [event.partial_image_index for event in events[:-1]] == [0, 1]
    expected = drawn(runtime, "a panda", seed=3, height=64, width=64, num_inference_steps=6)
    assert np.array_equal(pixels(events[-1].b64_json), expected)


def test_an_edit_with_a_mask(client: OpenAI, runtime: SanaRuntime) -> None:
    rng = np.random.default_rng(0)
    source = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
    opaque = np.full((64, 64), 255, np.uint8)
    opaque[:32] = 0
    mask = Image.merge("RGBA", [*Image.new("RGB", (64, 64)).split(), Image.fromarray(opaque)])
    answer = client.images.edit(
        image=("source.png", file(source)), mask=("mask.png", file(mask)), prompt="a panda", size="64x64", extra_body=QUICK
    )
    white_is_new = Image.fromarray(255 - opaque)
    words = {"image": source, "mask": white_is_new, "strength": 0.6, "height": 64, "width": 64, "num_inference_steps": 2, "seed": 3}
    assert np.array_equal(pixels(answer.data[0].b64_json), drawn(runtime, "a panda", **words))


def file(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def test_errors_are_the_clients_own(client: OpenAI, server: ServerProcess) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.images.generate(prompt="a panda", extra_body={"colour": "red"})
    assert (refused.value.code, refused.value.param) == ("unknown_parameter", "colour")
    with pytest.raises(AuthenticationError) as unknown:
        OpenAI(base_url=f"{server.url}/v1", api_key="another", max_retries=0).images.generate(prompt="a panda")
    assert unknown.value.code == "invalid_api_key"
    assert KEY not in server.log()


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
        assert np.array_equal(
            pixels((tmp_path / f"apple-{number}.png").read_bytes()), drawn(runtime, "a red apple", seed=7 + number)
        )
