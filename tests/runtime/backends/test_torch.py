"""The torch backend: its images against ONNX Runtime's and diffusers', its checkpoint, and that its graphs stay on one device."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SanaPAGPipeline
from torch._subclasses.fake_tensor import FakeTensorMode

from sana_export.checkpoint.checkpoint import open_checkpoint
from sana_export.contract import GRAPHS, GraphSpec, TensorSpec
from sana_export.errors import ArtifactError, DependencyError
from sana_export.export.example_inputs import CHECK_SIZES, fitting, graph_spec, random_inputs
from sana_export.export.parity import compare_images
from sana_export.graphs.builders import build_graph
from sana_export.installation import install_command
from sana_export.manifest import Manifest, Options
from sana_export.runtime import SanaRuntime
from sana_export.runtime.backends import open_backend
from sana_export.runtime.backends import torch as torch_backend
from sana_export.synth.checkpoint import make_checkpoint
from sana_export.verify.bundle import Sampling, verify_bundle
from tests.support.bundles import PAG_LAYER

SMALL: dict[str, Any] = {"height": 96, "width": 160, "use_resolution_binning": False, "num_inference_steps": 3}
PROMPT = "A cute 🐼 eating 🎋, 水墨画 style"


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Path) -> SanaRuntime:
    return SanaRuntime.from_pretrained(tiny_bundle, backend="torch")


def pixels(images: Any) -> Any:
    return np.stack([np.asarray(image) for image in images])


def assert_same(found: Any, wanted: Any) -> None:
    found, wanted = pixels(found), pixels(wanted)
    assert wanted.std() > 20, "the reference draws something"
    parity = compare_images("image", found, wanted, "fp32")
    assert parity.passed, parity


#: What is asked of the runtimes, and what of it diffusers calls by another name or lacks.
REQUESTS: dict[str, dict[str, Any]] = {
    "guidance": {"guidance_scale": 4.5},
    "no guidance": {"guidance_scale": 1.0},
    "PAG": {"guidance_scale": 5.0, "pag_scale": 2.0},
    "two images": {"guidance_scale": 4.5, "num_images_per_prompt": 2},
    "tiles": {"guidance_scale": 4.5, "height": 256, "width": 288, "decoder_tile": 128},
}


@pytest.mark.parametrize("name", REQUESTS)
def test_it_draws_what_onnxruntime_and_diffusers_draw(
    runtime: SanaRuntime, tiny_runtime: SanaRuntime, tiny_pipeline: Any, name: str
) -> None:
    request = {**SMALL, **REQUESTS[name]}
    count = request.get("num_images_per_prompt", 1)
    seeds = list(range(7, 7 + count))
    found = runtime(PROMPT, seed=seeds, **request).images
    assert runtime.backend.name == "torch"
    assert_same(found, tiny_runtime(PROMPT, seed=seeds, **request).images)
    request.pop("decoder_tile", None)
    pipeline = tiny_pipeline
    if "pag_scale" in request:
        pipeline = SanaPAGPipeline(**tiny_pipeline.components, pag_applied_layers=[rf"^{PAG_LAYER}\.attn1$"])
        pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    assert_same(found, pipeline(PROMPT, generator=generators, **request).images)


def test_sprint(sprint_bundle: Path, sprint_runtime: SanaRuntime, sprint_pipeline: Any) -> None:
    request = {**SMALL, "num_inference_steps": 2}
    found = SanaRuntime.from_pretrained(sprint_bundle, backend="torch")(PROMPT, seed=3, **request).images
    assert_same(found, sprint_runtime(PROMPT, seed=3, **request).images)
    assert_same(found, sprint_pipeline(PROMPT, generator=torch.Generator("cpu").manual_seed(3), **request).images)


@pytest.mark.slow
def test_compiled_blocks_draw_the_same(tiny_bundle: Path, tiny_runtime: SanaRuntime) -> None:
    request = {**SMALL, "height": 64, "width": 96, "num_inference_steps": 1}
    compiled = SanaRuntime.from_pretrained(tiny_bundle, backend="torch-compile")
    assert_same(compiled("a fox", seed=1, **request).images, tiny_runtime("a fox", seed=1, **request).images)
    assert compiled.backend.name == "torch-compile"


def test_more_kinds_of_block_are_compiled_than_pytorch_s_limit() -> None:
    """Twenty blocks that differ in a number, which all share the limit of their class."""
    compiled = []

    class Block(torch.nn.Module):
        def __init__(self, factor: int) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, timestep: torch.Tensor) -> torch.Tensor:
            return timestep * self.factor

    def compiler(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    blocks = [torch.compile(Block(factor), backend=compiler) for factor in range(1, 21)]
    spec = GraphSpec("blocks", (TensorSpec("timestep", "float32", (1,)),), (TensorSpec("product", "float32", (1,)),))
    for block in blocks:
        torch_backend.TorchSession(spec, block, "cpu", compiled=True).run({"timestep": np.ones(1, np.float32)})
    assert len(compiled) == len(blocks)


def test_verify_runs_it(tiny_bundle: Path, tiny_checkpoint: Any, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "b")
    report = verify_bundle(bundle, tiny_checkpoint, Sampling(["a red apple"], 96, 128, 3), backend="torch")
    assert report.passed, report.as_text()
    assert report.backend == "torch"
    assert len(report.images) == 2


@pytest.fixture
def own_checkpoint(tmp_path: Path) -> Path:
    """A checkpoint that a test may change."""
    return make_checkpoint("tiny-random", tmp_path / "checkpoint", seed=11)


def other_weights(checkpoint: Path) -> None:
    make_checkpoint("tiny-random", checkpoint, seed=12)


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "gone": (shutil.rmtree, "cannot open it"),
    "a file gone": (lambda folder: next(folder.glob("vae/*.safetensors")).unlink(), "cannot open it"),
    "other weights": (other_weights, "has changed since"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_checkpoint_has_to_be_the_one_of_the_manifest(tiny_bundle: Path, own_checkpoint: Path, change: str) -> None:
    do, message = CHANGES[change]
    record = open_checkpoint(str(own_checkpoint)).record()
    manifest = dataclasses.replace(Manifest.load(tiny_bundle), checkpoint=record)
    assert open_backend("torch", tiny_bundle, manifest).name == "torch"
    do(own_checkpoint)
    with pytest.raises(ArtifactError, match=message) as refused:
        open_backend("torch", tiny_bundle, manifest)
    assert f"hash {record.sha256[:16]}" in str(refused.value.wanted)
    assert f"sana-export export {own_checkpoint} -o {tiny_bundle}" in str(refused.value.fix)
    assert refused.value.exit_code == 4


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_compute_where_their_weights_and_inputs_are(controlnet_checkpoint: Any, name: str, precision: str) -> None:
    """On a device that is not the CPU and has no values: a tensor that a graph creates on the CPU is refused."""
    options = Options(precision, True, (1,))
    module, spec = build_graph(name, controlnet_checkpoint, options), graph_spec(name, controlnet_checkpoint, options)
    inputs = random_inputs(spec, fitting(CHECK_SIZES, name, controlnet_checkpoint), 0)
    with FakeTensorMode():
        weights, feeds = (
            {key: torch.empty(value.shape, dtype=value.dtype, device="meta") for key, value in tensors.items()}
            for tensors in (dict(module.named_parameters()), inputs)
        )
        results = torch.func.functional_call(module, weights, (), feeds)
    for result, tensor in zip(results if isinstance(results, tuple) else (results,), spec.outputs, strict=True):
        assert result.device.type == "meta"
        assert str(result.dtype) == f"torch.{tensor.dtype}"


def test_a_missing_compiler_is_reported(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DependencyError, match="needs a compiler for the cpu") as missing:
        open_backend("torch-compile", tiny_bundle, Manifest.load(tiny_bundle))
    assert missing.value.fix == "install g++ or set CXX, or --backend torch"
    monkeypatch.setenv("CXX", "my-compiler")
    assert open_backend("torch-compile", tiny_bundle, Manifest.load(tiny_bundle)).name == "torch-compile"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DependencyError, match="needs a compiler for the cuda"):
        torch_backend.require_compiler("cuda")


def test_without_torch_the_error_names_the_command_that_installs_it(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sana_export.runtime.backends.torch")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(DependencyError, match="torch is not installed") as missing:
        open_backend("torch", tiny_bundle, Manifest.load(tiny_bundle))
    assert missing.value.fix == install_command("export")


def test_running_out_of_memory_is_a_dependency_error(runtime: SanaRuntime) -> None:
    size = 2**22
    index, weight = np.zeros((2, size), np.int64), np.zeros((2, size), np.float32)
    feeds = {"image": np.zeros((1, 3, 1, 1), np.float32), "row_index": index, "row_weight": weight}
    with pytest.raises(DependencyError, match="out of memory while running postprocess with torch on the cpu"):
        runtime.backend.load("postprocess").run({**feeds, "column_index": index, "column_weight": weight})


def test_products_are_exact_inside_a_run_and_settings_come_back(runtime: SanaRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    session = runtime.backend.load("sampler")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(session, "module", lambda **_: (seen.append(torch.backends.cudnn.allow_tf32), (None, None))[1])
    session.run({tensor.name: np.zeros(1, np.float32) for tensor in session.spec.inputs})
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32 is True


def test_arrays_are_fed_without_a_copy_if_possible(runtime: SanaRuntime) -> None:
    array = np.random.default_rng(0).normal(size=(1, 32, 2, 3)).astype(np.float32)
    assert np.shares_memory(runtime.backend.to_host(runtime.backend.to_device(array)), array)
    frozen = array.copy()
    frozen.flags.writeable = False
    for other in (frozen, array[:, ::-1]):
        np.testing.assert_array_equal(runtime.backend.to_host(runtime.backend.to_device(other)), other)


def test_half_precision_runs_on_the_cpu(tiny_bundle: Path, runtime: SanaRuntime) -> None:
    """In the graphs' own half-precision arithmetic; the limit is that of fp16 images."""
    manifest = Manifest.load(tiny_bundle)
    half = dataclasses.replace(manifest, options=dataclasses.replace(manifest.options, precision="fp16"))

    def load(bundle: Path, _: Manifest) -> Any:
        return torch_backend.open_torch(bundle, half, compiled=False)

    found = SanaRuntime.from_pretrained(tiny_bundle, backend=load)(PROMPT, seed=1, **SMALL).images
    wanted = runtime(PROMPT, seed=1, **SMALL).images
    parity = compare_images("image", pixels(found), pixels(wanted), "fp16")
    assert parity.passed, parity
    assert not np.array_equal(pixels(found), pixels(wanted))
