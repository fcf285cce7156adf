"""A bundle of links: every file of a repository in the hub's cache is a link to `../../blobs/<sha256>`."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sana_export.errors import ArtifactError
from sana_export.export.evaluator import StorageEvaluator
from sana_export.runtime import SanaRuntime
from sana_export.verify.evaluator_backend import evaluator_backend
from tests.support.lora_files import diffusers_lora, load_transformer

SMALL: dict[str, Any] = {"height": 96, "width": 160, "use_resolution_binning": False, "num_inference_steps": 2, "seed": 1}


def link_all(bundle: Path, target: Path, *, apart: bool) -> Path:
    """A copy of `bundle` in the layout of the hub's cache. `apart`: each file has a folder of its own, as with annexed files."""
    snapshot = target / "snapshots" / "abc"
    for file in [path for path in bundle.rglob("*") if path.is_file()]:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        blob = target / "blobs" / (f"{digest}/{file.name}" if apart else digest)
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize("apart", [False, True], ids=["one folder", "a folder for each file"])
def test_it_runs_as_the_files_themselves(
    tiny_bundle: Path, tiny_runtime: SanaRuntime, tiny_checkpoint: Any, tmp_path: Path, apart: bool
) -> None:
    lora = diffusers_lora(load_transformer(tiny_checkpoint), tmp_path / "lora", r=4, lora_alpha=7)
    wanted = tiny_runtime("a red fox", output_type="latent", **SMALL).images
    with SanaRuntime.from_pretrained(link_all(tiny_bundle, tmp_path / "hub", apart=apart), backend="onnxruntime") as runtime:
        np.testing.assert_array_equal(runtime("a red fox", output_type="latent", **SMALL).images, wanted)
        np.testing.assert_array_equal(
            np.asarray(runtime("a red fox", **SMALL).images[0]), np.asarray(tiny_runtime("a red fox", **SMALL).images[0])
        )
        runtime.load_lora(lora)
        assert np.abs(runtime("a red fox", output_type="latent", **SMALL).images - wanted).max() > 0.1
        runtime.unload_lora()
        np.testing.assert_array_equal(runtime("a red fox", output_type="latent", **SMALL).images, wanted)


def test_the_evaluator_of_verify_reads_it_too(tiny_bundle: Path, tiny_runtime: SanaRuntime, tmp_path: Path) -> None:
    linked = link_all(tiny_bundle, tmp_path / "hub", apart=True)
    with SanaRuntime.from_pretrained(linked, backend=evaluator_backend(StorageEvaluator, "evaluator")) as runtime:
        found = runtime("a red fox", output_type="latent", **SMALL).images
    np.testing.assert_allclose(found, tiny_runtime("a red fox", output_type="latent", **SMALL).images, atol=1e-4)


@pytest.mark.parametrize("name", ["onnx/denoiser/model.onnx", "onnx/denoiser/model.onnx.data", "tokenizer/tokenizer.json"])
def test_a_link_to_another_file_is_refused(tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    linked = link_all(tiny_bundle, tmp_path / "hub", apart=False)
    secret = tmp_path / "secret"
    secret.write_bytes((linked / name).read_bytes()[:-1] + b"x")
    (linked / name).unlink()
    (linked / name).symlink_to(secret)
    with pytest.raises(ArtifactError, match="a link to a file outside the bundle") as caught:
        SanaRuntime.from_pretrained(linked, backend="onnxruntime")
    assert hashlib.sha256(secret.read_bytes()).hexdigest()[:8] not in str(caught.value)


@pytest.mark.parametrize("name", ["embeddings.safetensors", "onnx/sampler/model.onnx"])
def test_a_link_to_itself_is_a_missing_file(tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    bundle = link_all(tiny_bundle, tmp_path / "hub", apart=False)
    (bundle / name).unlink()
    (bundle / name).symlink_to((bundle / name).name)
    with pytest.raises(ArtifactError, match="is missing from"):
        SanaRuntime.from_pretrained(bundle, backend="onnxruntime")
