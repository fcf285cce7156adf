"""`verify --layers`: a fault planted in one layer is found, and its reproducer shows it in Polygraphy's own command."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from sana_export.errors import DependencyError, ParityError, UsageError
from sana_export.export.evaluator_graphs import typed_model
from sana_export.export.parity import COSINE_LIMITS, compare_tensors
from sana_export.manifest import Manifest
from sana_export.verify import layers
from sana_export.verify.bundle import Sampling
from sana_export.verify.graph_layers import tensor_origins
from sana_export.verify.layer_report import TensorRow
from sana_export.verify.layers import LayerCheck, compare_layers, drifting_tensors, snr_limit
from sana_export.verify.recorded_inputs import record_inputs
from tests.support.planted import scale_weight, with_half_denoiser

SHORT = Sampling(("a red apple",), 64, 64, 2)


@pytest.fixture(scope="module")
def half_bundle(tiny_bundle: Path, tiny_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_half_denoiser(tiny_bundle, tiny_checkpoint, tmp_path_factory.mktemp("half") / "half")


def polygraphy(command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of Polygraphy with this interpreter."""
    name, *words = shlex.split(command)
    assert name == "polygraphy"
    program = [sys.executable, "-c", "from polygraphy.tools import main; raise SystemExit(main())", *words]
    return subprocess.run(program, capture_output=True, text=True, timeout=120)


def test_a_good_graph_passes_in_small_chunks(half_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = LayerCheck("denoiser", step=2, reproducer=tmp_path / "drift")
    whole = compare_layers(half_bundle, check, SHORT, threads=1)
    assert whole.passed
    assert whole.sides == ("float32", "float16 storage")
    assert whole.inputs == "the prompt 'a red apple', step 2"
    entry = Manifest.load(half_bundle).graphs["denoiser"]
    model = onnx.load(half_bundle / entry.onnx.path, load_external_data=False)
    origins = tensor_origins(typed_model(half_bundle / entry.onnx.path))
    assert [row.origin.tensor for row in whole.rows] == [origin.tensor for origin in origins]
    assert {"noise_pred"} < {row.origin.tensor for row in whole.rows} < {name for node in model.graph.node for name in node.output}
    assert min(row.snr_db for row in whole.rows if row.origin.dtype == "float16") < 80, "float16 rounds"
    assert not (tmp_path / "drift").exists()

    monkeypatch.setattr(layers, "CHUNK_BYTES", 200_000)
    counted: list[int] = []
    chunks = layers.chunks
    monkeypatch.setattr(layers, "chunks", lambda *given: (counted.append(len(chunk)) or chunk for chunk in chunks(*given)))
    parts = compare_layers(half_bundle, check, SHORT, threads=1)
    assert len(counted) > 3
    assert parts.rows == whole.rows


def test_an_overflow_is_found_in_the_layer_where_it_was_planted(half_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "planted"
    shutil.copytree(half_bundle, bundle)
    scale_weight(bundle, "denoiser", "blocks.1.qkv", 5e4)
    report = compare_layers(bundle, LayerCheck("denoiser", reproducer=tmp_path / "drift"), SHORT, threads=1)
    assert not report.passed
    first = report.first
    assert first is not None
    assert (first.origin.layer, first.origin.module, first.origin.operator) == ("blocks.1", "blocks.1.qkv", "MatMul")
    assert first.origin.diffusers == "transformer_blocks.1.attn1"
    assert first.largest > 65504
    assert first.largest_found == np.inf
    index = report.rows.index(first)
    assert all(row.passed for row in report.rows[:index])
    assert report.rows[-1].drifts, "the graph's output"
    text = report.as_text()
    assert "  layer:  blocks.1\n" in text
    assert f"  tensor: {first.origin.tensor}\n" in text

    saved = report.reproducer
    assert saved is not None
    assert saved.reproduces
    assert json.loads((tmp_path / "drift/report.json").read_text()) == report.as_json()
    part = onnx.load(tmp_path / "drift/model.onnx")
    onnx.checker.check_model(part, full_check=True)
    assert saved.nodes == len(part.graph.node) < 80
    assert {tensor.name for tensor in part.graph.initializer if tensor.name.startswith("blocks.")} >= {"blocks.1.qkv"}
    assert not any(tensor.name.startswith("blocks.0") for tensor in part.graph.initializer)
    ran = polygraphy(saved.command)
    assert ran.returncode == 1
    assert f"Mismatched outputs: ['{first.origin.tensor}']" in ran.stdout + ran.stderr


def test_a_wrong_weight_shows_against_another_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "planted"
    shutil.copytree(tiny_bundle, bundle)
    scale_weight(bundle, "denoiser", "blocks.0.cross_out.weight", 1.2)
    check = LayerCheck("denoiser", limit_db=60, reproducer=tmp_path / "drift")
    assert compare_layers(bundle, check, SHORT, threads=1).passed, "both sides have the same weights"
    report = compare_layers(bundle, LayerCheck(**vars(check) | {"against": tiny_bundle}), SHORT, threads=1)
    assert report.first is not None
    assert report.first.origin.module == "blocks.0.cross_out"
    assert report.first.snr_db == pytest.approx(20 * np.log10(1 / 0.2), abs=0.01)
    assert report.reproducer is not None
    assert report.reproducer.snr_db == pytest.approx(report.first.snr_db, abs=0.01)
    parts = [onnx.load(tmp_path / "drift" / name).graph.initializer for name in ("model.onnx", "reference.onnx")]
    weights = [{tensor.name: numpy_helper.to_array(tensor) for tensor in part}["blocks.0.cross_out.weight"] for part in parts]
    assert np.allclose(weights[0], 1.2 * weights[1])


def test_a_reference_with_other_nodes_is_refused(half_bundle: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="computes denoiser with other nodes") as caught:
        compare_layers(half_bundle, LayerCheck("denoiser", against=tiny_bundle), SHORT)
    assert caught.value.fix is not None
    assert caught.value.fix.startswith("sana-export export tiny-random -o ")


def test_inputs_that_another_graph_broke(half_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "planted"
    shutil.copytree(half_bundle, bundle)
    scale_weight(bundle, "context", "projection.weight", 1e9)
    with pytest.raises(ParityError, match="an input of denoiser is not finite"):
        compare_layers(bundle, LayerCheck("denoiser"), SHORT, threads=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"graph": "denoisr"}, "has no graph named denoisr"),
        ({"step": 3}, "does not reach denoiser at step 3"),
        ({"backend": "torch"}, "cannot return the intermediate tensors"),
    ],
)
def test_what_cannot_be_compared(change: dict[str, Any], message: str, tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match=message):
        compare_layers(tiny_bundle, LayerCheck(**{"graph": "denoiser", **change}), SHORT, threads=1)


