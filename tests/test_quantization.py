"""The tables of quantization: what a user may ask for, and which target a scheme has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sana_export.adapters import Lora
from sana_export.commands import export_command
from sana_export.contract import GRAPHS
from sana_export.errors import UsageError
from sana_export.gpu_support import RTX_CAPABILITIES
from sana_export.manifest import Checkpoint, Options
from sana_export.quantization.choice import calibrated_parts, check_method, choose_quantization, quantization_words
from sana_export.quantization.layers import PARTS, layer_rule, layer_scheme
from sana_export.quantization.method import Method, parse_method
from sana_export.quantization.schemes import BITS, FALLBACK, SCHEMES
from sana_export.quantization.targets import check_target, common_capabilities, portable_targets

DEFAULT = ["text_encoder", "context", "denoiser", "sampler", "vae_decoder", "vae_decoder_head", "vae_decoder_tail", "postprocess"]


def test_the_tables_name_what_exists() -> None:
    assert set(PARTS) <= {"embeddings", *GRAPHS}
    for scheme in SCHEMES.values():
        assert set(scheme.capabilities) <= set(RTX_CAPABILITIES)
        assert scheme.bits == BITS[scheme.weights]
    assert tuple(SCHEMES) == ("int8-weight", "int4-weight", "int8", "fp8", "nvfp4")


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        ([], {}),
        (["none"], {}),
        (["text_encoder=int4-weight"], {"text_encoder": "int4-weight"}),
        (
            ["int8-weight", "denoiser=none"],
            {"embeddings": "int8-weight", "text_encoder": "int8-weight", "vae_decoder": "int8-weight"},
        ),
        # Rows of the embedding table and the decoder do not tolerate 4 bits.
        (
            ["int4-weight"],
            {
                "embeddings": "int8-weight",
                "text_encoder": "int4-weight",
                "denoiser": "int4-weight",
                "vae_decoder": "int8-weight",
            },
        ),
        (
            ["nvfp4"],
            {"embeddings": "int8-weight", "text_encoder": "nvfp4", "denoiser": "nvfp4", "vae_decoder": "int8-weight"},
        ),
    ],
)
def test_words_choose_schemes(words: list[str], chosen: dict[str, str]) -> None:
    assert choose_quantization(words, DEFAULT) == chosen
    assert choose_quantization([word for word in quantization_words(chosen).split(",") if word], DEFAULT) == chosen


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (["nf4"], ["unknown quantization scheme", "nf4", "int8-weight, int4-weight"]),
        ([""], ["unknown quantization scheme", "nothing"]),
        (["denoiser="], ["unknown quantization scheme", "nothing"]),
        (["vae_decoder=nvfp4"], ["vae_decoder does not take nvfp4: 4 bits were never tried", "--quantize vae_decoder=int8-weight"]),
        (["text_encoder=int8"], ["text_encoder does not take int8: its layers' inputs keep", "text_encoder=int8-weight"]),
        (["embeddings=fp8"], ["embeddings does not take fp8", "embeddings=int8-weight"]),
        (["unet=int8-weight"], ["nothing of 'unet' can be quantized", "embeddings, text_encoder, denoiser"]),
        (["context=int8-weight"], ["nothing of 'context' can be quantized: cross-attention's keys and values"]),
        (["vae_encoder=int8-weight"], ["the graph vae_encoder is not exported", "--graphs"]),
        (
            ["vae_decoder=int4-weight"],
            ["vae_decoder does not take int4-weight: 4 bits were never tried", "--quantize vae_decoder=int8-weight"],
        ),
        (["int8-weight", "int4-weight"], ["two quantization schemes for all parts", "int8-weight and int4-weight"]),
        (["denoiser=none", "denoiser=int8-weight"], ["two quantization schemes for denoiser"]),
    ],
)
def test_wrong_words_are_named(words: list[str], texts: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        choose_quantization(words, DEFAULT)
    assert all(text in str(error.value) for text in texts), error.value


def test_a_part_that_calibration_does_not_run_keeps_its_inputs() -> None:
    chosen = choose_quantization(["int8"], [*DEFAULT, "controlnet"])
    assert chosen["denoiser"] == "int8"
    assert {chosen[part] for part in ("vae_decoder", "controlnet", "text_encoder", "embeddings")} == {"int8-weight"}
    with pytest.raises(UsageError, match="calibration, which makes latents from text, does not run it"):
        choose_quantization(["controlnet=fp8"], ["controlnet"])


@pytest.mark.parametrize(
    ("words", "method", "parts"),
    [
        (["int8-weight"], [], ()),
        (["int8-weight"], ["search"], ()),
        (["int8-weight"], ["gptq"], ("text_encoder", "denoiser")),
        (["denoiser=int8"], ["nearest"], ("denoiser",)),
        (["denoiser=int4-weight"], ["nearest"], ()),
        (["text_encoder=int4-weight"], ["low-rank=16"], ()),
        (["text_encoder=int4-weight"], ["rescale"], ("text_encoder",)),
        (["nvfp4"], ["nearest"], ("denoiser",)),
        (["text_encoder=nvfp4"], ["search"], ()),
    ],
)
def test_what_needs_a_calibration(words: list[str], method: list[str], parts: tuple[str, ...]) -> None:
    assert calibrated_parts(choose_quantization(words, DEFAULT), method) == parts


@pytest.mark.parametrize(
    ("chosen", "words", "text"),
    [
        ({"denoiser": "int8-weight"}, ["rescale"], "no scheme here takes the step rescale"),
        ({"denoiser": "int8"}, ["gptq", "low-rank=8"], "no scheme here takes the step low-rank"),
        ({"denoiser": "fp8"}, ["search"], "no scheme here takes the step search"),
        ({}, ["gptq"], "no scheme here takes the step gptq"),
        ({}, ["foo"], "unknown step"),
    ],
)
def test_a_step_that_nothing_takes_is_refused(chosen: dict[str, str], words: list[str], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        check_method(chosen, words)


def test_words_are_kept_in_one_order() -> None:
    mixed = {"text_encoder": "int4-weight", "denoiser": "int8"}
    words = ("rescale", "search", "low-rank=8", "ranges=mse")
    assert check_method(mixed, reversed(words)) == check_method(mixed, words) == words
    assert check_method(mixed, []) == ()
    assert check_method(mixed, ["nearest"]) == ("nearest",)


def test_the_words_of_a_method() -> None:
    assert parse_method([]) is None
    assert parse_method(["nearest"]) == Method()
    found = parse_method(["rescale", "search", "gptq", "low-rank=32", "ranges=mse"])
    assert found == Method(rescale=True, search=True, gptq=True, rank=32, ranges="mse")


@pytest.mark.parametrize(
    "words", [["nearest", "gptq"], ["low-rank"], ["low-rank=0"], ["low-rank=300"], ["ranges=best"], [""], ["awq"]]
)
def test_a_wrong_step_is_named(words: list[str]) -> None:
    with pytest.raises(UsageError, match=r"unknown step|none of the other steps"):
        parse_method(words)


@pytest.mark.parametrize(
    ("part", "parameter", "bits"),
    [
        ("denoiser", "blocks.3.qkv", 4),
        ("denoiser", "blocks.27.out.weight", 4),
        ("denoiser", "blocks.0.halves.gate.inverted.weight", 4),
        ("denoiser", "blocks.0.halves.gate.depthwise.weight", 16),
        ("denoiser", "blocks.0.halves.gate.inverted.bias", 16),
        ("denoiser", "time_embed.linear.weight", 16),
        ("denoiser", "proj_out.weight", 16),
        ("controlnet", "outputs.0.weight", 16),
        ("context", "projection.weight", 16),
        ("vae_decoder", "tail.stages.0.1.conv1.weight", 8),
        ("vae_decoder", "stages.0.0.attention.qkv", 8),
        ("vae_decoder", "stages.0.0.attention.aggregations.0.pointwise.weight", 16),
        ("vae_decoder", "tail.stages.0.0.weight", 16),
        ("vae_decoder", "stages.0.0.attention.norm.weight", 16),
        ("text_encoder", "layers.0.down.weight", 4),
        ("text_encoder", "layers.0.input_norm.weight", 16),
        ("sampler", "anything", 16),
    ],
)
def test_each_layer_has_its_rule(part: str, parameter: str, bits: int) -> None:
    rule = layer_rule(part, parameter)
    assert rule.bits == bits
    assert rule.reason


def test_a_layer_that_the_blocks_do_not_fit_takes_8_bits() -> None:
    rule, four = layer_rule("denoiser", "blocks.0.out.weight"), SCHEMES["int4-weight"]
    assert layer_scheme("denoiser", rule, four, 64) is four
    assert layer_scheme("denoiser", rule, four, 48) is FALLBACK
    assert layer_scheme("vae_decoder", layer_rule("vae_decoder", "tail.stages.0.1.conv1.weight"), four, 64) is FALLBACK
    assert layer_scheme("denoiser", layer_rule("denoiser", "proj_out.weight"), four, 64) is None
    assert layer_scheme("denoiser", rule, SCHEMES["int8"], 64) is SCHEMES["int8"]
    assert layer_scheme("controlnet", rule, SCHEMES["int8"], 64) is FALLBACK


def test_a_layer_that_keeps_its_inputs_has_fp4_weights_all_the_same() -> None:
    """But no INT8 weights with the method of the scheme that rounds inputs."""
    point, out, nvfp4 = (
        layer_rule("denoiser", "blocks.0.point.weight"),
        layer_rule("denoiser", "blocks.0.out.weight"),
        SCHEMES["nvfp4"],
    )
    weights_alone = replace(nvfp4, inputs="")
    assert layer_scheme("denoiser", out, nvfp4, 64) is nvfp4
    assert layer_scheme("denoiser", point, nvfp4, 64) == weights_alone
    assert layer_scheme("denoiser", point, SCHEMES["int8"], 64) is FALLBACK
    assert layer_scheme("controlnet", out, nvfp4, 64) == weights_alone
    assert layer_scheme("text_encoder", layer_rule("text_encoder", "layers.0.down.weight"), nvfp4, 64) == weights_alone
    assert layer_scheme("denoiser", out, nvfp4, 24) is FALLBACK


def test_a_target_without_the_type_is_refused() -> None:
    fixes = {"fix": "export it again", "named": "name the GPUs"}
    for scheme in ("int8-weight", "int8"):
        check_target("denoiser", scheme, "tensorrt-rtx", RTX_CAPABILITIES, **fixes)
        check_target("denoiser", scheme, "tensorrt-rtx", (), **fixes)
    check_target("denoiser", "int4-weight", "tensorrt-rtx", (), **fixes)
    check_target("denoiser", "fp8", "tensorrt-rtx", ("8.9", "12.0", "12.1"), **fixes)
    with pytest.raises(UsageError, match=r"tensorrt-rtx has no int4 for compute capability 7\.5\n") as error:
        check_target("denoiser", "int4-weight", "tensorrt-rtx", ("7.5", "8.9"), **fixes)
    assert error.value.fix == "export it again"
    with pytest.raises(UsageError, match=r"no fp4 for compute capability 8\.9"):
        check_target("denoiser", "nvfp4", "tensorrt-rtx", ("8.9",), **fixes)
    assert set(FALLBACK.capabilities) == set(RTX_CAPABILITIES), "the fix has every target"


def test_a_portable_engine_needs_the_type_on_every_gpu_that_it_is_for() -> None:
    """TensorRT-RTX would compile one that lacks the others, without a word."""
    with pytest.raises(UsageError, match=r"no fp8 for compute capability 8\.0, 8\.6, which a portable engine is for too") as error:
        check_target("denoiser", "fp8", "tensorrt-rtx", (), fix="export it again", named="name the GPUs")
    assert error.value.fix == "name the GPUs"
    check_target("denoiser", "fp8", "tensorrt", (), fix="", named="")
    with pytest.raises(UsageError, match=r"no fp4 for compute capability 8\.0, 8\.6, 8\.9, which a portable engine is for too"):
        check_target("denoiser", "nvfp4", "tensorrt-rtx", (), fix="", named="")
    check_target("denoiser", "nvfp4", "tensorrt-rtx", ("12.0", "12.1"), fix="", named="")


def test_the_gpus_that_all_schemes_of_a_bundle_exist_for() -> None:
    assert common_capabilities([]) == common_capabilities(["int8", "int4-weight"]) == ()
    assert common_capabilities(["fp8", "int8-weight"]) == ("8.9", "12.0", "12.1")
    assert common_capabilities(["fp8", "nvfp4"]) == ("12.0", "12.1")


def test_the_export_command_repeats_the_schemes() -> None:
    exported = SimpleNamespace(
        checkpoint=Checkpoint("tiny", None, "0" * 64, "tiny", synthetic=False),
        options=Options("fp16", clamp=False, quantize={"text_encoder": "int4-weight", "denoiser": "int8-weight"}),
        graphs=DEFAULT,
    )
    command = export_command(Path("b"), exported)
    assert command == "sana-export export tiny -o b --quantize text_encoder=int4-weight,denoiser=int8-weight"


@pytest.mark.parametrize(
    ("changes", "repeated"),
    [
        ({}, True),
        ({"pag_layers": (1,)}, True),
        ({"quantize": {"denoiser": "fp8", "text_encoder": "int4-weight"}}, True),
        ({"quantize": {"denoiser": "int8-weight", "text_encoder": "int4-weight"}}, False),
        ({"quantize": {}}, False),
        ({"loras": [Lora(Path("style"), 0.7)]}, False),
        ({"precision": "fp32"}, False),
        ({"controlnet": "controlnet-hed-1600m"}, False),
    ],
    ids=str,
)
def test_the_export_command_repeats_a_calibration_file_that_fits(changes: dict[str, Any], repeated: bool) -> None:
    """It belongs to one checkpoint, with its LoRAs, and one precision, and a scheme has to take it: `export` refuses any other."""
    quantize = {"denoiser": "nvfp4", "text_encoder": "int4-weight"}
    exported = SimpleNamespace(
        checkpoint=Checkpoint("tiny", None, "0" * 64, "tiny", synthetic=False),
        options=Options("fp16", clamp=False, quantize=quantize, calibration_file="measured.safetensors"),
        graphs=DEFAULT,
    )
    assert ("--calibration measured.safetensors" in export_command(Path("b"), exported, **changes)) == repeated


def test_graphs_that_share_weights_share_the_scheme() -> None:
    options = Options("fp16", clamp=False, quantize={"vae_decoder": "int8-weight"})
    assert [options.scheme(graph) for graph in ("vae_decoder", "vae_decoder_tail", "denoiser")] == ["int8-weight"] * 2 + [None]
    assert Options("fp16", clamp=False).scheme("vae_decoder") is None


def test_what_a_portable_engine_contains() -> None:
    assert portable_targets("int8-weight") == portable_targets("int4-weight") == ()
    assert portable_targets("fp8") == ("8.9", "12.0", "12.1")
