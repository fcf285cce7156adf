"""A quantized bundle: what its files contain, what it computes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors.numpy import load_file, save_file

from sana_export.bench.profile.profile import run_profile
from sana_export.bench.workload import Workload
from sana_export.calibration.run import Calibration
from sana_export.cli.bundle_text import bundle_summary
from sana_export.errors import ArtifactError, UsageError
from sana_export.export.bundle import export_bundle
from sana_export.export.quantize.plan import plan_weights, stored_bytes
from sana_export.files import file_entry
from sana_export.graphs.builders import shape_graph
from sana_export.graphs.storage import ALIGNMENT
from sana_export.hub.origin import HubOrigin
from sana_export.manifest import FILE_NAME, Manifest, Options, seal
from sana_export.profiles import custom_profile, profile_named
from sana_export.quantization.schemes import SCHEMES as ALL_SCHEMES
from sana_export.runtime import SanaRuntime
from sana_export.runtime.backends import quantized_weights
from sana_export.runtime.backends.torch import TorchBackend
from sana_export.runtime.prompt import PromptEncoder
from sana_export.trt.bundle import build_bundle, plan_bundle
from sana_export.trt.options import BuildOptions
from sana_export.verify.bundle import Sampling, verify_bundle
from sana_export.verify.graph_checks import inputs_for
from sana_export.verify.graph_file import open_graph
from sana_export.verify.quantized import check_stored
from tests.support.lora_files import pair, write
from tests.support.quantized import SCHEMES, read_weights, replaced

SMALL: dict[str, Any] = {"height": 96, "width": 160, "use_resolution_binning": False, "num_inference_steps": 2}
GRAPHS = ("text_encoder", "denoiser")


@pytest.fixture(scope="module")
def quantized(quantized_bundle: Path) -> Path:
    return quantized_bundle


@pytest.fixture(scope="module")
def runtime(quantized: Path) -> SanaRuntime:
    return SanaRuntime.from_pretrained(quantized, backend="onnxruntime")


def model(bundle: Path, graph: str) -> Path:
    return bundle / Manifest.load(bundle).graphs[graph].onnx.path


def own_weights(bundle: Path, graph: str) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(model(bundle, graph)).graph.initializer}


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_weight_is_within_half_a_step_of_the_checkpoints(quantized: Path, tiny_bundle: Path, graph: str) -> None:
    whole, stored = own_weights(tiny_bundle, graph), read_weights(model(quantized, graph))
    entry = Manifest.load(quantized).graphs[graph]
    assert {weight.name for weight in entry.quantized} == stored.keys()
    for weight in entry.quantized:
        numbers, steps = stored[weight.name]
        wanted = whole[weight.name]
        wanted = wanted.reshape(len(wanted), -1).T if weight.transposed else wanted
        assert numbers.shape == weight.shape == wanted.shape
        assert (np.abs(numbers - wanted) <= steps * 0.50001).all(), weight.name
    # Everything else is as in the bundle without quantization.
    rest = own_weights(quantized, graph)
    assert all((rest[name] == value).all() for name, value in whole.items() if name in rest and name not in stored)


def test_the_layers_of_the_table_are_quantized(quantized: Path) -> None:
    entry = Manifest.load(quantized).graphs["denoiser"]
    names = {weight.name.removeprefix("blocks.0.") for weight in entry.quantized if weight.name.startswith("blocks.0.")}
    assert names == {
        *("qkv", "out.weight", "cross_query.weight", "cross_out.weight", "point.weight"),
        *("halves.value.inverted.weight", "halves.gate.inverted.weight"),
    }
    assert {(weight.dtype, weight.block) for weight in entry.quantized} == {("int4", 32)}
    assert entry.opset == 21
    text = Manifest.load(quantized).graphs["text_encoder"]
    assert {(weight.dtype, weight.block, weight.axis) for weight in text.quantized} == {("int8", 0, 1)}
    assert text.opset == 20


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_graph_computes_what_the_whole_one_does_with_its_numbers(
    quantized: Path, tiny_bundle: Path, runtime: SanaRuntime, graph: str
) -> None:
    numbers = {}
    for weight in Manifest.load(quantized).graphs[graph].quantized:
        value = read_weights(model(quantized, graph))[weight.name][0]
        numbers[weight.name] = value.T if weight.transposed else value
    changed = replaced(model(tiny_bundle, graph), numbers).SerializeToString()
    session = onnxruntime.InferenceSession(changed, providers=["CPUExecutionProvider"])
    feeds = {name: value.numpy() for name, value in inputs_for(runtime, graph, 3).items()}
    (wanted,) = session.run(None, feeds)
    (found,) = runtime.run(graph, feeds).values()
    found = runtime.to_host(found)
    assert np.abs(found - wanted).max() <= 2e-5 * np.abs(wanted).max()
    plain = onnxruntime.InferenceSession(model(tiny_bundle, graph), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
    assert np.abs(found - plain).max() > 1e-3 * np.abs(plain).max()


def test_the_torch_backend_has_the_stored_weights(
    quantized: Path, runtime: SanaRuntime, tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (row,) = check_stored(runtime, tiny_checkpoint, "denoiser", seed=5)
    assert row.passed
    assert row.cosine > 0.9999999
    dequantize = quantized_weights.dequantize
    monkeypatch.setattr(quantized_weights, "dequantize", lambda *arguments: dequantize(*arguments) * np.float32(1.01))
    (row,) = check_stored(runtime, tiny_checkpoint, "denoiser", seed=5)
    assert not row.passed


def test_the_embedding_table_is_read_row_by_row(quantized: Path, tiny_bundle: Path) -> None:
    whole = load_file(tiny_bundle / "embeddings.safetensors")["embed_tokens.weight"].astype(np.float32)
    stored = load_file(quantized / "embeddings.safetensors")
    assert stored["embed_tokens.weight"].dtype == np.int8
    steps = np.abs(whole).max(axis=1) / 127
    rows = [5, 0, len(whole) - 1]
    found = PromptEncoder.load(quantized, Manifest.load(quantized)).embeddings.rows(rows)
    assert found.dtype == np.float32
    assert (np.abs(found - whole[rows]) <= steps[rows, None] * 0.50001).all()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda rows: {"embed_tokens.weight": rows["embed_tokens.weight"]}, "no tensor 'embed_tokens.scale'"),
        (lambda rows: {**rows, "embed_tokens.scale": rows["embed_tokens.scale"][:-1]}, "does not match its scales"),
        (lambda rows: {**rows, "embed_tokens.weight": rows["embed_tokens.weight"].astype(np.float32)}, "F32"),
    ],
)
def test_a_damaged_embedding_table_is_named(quantized: Path, tmp_path: Path, change: Any, text: str) -> None:
    bundle = shutil.copytree(quantized, tmp_path / "bundle")
    path = bundle / "embeddings.safetensors"
    save_file(change(load_file(path)), path)
    manifest = Manifest.load(bundle)
    replace(manifest, files=tuple(file_entry(bundle, bundle / file.path) for file in manifest.files)).save(bundle)
    with pytest.raises(ArtifactError, match=text):
        SanaRuntime.from_pretrained(bundle, backend="onnxruntime")(prompt="a", **SMALL)


def test_images_are_close_to_those_without_quantization(runtime: SanaRuntime, tiny_runtime: SanaRuntime) -> None:
    found, wanted = (np.asarray(one("a red apple", seed=1, **SMALL).images[0], np.float64) for one in (runtime, tiny_runtime))
    error = ((found - wanted) ** 2).mean()
    assert error > 0
    assert 10 * np.log10(255**2 / error) > 12


def test_a_lora_on_a_quantized_layer_is_refused(quantized: Path, tmp_path: Path) -> None:
    with SanaRuntime.from_pretrained(quantized, backend="onnxruntime") as runtime:
        lora = write(tmp_path / "lora", pair("transformer.transformer_blocks.0.attn1.to_q", width=128))
        with pytest.raises(UsageError) as error:
            runtime.load_lora(lora)
        assert "transformer_blocks.0.attn1.to_q in int4-weight" in str(error.value)
        words = "--quantize embeddings=int8-weight,text_encoder=int8-weight,denoiser=int4-weight --quantize-method nearest"
        words += f" --lora {lora}:1"
        assert words in str(error.value.fix)
        assert not runtime.loras
        # Cross-attention's keys and values are in the graph `context`, which is not quantized.
        runtime.load_lora(write(tmp_path / "other", pair("transformer.transformer_blocks.0.attn2.to_k", width=128)))
        assert len(runtime.loras) == 1


def test_the_manifest_records_the_schemes(quantized: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    assert dict(Manifest.load(quantized).options.quantize) == SCHEMES
    assert "denoiser in int4-weight" in bundle_summary(quantized, Manifest.load(quantized))
    # A bundle of an older version has neither key.
    document = json.loads((tiny_bundle / FILE_NAME).read_text("utf-8"))
    del document["sha256"], document["options"]["quantize"]
    for graph in document["graphs"].values():
        del graph["quantized"]
    (tmp_path / FILE_NAME).write_text(json.dumps({**document, "sha256": seal(document)}), "utf-8")
    older = Manifest.load(tmp_path)
    assert not older.options.quantize
    assert not older.graphs["denoiser"].quantized
    document["options"]["quantize"] = {"denoiser": "int3"}
    (tmp_path / FILE_NAME).write_text(json.dumps({**document, "sha256": seal(document)}), "utf-8")
    with pytest.raises(ArtifactError, match="damaged"):
        Manifest.load(tmp_path)


def test_a_damaged_file_of_a_pulled_bundle_is_pulled_again(quantized: Path, tiny_checkpoint: Any, tmp_path: Path) -> None:
    """What reads stored weights outside ONNX Runtime: the file of `verify --layers`, the torch backend, and its profile."""
    bundle = shutil.copytree(quantized, tmp_path / "bundle")
    HubOrigin("me/sana", "0" * 40).save(bundle)
    manifest = Manifest.load(bundle)
    pull = f"sana-export pull me/sana --revision {'0' * 40} -o {bundle}"
    (data,) = manifest.graphs["denoiser"].data
    with (bundle / data.path).open("r+b") as file:
        file.write(b"damaged")
    with pytest.raises(ArtifactError) as error:
        open_graph(bundle, "denoiser")
    assert error.value.fix == pull
    with pytest.raises(ArtifactError) as error:
        TorchBackend(bundle, manifest, tiny_checkpoint, compiled=False).load("denoiser")
    assert error.value.fix == pull
    work = Workload("test", 64, 64, 1, 4.5, ("a",), threads=1)
    profile = run_profile(bundle, tiny_checkpoint, backend="torch", workload=work, graphs=["denoiser", "context"], runs=1)
    failed = {graph.graph: graph.failed or "" for graph in profile.graphs}
    assert pull in failed["denoiser"], "the profile runs the stored weights"
    assert not failed["context"]


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_size_is_known_before_the_export(quantized: Path, tiny_checkpoint: Any, graph: str) -> None:
    manifest = Manifest.load(quantized)
    expected = stored_bytes(graph, tiny_checkpoint, manifest.options)
    tensors = len(onnx.load(model(quantized, graph), load_external_data=False).graph.initializer)
    (data,) = manifest.graphs[graph].data
    assert expected <= data.bytes <= expected + tensors * ALIGNMENT


def test_a_scale_of_nvfp4_takes_one_byte(tiny_checkpoint: Any) -> None:
    """A weight takes 1/2 byte and 1/16 for its share of a scale, instead of a byte; an output channel has no scale of two bytes."""
    method = ("nearest",)
    eight, four = (
        Options("fp16", clamp=False, quantize={"denoiser": name}, quantize_method=method) for name in ("int8-weight", "nvfp4")
    )
    planned = plan_weights(shape_graph("denoiser", tiny_checkpoint, four), "denoiser", four)
    shapes = [weight.shape for weight in planned.values() if weight.dtype == "fp4"]
    assert shapes
    saved = stored_bytes("denoiser", tiny_checkpoint, eight) - stored_bytes("denoiser", tiny_checkpoint, four)
    assert saved == sum(7 * inputs * outputs // 16 + 2 * outputs for inputs, outputs in shapes)


@pytest.mark.parametrize(
    ("capabilities", "options", "text", "fix"),
    [
        (
            ("7.5",),
            BuildOptions(),
            "tensorrt-rtx has no int4 for compute capability 7.5",
            "--quantize embeddings=int8-weight,text_encoder=int8-weight,denoiser=int8-weight",
        ),
        (("8.9",), BuildOptions(refittable=True), "quantized graphs have no refittable engines", "--backend tensorrt-rtx"),
    ],
)
def test_engines_that_cannot_exist_are_refused_before_a_build(
    quantized: Path, capabilities: tuple[str, ...], options: BuildOptions, text: str, fix: str
) -> None:
    settings: dict[str, Any] = {"backend": "tensorrt-rtx", "profile": profile_named("default")}
    with pytest.raises(UsageError, match=text) as error:
        plan_bundle(quantized, compute_capabilities=capabilities, options=options, graphs=["denoiser"], **settings)
    assert fix in str(error.value.fix)
    assert len(plan_bundle(quantized, compute_capabilities=("7.5",), graphs=["text_encoder"], **settings)) == 1
    assert len(plan_bundle(quantized, compute_capabilities=("8.9", "12.0"), **settings)) == 6


def test_quantized_graphs_that_no_lora_changes_need_no_refittable_engines(quantized: Path, tmp_path: Path) -> None:
    """The text encoder is quantized, the denoiser is not."""
    manifest = Manifest.load(quantized)
    graphs = {
        name: replace(graph, quantized=() if name == "denoiser" else graph.quantized) for name, graph in manifest.graphs.items()
    }
    bundle = shutil.copytree(quantized, tmp_path / "bundle")
    options = replace(manifest.options, quantize={"text_encoder": "int8-weight"})
    replace(manifest, options=options, graphs=graphs).save(bundle)
    planned = plan_bundle(bundle, backend="tensorrt-rtx", profile=profile_named("default"), options=BuildOptions(refittable=True))
    refittable = {engine.spec.graph: bool(engine.spec.options.get("refittable")) for engine in planned}
    assert (refittable["text_encoder"], refittable["denoiser"], refittable["context"]) == (False, True, True)


@pytest.mark.slow
def test_a_half_precision_bundle_passes_verify_and_compiles(tiny_checkpoint: Any, tmp_path: Path) -> None:
    """Every scheme in fp16: parity of the whole bundle, an image through the runtime, and engines of TensorRT-RTX."""
    for scheme, row in ALL_SCHEMES.items():
        bundle = tmp_path / scheme
        manifest = export_bundle(tiny_checkpoint, bundle, precision="fp16", quantize=[scheme], calibration=Calibration(steps=4))
        report = verify_bundle(bundle, tiny_checkpoint, Sampling(prompts=("a red apple",), steps=2))
        assert report.passed, report.as_text()
        assert sum("stored weights" in row.name for row in report.graphs) == 5
        profile = custom_profile(manifest.model, height=256, width=256)
        settings: dict[str, Any] = {"backend": "tensorrt-rtx", "compute_capabilities": row.capabilities[-1:], "profile": profile}
        graphs = ["text_encoder", "denoiser", "vae_decoder"]
        engines = build_bundle(bundle, graphs=graphs, **settings).engines
        assert [engine.graph for engine in engines] == graphs
