"""The plan of GPU memory: sums by hand, weights as the export stores them, and the targets that the schemes were made for."""

from __future__ import annotations

import pytest

from sana_export.bench.work.activations import ACTIVATIONS, activations
from sana_export.bench.work.memory import CUDA_BYTES, MODELS, MODES, QUANTIZED, SIZES, MemoryPlan, StageMemory, memory_plans
from sana_export.runtime.plan import choose_tile


@pytest.fixture(scope="module")
def plans():
    return {(plan.model, plan.side, plan.tile, plan.scheme): plan for plan in memory_plans()}


def test_every_combination_has_a_plan(plans):
    assert set(plans) == {(model, *size, scheme) for model in MODELS for size in SIZES for scheme in QUANTIZED}


@pytest.mark.parametrize("side", [1024, 2048, 4096])
def test_the_first_plan_of_a_size_is_the_default(side):
    assert next(tile for size, tile in SIZES if size == side) == choose_tile(None, side, side)


def test_resident_keeps_all_weights_and_one_block_of_work():
    stages = {"text": StageMemory(4, 1, 2), "denoising": StageMemory(10, 5, 0), "decoding": StageMemory(3, 9, 1)}
    stages = {
        name: StageMemory(*(10**9 * value for value in (stage.weights, stage.activations, stage.tensors)))
        for name, stage in stages.items()
    }
    plan = MemoryPlan("600M", 1024, 0, "fp16", stages)
    assert plan.bytes("resident") == (4 + 10 + 3 + 9 + 1) * 10**9 + CUDA_BYTES
    assert plan.bytes("staged") == 15 * 10**9 + CUDA_BYTES
    assert (plan.card("resident"), plan.card("staged")) == (None, 16)


def test_weights_are_those_of_the_parameters(plans):
    """The transformer of 600M has 591.75 million parameters in fp16, apart from tables that the graphs leave out or add."""
    plan = plans["600M", 1024, 0, "fp16"]
    context = plan.stages["text"].weights - plans["4.8B", 1024, 0, "fp16"].stages["text"].weights
    assert context < 0
    assert plan.stages["denoising"].weights == pytest.approx(2 * 591.7e6 - 0.16e9, rel=0.01)
    assert plans["600M", 1024, 0, "int8-weight"].stages["denoising"].weights < 0.53 * plan.stages["denoising"].weights
    assert plans["600M", 1024, 0, "int4-weight"].stages["denoising"].weights < 0.35 * plan.stages["denoising"].weights


def test_activations_scale_with_pixels_channels_and_blocks():
    row = next(row for row in ACTIVATIONS if row.graph == "denoiser" and row.side == 4096)
    assert activations("denoiser", row.side, row.channels, row.layers) is row
    other = activations("denoiser", 2 * row.side, 2 * row.channels, 3 * row.layers)
    assert other.bytes == 8 * (row.bytes - row.fixed) + 6 * row.fixed
    assert "scaled" in other.source
    context = next(row for row in ACTIVATIONS if row.graph == "context")
    assert activations("context", 4096, context.channels, 2 * context.layers).bytes == 2 * context.bytes
    assert activations("sampler", 1024, 2240, 20).bytes == 0


def test_a_decoder_in_one_piece_has_the_activations_of_its_weights(plans):
    """In 8 bits it works in 15 and 13% more. The tiles' figures are those of fp16 for every scheme."""

    def work(side, tile, scheme):
        return plans["600M", side, tile, scheme].stages["decoding"].activations

    rows = {(row.side, row.quantized): row for row in ACTIVATIONS if row.graph == "vae_decoder"}
    assert set(rows) == {(1024, False), (1024, True), (2048, False), (2048, True)}
    for (side, quantized), row in rows.items():
        schemes = [scheme for scheme in QUANTIZED if (scheme != "fp16") == quantized]
        assert {work(side, 0, scheme) for scheme in schemes} == {row.bytes}
        assert activations("vae_decoder", side, 1152, 28, quantized=quantized) is row
    assert rows[1024, True].bytes == pytest.approx(1.15 * rows[1024, False].bytes, rel=0.01)
    assert rows[2048, True].bytes == pytest.approx(1.13 * rows[2048, False].bytes, rel=0.01)
    assert len({work(1024, 512, scheme) for scheme in QUANTIZED}) == 1
    scaled = activations("vae_decoder", 512, 1152, 28, quantized=True)
    assert (scaled.bytes, scaled.quantized) == (round(rows[1024, True].bytes / 4), True)


def test_600m_predicts_1600m():
    """The builder's own figures: those of 600M, scaled, are within 10% of those of 1600M, so 4.8B can be scaled too."""
    for row in ACTIVATIONS:
        if row.channels == 2240:
            small = next(other for other in ACTIVATIONS if (other.graph, other.side, other.channels) == (row.graph, row.side, 1152))
            wide, deep = 2240 / 1152, 20 / 28
            assert wide * (small.bytes - small.fixed) + wide * deep * small.fixed == pytest.approx(row.bytes, rel=0.1)


def test_one_size_of_the_denoiser_predicts_the_others():
    """The builder's own figures for 600M: that of 1024 px, scaled, is within 3% of those of 2048 and 4096 px."""
    small, *larger = sorted(
        (row for row in ACTIVATIONS if row.graph == "denoiser" and row.channels == 1152), key=lambda row: row.side
    )
    assert len(larger) == 2
    for row in larger:
        predicted = (small.bytes - small.fixed) * (row.side / small.side) ** 2 + small.fixed
        assert predicted == pytest.approx(row.bytes, rel=0.03)


#: Model, size, tile, scheme and mode to the most bytes that it may take.
TARGETS = {
    ("1600M", 1024, 0, "int8-weight", "resident"): 6e9,
    ("1600M", 1024, 0, "int8-weight, text encoder int4-weight", "staged"): 3.5e9,
    ("600M", 1024, 0, "int8-weight", "resident"): 4e9,
    ("600M", 1024, 0, "int8-weight, text encoder int4-weight", "resident"): 4e9,
    ("4.8B", 1024, 0, "int8-weight", "resident"): 12e9,
    ("600M", 4096, 1024, "int8-weight", "resident"): 8e9,
    ("1600M", 4096, 1024, "int8-weight", "resident"): 8e9,
    ("4.8B", 4096, 1024, "int8-weight", "staged"): 8e9,
}


@pytest.mark.parametrize(("case", "limit"), TARGETS.items(), ids=map(str, TARGETS))
def test_targets(plans, case, limit):
    assert plans[case[:4]].bytes(case[4]) <= limit


def test_staged_is_never_more_than_resident(plans):
    for plan in plans.values():
        assert [plan.bytes(mode) for mode in MODES] == sorted((plan.bytes(mode) for mode in MODES), reverse=True)


def test_the_command_prints_the_plan_and_the_sources_of_its_figures(cli, monkeypatch):
    stages = {"text": StageMemory(4 * 10**9, 0, 0), "denoising": StageMemory(10**9, 10**9, 5 * 10**8)}
    monkeypatch.setattr("sana_export.bench.work.memory.memory_plans", lambda: [MemoryPlan("600M", 1024, 0, "fp16", stages)])
    row = cli("variants", "--memory").out.splitlines()[1]
    assert row.split("  ")[-2:] == ["6.9 GB: 8 GiB", "4.4 GB: 6 GiB"]
    document = cli("variants", "--memory", "--json").json
    assert document["memory"][0]["modes"]["resident"] == {"bytes": 6_900_000_000, "card_gib": 8}
    assert {row["graph"] for row in document["activations"]} == {row.graph for row in ACTIVATIONS}
