"""`verify --sensitivity`: the damage of a layer is that of its rounded weights. Layers that no scheme takes are measured too."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from sana_export.errors import UsageError
from sana_export.graphs.builders import build_graph
from sana_export.manifest import Options
from sana_export.quantization.method import Method
from sana_export.quantization.schemes import SCHEMES
from sana_export.verify.bundle import Sampling
from sana_export.verify.recorded_inputs import record_inputs
from sana_export.verify.sensitivity import GraphLayers, SensitivityCheck, measure_sensitivity
from sana_export.verify.sensitivity_report import LayerDamage, SensitivityReport
from tests.support.command_line import Cli

SHORT = Sampling(("a red apple", "a cat 🐼"), 64, 64, 2)
OPTIONS = Options("fp32", clamp=False, pag_layers=(1,))


@pytest.fixture(scope="module")
def report(tiny_bundle: Path) -> SensitivityReport:
    check = SensitivityCheck(("denoiser",), ("int8-weight", "int4-weight", "int8", "nvfp4"))
    return measure_sensitivity(tiny_bundle, check, SHORT, threads=1)


def damage(report: SensitivityReport, layer: str, scheme: str) -> LayerDamage:
    (row,) = (row for row in report.rows if (row.layer, row.scheme) == (layer, scheme))
    return row


def rounded(weight: torch.Tensor, most: int, axis: int) -> torch.Tensor:
    """`weight` with one scale for each slice that the other axes share."""
    scale = weight.abs().amax(axis, keepdim=True) / most
    return (weight / scale).round() * scale


@torch.no_grad()
def run(module: Any, runs: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    return [module(**inputs) for inputs in runs]


def relative(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    both = [torch.cat([value.flatten() for value in values]).double() for values in (found, wanted)]
    return float((both[0] - both[1]).norm() / both[1].norm())


@pytest.fixture(scope="module")
def runs(tiny_bundle: Path) -> list[dict[str, torch.Tensor]]:
    """The inputs of the denoiser at the first step with the first prompt, and at the last step with the last one."""
    found = []
    for step, prompt in enumerate(SHORT.prompts, 1):
        sampling = Sampling((prompt,), SHORT.height, SHORT.width, SHORT.steps)
        feeds = record_inputs(tiny_bundle, ["denoiser"], sampling, step=step, threads=1)["denoiser"]
        found.append({name: torch.from_numpy(value) for name, value in feeds.items()})
    return found


@pytest.mark.parametrize(
    ("layer", "axis"),
    [("blocks.1.qkv", 1), ("blocks.0.out.weight", 0), ("proj_out.weight", 0), ("blocks.2.halves.gate.depthwise.weight", (1, 2, 3))],
)
def test_the_damage_is_that_of_this_layer_alone(
    report: SensitivityReport, runs: list[dict[str, torch.Tensor]], tiny_checkpoint: Any, layer: str, axis: Any
) -> None:
    module = build_graph("denoiser", tiny_checkpoint, OPTIONS)
    wanted = run(module, runs)
    parameter = module.get_parameter(layer)
    parameter.data = rounded(parameter.data, 127, axis)
    error = relative(run(module, runs), wanted)
    found = damage(report, layer, "int8-weight")
    assert error > 1e-5
    assert found.error == pytest.approx(error, rel=1e-3)
    assert found.snr_db == pytest.approx(-20 * math.log10(error), abs=0.01)


def test_every_matrix_is_measured_and_nothing_else(report: SensitivityReport, tiny_checkpoint: Any) -> None:
    module = build_graph("denoiser", tiny_checkpoint, OPTIONS)
    matrices = {name for name, value in module.named_parameters() if value.dim() in (2, 4) and "table" not in name}
    for scheme in ("int8-weight", "int4-weight", "int8", "nvfp4"):
        assert {row.layer for row in report.rows if row.scheme == scheme} == matrices
    left_out = {row.kind for row in report.rows if row.scheme == "int4-weight" and not row.taken}
    assert {
        "patch_embed.weight",
        "proj_out.weight",
        "time_embed.linear.weight",
        "blocks.*.halves.gate.depthwise.weight",
    } <= left_out
    assert "blocks.*.qkv" not in left_out


def test_fewer_bits_damage_more(report: SensitivityReport) -> None:
    for row in report.rows:
        if row.scheme in ("int4-weight", "nvfp4"):
            assert row.error > 3 * damage(report, row.layer, "int8-weight").error, row.layer


@pytest.mark.parametrize("scheme", ["int4-weight", "nvfp4"])
def test_layers_in_four_bits_have_their_branch(runs: list[dict[str, torch.Tensor]], tiny_checkpoint: Any, scheme: str) -> None:
    """As in an export. Kernels and layers with few channels have none, so nothing changes for them."""
    four = SCHEMES[scheme]
    module = build_graph("denoiser", tiny_checkpoint, OPTIONS)
    schemes = [four, replace(four, method=replace(four.method, rank=0))]
    rows = [*GraphLayers(module, "denoiser", runs[:1], "float32").measure(schemes)]
    ratios = {ours.layer: ours.error / plain.error for ours, plain in zip(rows[::2], rows[1::2], strict=True)}
    assert ratios["blocks.1.qkv"] < 0.95
    assert ratios["blocks.1.halves.value.inverted.weight"] != 1
    assert ratios["blocks.1.halves.gate.depthwise.weight"] == 1


def test_inputs_are_rounded_where_a_layer_reads_all_channels(report: SensitivityReport) -> None:
    layer = damage(report, "blocks.1.qkv", "int8")
    assert layer.rounded_inputs
    assert layer.error > damage(report, "blocks.1.qkv", "int8-weight").error
    depthwise = damage(report, "blocks.1.halves.gate.depthwise.weight", "int8")
    assert not depthwise.rounded_inputs
    assert not damage(report, depthwise.layer, "nvfp4").rounded_inputs
    assert depthwise.error == damage(report, depthwise.layer, "int8-weight").error


def in_fp4(values: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """`values` [..., n] in FP4 by the library: 16 along the last axis share a scale, which is an FP8 number times `step`."""
    blocks = values.numpy().reshape(*values.shape[:-1], -1, 16)
    scales = np.abs(blocks).max(axis=-1, keepdims=True) / 6 / step.numpy()
    scales = scales.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * step.numpy()
    numbers = (blocks / scales).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return torch.from_numpy((numbers * scales).reshape(values.shape))


def test_a_layer_in_nvfp4_multiplies_fp4_numbers(
    report: SensitivityReport, runs: list[dict[str, torch.Tensor]], tiny_checkpoint: Any
) -> None:
    """Weights and inputs, computed here without the project's rounding. The own method has less error."""
    layer = "blocks.1.cross_query"
    module = build_graph("denoiser", tiny_checkpoint, OPTIONS)
    nearest = replace(SCHEMES["nvfp4"], method=Method())
    (found,) = (
        row for row in GraphLayers(module, "denoiser", runs, "float32").measure([nearest]) if row.layer == f"{layer}.weight"
    )
    largest: list[torch.Tensor] = []
    with module.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: largest.append(inputs[0].abs().max())):
        wanted = run(module, runs)
    weight, step = module.get_parameter(f"{layer}.weight"), 4 * torch.stack(largest).max() / (6 * 448)
    weight.data = in_fp4(weight.data.T.contiguous(), 1.5 * weight.data.abs().max() / (6 * 448)).T.contiguous()
    with module.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: (in_fp4(inputs[0], step), *inputs[1:])):
        error = relative(run(module, runs), wanted)
    assert found.rounded_inputs
    assert found.error == pytest.approx(error, rel=1e-3)
    assert 0.3 * error < damage(report, f"{layer}.weight", "nvfp4").error < error


