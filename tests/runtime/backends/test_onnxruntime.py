"""What the ONNX Runtime backend refuses before anything runs, and what every backend guarantees."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from sana_export.commands import export_command
from sana_export.errors import ArtifactError, DependencyError, SanaExportError, UsageError
from sana_export.files import file_entry
from sana_export.formats.onnx_weights import check_external_data, external_locations
from sana_export.installation import install_command
from sana_export.manifest import Manifest
from sana_export.runtime import SanaRuntime
from sana_export.runtime.backends import BACKENDS, open_backend
from sana_export.runtime.backends.onnxruntime import session_options
from sana_export.runtime.sampling import sampler_feeds

DENOISER = Path("onnx/denoiser/model.onnx")


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def reseal(bundle: Path, **changes: Any) -> None:
    """Change the manifest and give it a valid seal."""
    dataclasses.replace(Manifest.load(bundle), **changes).save(bundle)


def record_again(bundle: Path, graph: str) -> None:
    """Record the present files of `graph` in the manifest."""
    manifest = Manifest.load(bundle)
    entry = manifest.graphs[graph]
    entry = dataclasses.replace(entry, onnx=file_entry(bundle, bundle / entry.onnx.path))
    reseal(bundle, graphs={**manifest.graphs, graph: entry})


def relocate(bundle: Path, location: str) -> None:
    """Make the denoiser's ONNX file read its weights from `location`, and record the file in the manifest."""
    model = onnx.load(bundle / DENOISER, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (bundle / DENOISER).write_bytes(model.SerializeToString())
    record_again(bundle, "denoiser")


def refused(bundle: Path, kind: type[SanaExportError] = ArtifactError) -> SanaExportError:
    with pytest.raises(kind) as caught:
        SanaRuntime.from_pretrained(bundle)
    return caught.value


def data_file(bundle: Path) -> Path:
    return bundle / Manifest.load(bundle).graphs["denoiser"].data[0].path


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "onnx": (lambda bundle: flip_a_byte(bundle / DENOISER), "onnx/denoiser/model.onnx is damaged or was replaced"),
    "data": (lambda bundle: flip_a_byte(data_file(bundle)), "onnx/denoiser/model.onnx.data is damaged or was replaced"),
    "no data": (lambda bundle: data_file(bundle).unlink(), "onnx/denoiser/model.onnx.data is missing"),
    "cut": (lambda bundle: os.truncate(data_file(bundle), 1000), "found:  1000 bytes"),
    "tokenizer": (lambda bundle: flip_a_byte(bundle / "tokenizer/tokenizer.json"), "tokenizer/tokenizer.json is damaged"),
    "instruction": (lambda bundle: (bundle / "instruction.safetensors").unlink(), "instruction.safetensors is missing"),
    "embeddings": (lambda bundle: flip_a_byte(bundle / "embeddings.safetensors"), "embeddings.safetensors is damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_bundle_is_refused_with_the_command_that_exports_it_again(bundle: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(bundle)
    error = refused(bundle)
    assert message in str(error)
    assert error.fix == f"sana-export export tiny-random -o {bundle} --dtype fp32 --pag-layers transformer_blocks.1"
    assert error.exit_code == 4


def test_an_incomplete_bundle_is_refused(bundle: Path) -> None:
    graphs = dict(Manifest.load(bundle).graphs)
    del graphs["context"], graphs["sampler"]
    reseal(bundle, graphs=graphs)
    assert "found:  no context, sampler" in str(refused(bundle))


def test_weights_outside_the_bundle_are_refused(bundle: Path, tmp_path: Path) -> None:
    outside = shutil.copy(data_file(bundle), tmp_path / "outside.data")
    shutil.copy(outside, bundle / "onnx/denoiser/unrecorded.data")
    for location in ("../../../outside.data", str(outside), "unrecorded.data", "*/_ORT_MEM_ADDR_/*"):
        relocate(bundle, location)
        error = refused(bundle)
        assert "reads its weights from a file that does not belong to the bundle" in str(error)
        assert f"found:  {location}" in str(error)
    relocate(bundle, "./model.onnx.data")
    SanaRuntime.from_pretrained(bundle)
    relocate(bundle, "model.onnx.data")  # ONNX Runtime 1.26 does not find "./" among files in memory
    data_file(bundle).unlink()
    data_file(bundle).symlink_to(outside)
    SanaRuntime.from_pretrained(bundle)  # a link to the file that the manifest knows
    outside.write_bytes(outside.read_bytes()[:-1] + b"x")
    assert "is a link to a file outside the bundle that is not the one in its manifest" in str(refused(bundle))


def test_a_recorded_file_that_is_no_model_is_refused(bundle: Path) -> None:
    for content, message in ((b"no protobuf", "is not an ONNX model"), (b"", "cannot load")):
        (bundle / DENOISER).write_bytes(content)
        record_again(bundle, "denoiser")
        error = refused(bundle)
        assert message in str(error)
        assert str(bundle / DENOISER) in str(error)


def test_a_precision_that_the_cpu_lacks_is_refused(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    reseal(bundle, options=dataclasses.replace(manifest.options, precision="bf16"))
    error = refused(bundle)
    assert "found:  a bundle in bf16" in str(error)
    assert "wanted: fp32 or fp16" in str(error)
    assert error.fix == f"sana-export export tiny-random -o {bundle} --dtype fp32 --pag-layers transformer_blocks.1"


def test_the_table_of_backends(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.load(tiny_bundle)
    assert open_backend("auto", tiny_bundle, manifest).name == "onnxruntime"
    for name in ("tensorrt", "tensorrt-rtx"):
        with pytest.raises(ArtifactError, match="none was built") as unbuilt:
            open_backend(name, tiny_bundle, manifest)
        assert unbuilt.value.fix == f"sana-export build {tiny_bundle} --backend {name}"
    with pytest.raises(UsageError, match="'tensort'") as unknown:
        open_backend("tensort", tiny_bundle, manifest)
    assert all(name in str(unknown.value) for name in ("auto", *BACKENDS))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DependencyError, match="not installed") as missing:
        open_backend("onnxruntime", tiny_bundle, manifest)
    assert missing.value.fix == install_command("cpu")
    assert missing.value.exit_code == 3


def test_export_lines_repeat_the_options_of_the_bundle(tiny_bundle: Path) -> None:
    manifest = Manifest.load(tiny_bundle)
    checkpoint = dataclasses.replace(manifest.checkpoint, source="my models/fox", revision="v1")
    options = dataclasses.replace(manifest.options, precision="fp16", pag_layers=())
    other = dataclasses.replace(manifest, checkpoint=checkpoint, options=options)
    assert export_command(Path("a b"), other) == "sana-export export 'my models/fox' -o 'a b' --revision v1"
    assert export_command(Path("b"), manifest, precision="bf16", pag_layers=(1, 8)) == (
        "sana-export export tiny-random -o b --dtype bf16 --pag-layers transformer_blocks.1,transformer_blocks.8"
    )


def test_tensors_pass_between_graphs_without_a_copy(tiny_bundle: Path) -> None:
    backend = open_backend("onnxruntime", tiny_bundle, Manifest.load(tiny_bundle))
    assert backend.device == "cpu"
    array = np.random.default_rng(0).normal(size=(1, 32, 2, 3)).astype(np.float32)
    assert np.shares_memory(backend.to_host(backend.to_device(array)), array)
    sampler = backend.load("sampler")
    coefficients = np.array([1, -0.5, 0.25, 2, 3, 5, 6, 4], np.float32)
    feeds = sampler_feeds(array[None], array, [array, 2 * array, 3 * array], array, coefficients, np.ones(1, np.float32))
    first = sampler.run(feeds)
    np.testing.assert_allclose(backend.to_host(first["x0"]), 0.5 * array, rtol=1e-6)
    np.testing.assert_allclose(backend.to_host(first["next_latents"]), 36.25 * array, rtol=1e-6)
    assert np.shares_memory(backend.to_host(first["x0"]), backend.to_host(first["x0"]))
    second = sampler.run({**feeds, "latents": first["x0"], "previous_x0": backend.to_device(array[:, ::-1])})
    wanted = 0.25 * 0.5 * array + 3 * array[:, ::-1] + (5 * 2 + 6 * 3 + 4) * array
    np.testing.assert_allclose(backend.to_host(second["next_latents"]), wanted, atol=1e-5)


def test_threads_of_a_session_rest_once_its_run_is_over(tiny_bundle: Path) -> None:
    """Busy threads would take cores from the next graph's."""
    options = session_options(onnxruntime)
    options.intra_op_num_threads = 4
    session = onnxruntime.InferenceSession(str(tiny_bundle / DENOISER), options, providers=["CPUExecutionProvider"])
    sizes = {"branches": 2, "text_branches": 2, "batch": 4, "text_tokens": 8, "latent_height": 16, "latent_width": 16}
    dtypes = {"source": np.int64}
    feeds = {
        value.name: np.ones([sizes.get(axis, axis) for axis in value.shape], dtypes.get(value.name, np.float32))
        for value in session.get_inputs()
    }
    busy = []
    for _ in range(3):
        session.run(None, feeds)
        started = time.process_time()
        time.sleep(0.05)
        busy.append(time.process_time() - started)
    assert min(busy) < 0.005  # seconds of all threads in 50 ms; otherwise about 30 ms


def test_graphs_that_need_the_most_memory_return_it_at_once(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's arena would keep memory that their other tensors do not fit."""
    arenas, create = [], onnxruntime.InferenceSession

    def opened(path: str, options: Any, **words: Any) -> Any:
        arenas.append(options.enable_cpu_mem_arena)
        return create(path, options, **words)

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    backend = open_backend("onnxruntime", tiny_bundle, Manifest.load(tiny_bundle))
    head = backend.load("vae_decoder_head")
    backend.load("vae_decoder_tail")
    assert arenas == [False, True]
    latents = np.random.default_rng(0).standard_normal((1, 32, 4, 4), dtype=np.float32)
    first, again = (backend.to_host(head.run({"latents": latents})["features"]) for _ in range(2))
    assert np.array_equal(first, again)


def test_running_out_of_memory_is_a_dependency_error(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks for an image of 3 * 2**46 bytes, more than a process can address."""
    backend = open_backend("onnxruntime", tiny_bundle, Manifest.load(tiny_bundle))
    size = 2**22
    index, weight = np.zeros((2, size), np.int64), np.zeros((2, size), np.float32)
    feeds = {
        "image": np.zeros((1, 3, 1, 1), np.float32),
        "row_index": index,
        "row_weight": weight,
        "column_index": index,
        "column_weight": weight,
    }
    session = backend.load("postprocess")
    with pytest.raises(DependencyError, match="out of memory while running postprocess") as caught:
        session.run(feeds)
    assert caught.value.exit_code == 3

    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(onnxruntime, "InferenceSession", no_memory)
    with pytest.raises(DependencyError, match="out of memory while loading sampler"):
        backend.load("sampler")


def external_tensor(location: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=f"w{location}", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("offset", "0"), ("location", location), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def test_external_data_is_found_wherever_a_model_may_hold_it() -> None:
    inner = onnx.helper.make_graph([], "inner", [], [], [external_tensor("subgraph")])
    node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner)
    for name, value in (("value", external_tensor("attribute")), ("many", [external_tensor("list")])):
        node.attribute.append(onnx.helper.make_attribute(name, value))
    graphs = onnx.AttributeProto(name="graphs", type=onnx.AttributeProto.GRAPHS)
    graphs.graphs.append(onnx.helper.make_graph([], "g", [], [], [external_tensor("graph list")]))
    node.attribute.append(graphs)
    sparse = onnx.SparseTensorProto(values=external_tensor("values"), indices=external_tensor("indices"), dims=[4])
    node.attribute.append(onnx.helper.make_attribute("sparse", sparse))
    in_function = onnx.helper.make_node("Constant", [], ["v"], value=external_tensor("function"))
    function = onnx.helper.make_function("d", "f", [], ["v"], [in_function], [onnx.helper.make_opsetid("", 20)])
    graph = onnx.helper.make_graph([node], "g", [], [], [external_tensor("initializer")], doc_string="location")
    model = onnx.helper.make_model(graph, functions=[function])
    model.graph.sparse_initializer.append(onnx.SparseTensorProto(values=external_tensor("sparse initializer"), dims=[4]))
    model.metadata_props.add(key="location", value="metadata is no tensor")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3, np.float32), "inside"))
    assert external_locations(model.SerializeToString()) == {
        *("subgraph", "attribute", "list", "graph list", "values", "indices", "function", "initializer"),
        "sparse initializer",
    }


def test_the_files_of_an_exported_model_are_found(tiny_bundle: Path) -> None:
    manifest = Manifest.load(tiny_bundle)
    for entry in manifest.graphs.values():
        names = {Path(file.path).name for file in entry.data}
        assert external_locations((tiny_bundle / entry.onnx.path).read_bytes()) == names


def verdict(path: Path, content: bytes, *recorded: str) -> str:
    """The error's message for an ONNX file with `content`, or "" if it is accepted."""
    path.write_bytes(content)
    for name in recorded:
        (path.parent / name).write_bytes(bytes(16))
    try:
        check_external_data(path, [path.parent / name for name in recorded])
    except ArtifactError as error:
        return error.message
    return ""


def test_a_damaged_model_is_no_crash(tmp_path: Path) -> None:
    graph = onnx.helper.make_graph([], "g", [], [], [external_tensor("a"), external_tensor("b")])
    model = onnx.helper.make_model(graph).SerializeToString()
    assert verdict(tmp_path / "whole.onnx", model, "a", "b") == ""
    assert "does not belong to the bundle" in verdict(tmp_path / "whole.onnx", model, "a")
    cut = {verdict(tmp_path / "cut.onnx", model[:size], "a", "b") for size in range(len(model))}
    refused = {f"{tmp_path / 'cut.onnx'} {what}" for what in ("is damaged or truncated", "is not an ONNX model")}
    assert {""} < cut <= {"", *refused}
    generator = np.random.default_rng(0)
    for _ in range(300):
        noise = generator.bytes(40)
        found = verdict(tmp_path / "noise.onnx", noise)
        assert found == "" or "noise.onnx is " in found


HEAVY = ("torch", "diffusers", "transformers", "tensorrt", "tensorrt_rtx", "onnx", "safetensors")


def test_the_runtime_runs_without_torch(tiny_bundle: Path) -> None:
    """An image is generated in a process that cannot import the heavy packages. The import alone loads no backend."""
    script = f"""
import sys
sys.modules.update(dict.fromkeys({HEAVY!r}))
import sana_export, sana_export.runtime
light = [name for name in ("numpy", "tokenizers", "onnxruntime", "PIL") if name in sys.modules]
assert not light, light
from sana_export import SanaRuntime
assert "onnxruntime" not in sys.modules
runtime = SanaRuntime.from_pretrained({str(tiny_bundle)!r})
result = runtime("fox", num_inference_steps=1, height=64, width=96, use_resolution_binning=False, seed=0)
print(result.images[0].size)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "(96, 64)"
