"""Previews look like the decoded image, and cost next to nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sana_export import Request, SanaRuntime
from sana_export.checkpoint.checkpoint import EMBEDDED
from sana_export.errors import UsageError
from sana_export.runtime.preview import FIT_IMAGES, FIT_SIDE, fit_projection, project

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {"height": 256, "width": 320, "use_resolution_binning": False, "num_inference_steps": 3}


def similarity(preview: Image.Image, image: Image.Image) -> float:
    """Correlation of a preview's values with those of the image at the preview's size."""
    small = np.asarray(image.resize(preview.size, Image.Resampling.BOX), dtype=np.float64)
    return float(np.corrcoef(small.ravel(), np.asarray(preview, dtype=np.float64).ravel())[0, 1])


@pytest.fixture(scope="module")
def autoencoder() -> Any:
    """That of `tiny`, which was trained, in diffusers."""
    import torch
    from diffusers import AutoencoderDC

    class Autoencoder:
        model = AutoencoderDC.from_pretrained(EMBEDDED / "tiny", subfolder="vae", torch_dtype=torch.float32).eval()

        @torch.no_grad()
        def encode(self, image: Image.Image) -> np.ndarray:
            pixels = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
            return (self.model.encode(pixels).latent * self.model.config.scaling_factor).numpy()

        @torch.no_grad()
        def decode(self, latents: np.ndarray) -> np.ndarray:
            return self.model.decode(torch.from_numpy(latents) / self.model.config.scaling_factor).sample.numpy()

    return Autoencoder()


def test_the_projection_resembles_pictures(autoencoder: Any) -> None:
    """Fitted to random latents, shown on the latents of real pictures."""
    projection = fit_projection(autoencoder.decode, (1, autoencoder.model.config.latent_channels, FIT_SIDE, FIT_SIDE), FIT_IMAGES)
    with Image.open(ROOT / "docs/pictures/tiny-held-out.png") as page:
        pictures = [page.convert("RGB").crop((x, y, x + 256, y + 256)) for x, y in ((0, 0), (256, 0), (128, 256))]
    found = [[similarity(preview, other) for other in pictures] for preview in map(show(autoencoder, projection), pictures)]
    assert np.diagonal(found).min() > 0.75
    assert np.argmax(found, axis=1).tolist() == [0, 1, 2]


def show(autoencoder: Any, projection: np.ndarray) -> Any:
    return lambda picture: Image.fromarray(project(autoencoder.encode(picture), projection)[0])


def test_it_is_the_same_in_every_runtime(tiny_runtime: SanaRuntime, tiny_bundle: Path) -> None:
    latents = np.random.default_rng(0).standard_normal((2, 32, 3, 5)).astype(np.float32)
    with SanaRuntime.from_pretrained(tiny_bundle, backend="onnxruntime") as other:
        for one, two in zip(tiny_runtime.preview(latents), other.preview(latents), strict=True):
            assert one.size == (5, 3)
            np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


def test_a_callback_sees_the_image_that_the_model_expects(tiny_runtime: SanaRuntime) -> None:
    shown: list[tuple[Any, Any]] = []

    def on_step(runtime: SanaRuntime, index: int, timestep: float, tensors: dict[str, Any]) -> None:
        shown.append((runtime.preview()[0], runtime.preview(tensors["latents"])[0]))

    tiny_runtime("a red apple", seed=1, callback_on_step_end=on_step, **SMALL)
    plan = tiny_runtime.plan(Request(prompt="a red apple", seed=1, **SMALL))
    for (expected, noisy), step in zip(shown, tiny_runtime.steps(plan, tiny_runtime.encode(plan)), strict=True):
        np.testing.assert_array_equal(np.asarray(expected), np.asarray(tiny_runtime.preview(step.x0)[0]))
        np.testing.assert_array_equal(np.asarray(noisy), np.asarray(tiny_runtime.preview(tiny_runtime.to_host(step.latents))[0]))
    assert not np.array_equal(np.asarray(shown[0][0]), np.asarray(shown[0][1]))
    with pytest.raises(UsageError, match="outside a callback"):
        tiny_runtime.preview()


def test_the_decoder_gives_the_whole_image(tiny_runtime: SanaRuntime) -> None:
    latents = tiny_runtime("a", seed=1, output_type="latent", **SMALL).images
    wanted = tiny_runtime("a", seed=1, **SMALL).images[0]
    np.testing.assert_array_equal(np.asarray(tiny_runtime.preview(latents, method="decoder")[0]), np.asarray(wanted))


@pytest.mark.parametrize(
    ("latents", "method", "words"),
    [
        (np.zeros((1, 32, 4, 4)), "fast", "unknown method"),
        (np.zeros((1, 4, 4, 4)), "linear", "cannot be shown"),
        (np.zeros((32, 4, 4)), "linear", "cannot be shown"),
        (np.zeros((0, 32, 4, 4)), "decoder", "cannot be shown"),
        (np.full((1, 32, 4, 4), np.nan), "linear", "must be finite"),
        ("x", "linear", "not an array"),
    ],
)
def test_what_cannot_be_shown(tiny_runtime: SanaRuntime, latents: Any, method: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        tiny_runtime.preview(latents, method=method)