def test_outliers_make_a_layer_sensitive(runs: list[dict[str, torch.Tensor]], tiny_checkpoint: Any) -> None:
    """A few large weights make the scales of a layer too coarse for its other weights."""
    layer, errors = "blocks.1.cross_query.weight", []
    for factor in (1, 30):
        module = build_graph("denoiser", tiny_checkpoint, OPTIONS)
        with torch.no_grad():
            weight = module.get_parameter(layer)
            weight[0] = factor * weight.abs().max()
        rows = GraphLayers(module, "denoiser", runs, "float32").measure([SCHEMES["int8-weight"]])
        errors += [row.error for row in rows if row.layer == layer]
    assert errors[1] > 5 * errors[0]


def test_the_report_ranks_layers_and_kinds(report: SensitivityReport) -> None:
    worst = report.worst("denoiser", "int4-weight")
    assert [row.snr_db for row in worst] == sorted(row.snr_db for row in worst)
    kinds = {kind.kind: kind for kind in report.kinds("denoiser", "int4-weight")}
    qkv = [damage(report, f"blocks.{block}.qkv", "int4-weight").snr_db for block in range(3)]
    assert kinds["blocks.*.qkv"].layers == 3
    assert kinds["blocks.*.qkv"].mean_db == pytest.approx(np.mean(qkv))
    assert kinds["blocks.*.qkv"].worst_db == min(qkv)
    document = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert len(document["layers"]) == len(report.rows)
    assert document["layers"][0]["layer"] == report.worst("denoiser", "int8-weight")[0].layer
    text = report.as_text(most=2)
    assert worst[1].layer in text.split("denoiser, int4-weight")[1].split("kinds")[0]
    assert worst[2].layer not in text.split("denoiser, int4-weight")[1].split("kinds")[0]


def test_the_command(tiny_bundle: Path, cli: Cli) -> None:
    size = ("--height", 64, "--width", 64, "--steps", 1, "--prompt", "a red apple")
    ran = cli("verify", tiny_bundle, "--sensitivity", "--graphs", "context", "--scheme", "int8-weight", *size, "--json")
    assert ran.code == 0, ran.err
    layers = {row["layer"]: row for row in ran.json["layers"]}
    assert set(layers) == {"linear_1.weight", "linear_2.weight", "projection.weight"}
    assert all(30 < row["snr_db"] < 80 and not row["taken"] for row in layers.values())


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--sensitivity", "--scheme", "int3"), 2, "unknown quantization scheme"),
        (("--sensitivity", "--graphs", "sampler"), 2, "'sampler' has no layers"),
        (("--sensitivity", "--device", 0), 2, "--sensitivity computes on the CPU"),
        (("--scheme", "int8-weight"), 2, "--scheme belongs to --sensitivity"),
        (("--sensitivity", "--ranges"), 2, "not allowed with"),
    ],
)
def test_what_cannot_be_measured(tiny_bundle: Path, cli: Cli, words: tuple[object, ...], code: int, said: str) -> None:
    ran = cli("verify", tiny_bundle, *words)
    assert (ran.code, said in ran.err) == (code, True), ran.err


def test_a_quantized_bundle_is_refused(quantized_bundle: Path) -> None:
    with pytest.raises(UsageError, match="quantized already") as caught:
        measure_sensitivity(quantized_bundle)
    assert "sana-export export tiny-random -o" in str(caught.value.fix)
    assert "--quantize" not in str(caught.value.fix)