def test_nothing_of_the_user_is_overwritten(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/picture.png").write_bytes(b"")
    with pytest.raises(UsageError, match="holds something that is not a reproducer"):
        compare_layers(tiny_bundle, LayerCheck("denoiser", reproducer=tmp_path / "mine"), SHORT)


def test_polygraphy_is_an_optional_package(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    with pytest.raises(DependencyError, match="needs Polygraphy") as caught:
        compare_layers(tiny_bundle, LayerCheck("denoiser"), SHORT)
    assert "[export]" in str(caught.value.fix)


def test_random_inputs_need_no_run(bundle: Path, tmp_path: Path) -> None:
    """The small bundle has no text encoder."""
    scale_weight(bundle, "vae_decoder", "weight", 3e5)
    report = compare_layers(bundle, LayerCheck("vae_decoder", random_inputs=True, reproducer=tmp_path / "drift"), threads=1)
    assert report.first is not None
    assert (report.first.origin.node, report.first.origin.module) == ("decode", "weight")


@pytest.mark.parametrize("precision", COSINE_LIMITS)
def test_the_limit_is_that_of_a_graph(precision: str) -> None:
    wanted = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    for offset, passes in ((0.1, True), (-0.1, False)):
        error = 10 ** (-(snr_limit(precision) + offset) / 20)
        assert compare_tensors("x", wanted * np.float32(1 + error), wanted, precision).passed is passes


def test_recorded_inputs_are_those_of_a_run(tiny_bundle: Path, tiny_runtime: Any) -> None:
    recorded = record_inputs(tiny_bundle, ["denoiser", "vae_decoder", "text_encoder", "vae_decoder_tail"], SHORT, step=2, threads=1)
    plan = tiny_runtime.plan(SHORT.request("a red apple", tiny_runtime.manifest.model, 2.0))
    latents = [tiny_runtime.to_host(step.latents) for step in tiny_runtime.steps(plan, tiny_runtime.encode(plan))]
    assert np.allclose(recorded["denoiser"]["latents"], latents[0], atol=1e-4)
    assert np.allclose(recorded["vae_decoder"]["latents"], latents[1], atol=1e-3)
    assert recorded["denoiser"]["timestep"][0] == plan.schedule.timesteps[1] * tiny_runtime.manifest.model.timestep_scale
    for graph, feeds in recorded.items():
        for tensor in tiny_runtime.manifest.graphs[graph].spec.inputs:
            assert feeds[tensor.name].dtype == tensor.dtype


def test_a_tensor_drifts_if_its_error_reaches_an_output() -> None:
    """x -> a -> b -> y and x -> c -> y; d reads c and nothing reads d."""
    nodes = [helper.make_node("Neg", [source], [target]) for source, target in ("xa", "ab", "xc", "cd")]
    nodes.append(helper.make_node("Add", ["b", "c"], ["y"]))
    graph = helper.make_graph(nodes, "g", [], [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])])
    model = helper.make_model(graph)
    for name in "abcdy":
        model.graph.value_info.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]))
    origins = tensor_origins(model)

    def drifting(*missed: str, without: str = "") -> set[str]:
        rows = [TensorRow(item, (1,), 0, 0, 0, 0, item.tensor not in missed) for item in origins if item.tensor not in without]
        return drifting_tensors(model.graph, rows)

    assert drifting() == set()
    assert drifting("a", "d") == set(), "what is made of them is right"
    assert drifting("a", "y") == {"y"}
    assert drifting("a", "b", "y") == {"a", "b", "y"}
    assert drifting("a", "y", without="b") == {"a", "y"}, "b was not compared"
