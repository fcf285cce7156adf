"""Scales of a LoRA's layers: which layers a pattern fits, and what a command line and a program may give."""

from __future__ import annotations

from pathlib import Path

import pytest

from sana_export.adapters import Lora, lora_at, parse_lora
from sana_export.errors import UsageError
from sana_export.lora_scales import fits, scale_of, scales_text

LAYER = "transformer_blocks.10.attn1.to_out.0"


@pytest.mark.parametrize(
    "pattern",
    [
        *("*", "attn1", "to_out", "to_out.0", "transformer_blocks.10", "transformer_blocks.0-10", "0-12", "10-10.attn1", LAYER),
        *("transformer_blocks.*.attn1", "*.*.*.*.0", "10"),
    ],
)
def test_patterns_that_fit(pattern: str) -> None:
    assert fits(pattern, LAYER)


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "attn",
            "attn2",
            "transformer_blocks.1",
            "transformer_blocks.0-9",
            "1-9",
            "blocks.10",
            "attn1.0",
            "transformer_blocks.attn1",
        ),
        *("*.*.*.*.*.*", f"{LAYER}.0", "ATTN1", "10-1"),
    ],
)
def test_patterns_that_do_not_fit(pattern: str) -> None:
    assert not fits(pattern, LAYER)


def test_the_first_pattern_that_fits_counts() -> None:
    lora = lora_at("x", {"attn1.to_out": 0.1, "*": 0.7, "attn1": 0.2, "transformer_blocks.10": 0.3})
    assert (lora.scale, [pattern for pattern, _ in lora.layer_scales]) == (0.7, ["attn1.to_out", "attn1", "transformer_blocks.10"])
    layers = (LAYER, "transformer_blocks.1.attn1.to_q", "transformer_blocks.10.ff.conv_point", "proj_out")
    assert [scale_of(layer, lora.scale, lora.layer_scales) for layer in layers] == [0.1, 0.2, 0.3, 0.7]


@pytest.mark.parametrize(
    ("text", "scale", "layer_scales"),
    [
        ("a:attn2=0.5", 1.0, (("attn2", 0.5),)),
        ("a:0.7,attn2=-0.5,transformer_blocks.0-9=1e-1", 0.7, (("attn2", -0.5), ("transformer_blocks.0-9", 0.1))),
        ("a:*=2", 2.0, ()),
        ("a:0.7,*.to_q=2", 0.7, (("*.to_q", 2.0),)),
    ],
)
def test_scales_on_a_command_line(text: str, scale: float, layer_scales: tuple[tuple[str, float], ...]) -> None:
    lora = parse_lora(text)
    assert lora == Lora(Path("a"), scale, layer_scales)
    assert parse_lora(f"a:{scales_text(lora.scale, lora.layer_scales)}") == lora
    assert lora_at("a", lora.scales) == lora


@pytest.mark.parametrize("text", ["c:/a=b", "a:0.7,b", "a:b,attn2=1", "a:attn 2=1", "a:attn2=1=2"])
def test_what_is_no_scale_is_part_of_the_path(text: str) -> None:
    assert parse_lora(text) == Lora(Path(text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a:attn2=x", "the scale of attn2 in the LoRA a is not a number"),
        ("a:attn2=", "the scale of attn2 in the LoRA a is not a number"),
        ("a:attn2=nan", "is out of range"),
        ("a:inf,attn2=1", "the scale of the LoRA a is out of range"),
        ("a:attn2..to_q=1", "for no part of a layer's name"),
        ("a:a-b=1", "for no part of a layer's name"),
        (":attn2=1", "PATH:SCALE"),
    ],
)
def test_wrong_scales_are_named(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_lora(text)
