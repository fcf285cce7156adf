"""deploy/triton: the model draws the runtime's images, and its configuration declares what it takes and gives."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sana_export.errors import ArtifactError
from sana_export.runtime import SanaRuntime
from tests.support import triton_backend
from tests.support.triton_backend import ModelFile

MODEL = Path(__file__).parents[2] / "deploy" / "triton" / "sana"


@pytest.fixture(scope="module")
def utils() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        yield triton_backend.install(patch)


@pytest.fixture(scope="module")
def code(utils: Any) -> Any:
    spec = importlib.util.spec_from_file_location("triton_model", MODEL / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


@pytest.fixture(scope="module")
def config() -> ModelFile:
    return ModelFile.read(MODEL / "config.pbtxt")


@pytest.fixture(scope="module")
def model(code: Any, config: ModelFile, tiny_bundle: Path) -> Iterator[Any]:
    made = code.TritonPythonModel()
    made.initialize(config.arguments(bundle=str(tiny_bundle), backend="onnxruntime"))
    yield made
    made.finalize()


def column(*values: Any, dtype: Any = np.object_) -> Any:
    return np.array(values, dtype).reshape(-1, 1)


def settings(count: int = 1, **others: Any) -> dict[str, Any]:
    return {"num_inference_steps": column(*[2] * count, dtype=np.int32), **others}


def test_the_configuration_declares_every_input_of_the_model(code: Any, config: ModelFile) -> None:
    assert list(config.inputs) == list(code.INPUTS)
    assert [name for name, declared in config.inputs.items() if not declared.optional] == ["prompt"]


def test_each_element_is_the_runtimes_image(model: Any, config: ModelFile, tiny_runtime: SanaRuntime) -> None:
    first = config.request(
        prompt=column(b"a red circle", "ein grüner Baum".encode()), seed=column(3, 4, dtype=np.int64), **settings(2)
    )
    second = config.request(prompt=column(b"a blue square"), guidance_scale=column(1.0, dtype=np.float32), **settings())
    answers = [response.arrays(config) for response in model.execute([first, second])]
    assert answers[0]["image"].shape == (2, 512, 512, 3)
    assert answers[0]["seed"].tolist() == [[3], [4]]
    for index, (prompt, seed) in enumerate((("a red circle", 3), ("ein grüner Baum", 4))):
        wanted = np.asarray(tiny_runtime(prompt, num_inference_steps=2, seed=seed).images[0], np.int16)
        assert np.abs(answers[0]["image"][index] - wanted).max() <= 1
    wanted = tiny_runtime("a blue square", num_inference_steps=2, guidance_scale=1.0, seed=int(answers[1]["seed"][0, 0]))
    assert np.abs(answers[1]["image"][0] - np.asarray(wanted.images[0], np.int16)).max() <= 1


def test_one_wrong_request_does_not_hurt_the_others(model: Any, config: ModelFile, utils: Any) -> None:
    prompt = column(b"a red circle")
    wrong_steps = config.request(prompt=prompt, num_inference_steps=column(-1, dtype=np.int32))
    wrong_text = config.request(prompt=column(b"\xff"), **settings())
    wrong_size = config.request(prompt=prompt, height=column(-8, dtype=np.int32), **settings())
    uneven = config.request(
        prompt=column(b"a", b"b"), height=column(512, 256, dtype=np.int32), width=column(512, 512, dtype=np.int32), **settings(2)
    )
    fine = config.request(prompt=prompt, **settings())
    *wrong, right = model.execute([wrong_steps, wrong_text, wrong_size, uneven, fine])
    texts = [response.error.message() for response in wrong]
    for text, words in zip(texts, ("num_inference_steps", "not UTF-8", "height", "different sizes"), strict=True):
        assert words in text
    assert right.arrays(config)["image"].shape == (1, 512, 512, 3)


def test_a_fault_of_the_server_is_logged_and_not_told(
    model: Any, config: ModelFile, utils: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ArtifactError("/srv/bundle is damaged")

    monkeypatch.setattr(model.runtime, "generate_many", lambda *_, **__: (broken() for _ in "1"))
    (answer,) = model.execute([config.request(prompt=column(b"a"), **settings())])
    assert answer.error.message() == "the image could not be drawn"
    assert utils.Logger.errors == ["/srv/bundle is damaged"]


def test_a_request_that_everybody_left_stops(model: Any, config: ModelFile) -> None:
    request = config.request(prompt=column(b"a"), num_inference_steps=column(1000, dtype=np.int32))
    request.cancelled = True
    (answer,) = model.execute([request])  # a thousand steps would take minutes
    assert answer.error is not None


def test_a_bundle_that_cannot_be_loaded_is_tritons_error(code: Any, config: ModelFile, utils: Any, tmp_path: Path) -> None:
    with pytest.raises(utils.TritonModelException, match="is not a bundle"):
        code.TritonPythonModel().initialize(config.arguments(bundle=str(tmp_path)))
