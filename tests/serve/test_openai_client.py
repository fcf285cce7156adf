"""The official `openai` client, unchanged, against real bundles: its images are those of `SanaRuntime`."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from sana_export.adapters import Lora
from sana_export.runtime import SanaRuntime
from sana_export.serve.config import ModelConfig, ServeConfig
from sana_export.serve.worker import LocalEngine
from tests.support.lora_files import diffusers_lora, load_transformer
from tests.support.serving import image_file, running

STEPS = {"num_inference_steps": 2}
SIZE = {"height": 512, "width": 512}


def decoded(b64: str | None) -> Any:
    with Image.open(io.BytesIO(base64.b64decode(b64 or ""))) as image:
        return np.asarray(image.convert("RGB"))


def pixels(image: Image.Image) -> Any:
    return np.asarray(image)


@pytest.fixture(scope="module")
def lora(tiny_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return diffusers_lora(load_transformer(tiny_checkpoint), tmp_path_factory.mktemp("lora"), r=2)


@pytest.fixture(scope="module")
def client(img2img_bundle: Path, lora: Path) -> Iterator[openai.OpenAI]:
    models = (ModelConfig("plain", img2img_bundle, threads=1), ModelConfig("styled", img2img_bundle, (Lora(lora, 0.5),), threads=1))
    config = ServeConfig(models, port=0)
    engine = LocalEngine(config)
    try:
        with running(engine, config) as address:
            yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    finally:
        engine.close()


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["plain", "styled"]
    assert client.models.retrieve("styled").owned_by == "sana-export"


def test_images_are_the_runtimes(client: openai.OpenAI, img2img_runtime: SanaRuntime) -> None:
    words = {**STEPS, "negative_prompt": "blurry", "guidance_scale": 3.0, "pag_scale": 1.0, "scheduler": "euler"}
    answer = client.images.generate(prompt="a 🐼", n=2, size="512x512", quality="high", extra_body={**words, "seed": 6})
    assert answer.data is not None
    assert (answer.size, answer.output_format) == ("512x512", "png")
    for seed, item in zip((6, 7), answer.data, strict=True):
        expected = img2img_runtime("a 🐼", seed=seed, **SIZE, **words).images[0]
        assert np.array_equal(decoded(item.b64_json), pixels(expected))


def test_a_stream(client: openai.OpenAI, img2img_runtime: SanaRuntime) -> None:
    extra = {"seed": 5, "num_inference_steps": 4}
    events: list[Any] = list(client.images.generate(prompt="a cat", stream=True, partial_images=2, extra_body=extra))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    final = pixels(img2img_runtime("a cat", seed=5, num_inference_steps=4).images[0])
    assert np.array_equal(decoded(events[-1].b64_json), final)
    errors = [np.abs(decoded(event.b64_json).astype(int) - final).mean() for event in events]
    assert errors[2] == 0 < errors[1] < errors[0] + 40  # previews of the same size, in the final image's place


def test_edits_are_the_runtimes(client: openai.OpenAI, img2img_runtime: SanaRuntime) -> None:
    start = Image.effect_mandelbrot((512, 512), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    mask = Image.new("RGBA", (512, 512), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 256, 512))
    white = Image.new("L", (512, 512))
    white.paste(255, (0, 0, 256, 512))
    extra = {"num_inference_steps": 4, "strength": 0.5, "seed": 3}
    answer = client.images.edit(image=image_file(start), mask=image_file(mask), prompt="a cat", extra_body=extra)
    assert answer.data is not None
    expected = img2img_runtime("a cat", image=start, mask=white, **extra).images[0]
    assert np.array_equal(decoded(answer.data[0].b64_json), pixels(expected))
    assert not np.array_equal(decoded(answer.data[0].b64_json), pixels(img2img_runtime("a cat", image=start, **extra).images[0]))


def test_a_lora_is_a_model_and_leaves_no_trace(client: openai.OpenAI, img2img_runtime: SanaRuntime, lora: Path) -> None:
    def drawn(model: str) -> Any:
        answer = client.images.generate(prompt="a cat", model=model, extra_body={**STEPS, "seed": 1})
        assert answer.data is not None
        return decoded(answer.data[0].b64_json)

    plain = pixels(img2img_runtime("a cat", seed=1, **STEPS).images[0])
    styled = drawn("styled")
    assert np.array_equal(drawn("plain"), plain)
    img2img_runtime.load_lora(lora, 0.5)
    try:
        assert np.array_equal(styled, pixels(img2img_runtime("a cat", seed=1, **STEPS).images[0]))
    finally:
        img2img_runtime.unload_lora()
    assert not np.array_equal(styled, plain)


def test_urls(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        prompt="a", response_format="url", output_format="jpeg", output_compression=80, extra_body=STEPS
    )
    assert answer.data is not None
    assert answer.data[0].url is not None
    with Image.open(io.BytesIO(httpx.get(answer.data[0].url).content)) as image:
        assert (image.format, image.size, image.getexif()) == ("JPEG", (512, 512), {})


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.images.generate(prompt="a", extra_body={"steps": 3})
    assert (bad.value.code, bad.value.param, bad.value.type) == ("unknown_parameter", "steps", "invalid_request_error")
    assert bad.value.request_id
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="a", model="gpt-image-1")
    with pytest.raises(openai.APIError, match=r"not ready after 0\.01 seconds"):
        client.images.generate(prompt="a", extra_headers={"X-Request-Timeout": "0.01"})


def test_a_prompt_that_is_too_long_is_not_in_the_log(client: openai.OpenAI, caplog: pytest.LogCaptureFixture) -> None:
    assert client.images.generate(prompt="word " * 700 + "secret", extra_body=STEPS).data
    assert "secret" not in caplog.text
    assert "word" not in caplog.text


def test_a_bundle_that_is_damaged_while_it_is_served(tiny_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    config = ServeConfig((ModelConfig("plain", bundle, threads=1),), port=0)
    engine = LocalEngine(config)
    decoder = next((bundle / "onnx" / "vae_decoder").glob("*.data"))
    whole = decoder.read_bytes()
    try:
        engine.load()  # the decoder is loaded with the first image
        decoder.write_bytes(whole[: len(whole) // 2])
        with running(engine, config) as address:
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
            for _ in range(2):
                with pytest.raises(openai.InternalServerError) as caught:
                    client.images.generate(prompt="a", extra_body=STEPS)
                assert caught.value.code == "model_damaged"
                assert "'plain'" in str(caught.value)
                assert str(tmp_path) not in str(caught.value)
            assert "the model plain failed: onnx/vae_decoder/model.onnx.data is damaged" in caplog.text
            decoder.write_bytes(whole)
            assert client.images.generate(prompt="a", extra_body=STEPS).data
    finally:
        engine.close()
