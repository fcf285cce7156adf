"""Configs of LoRAs: patterns as PEFT matches them, and limits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sana_export.errors import ArtifactError
from sana_export.lora_config import config_in_text

OWNER = Path("style.safetensors")
LAYERS = ("transformer_blocks.1.attn1.to_q", "transformer_blocks.10.attn1.to_q", "transformer_blocks.1.attn2.to_q", "proj_out")


@pytest.mark.parametrize(
    "pattern", ["to_q", "attn1.to_q", r"transformer_blocks\.1\.attn1\.to_q", "^proj_out", r".*\.1\..*to_q", "to_q|to_k"]
)
def test_patterns_match_as_in_peft(pattern: str) -> None:
    other_tuners = pytest.importorskip("peft.utils.other")
    config = config_in_text(json.dumps({"lora_alpha": 2, "alpha_pattern": {pattern: 5, "to_q": 7}}), OWNER)
    for layer in LAYERS:
        key = other_tuners.get_pattern_key([pattern, "to_q"], layer)
        assert config.alpha_of(layer) == {pattern: 5, "to_q": 7}.get(key, 2)


@pytest.mark.parametrize("pattern", [r"([a-z_.\d]+)+!", "(a*)*", ".*.*.*.*x", "(x)\\1", "(?=a)", "(", "a{1000}{1000}", "a" * 2000])
def test_a_pattern_that_could_take_forever_or_is_none_is_refused(pattern: str) -> None:
    with pytest.raises(ArtifactError, match="the config of the LoRA") as caught:
        config_in_text(json.dumps({"alpha_pattern": {pattern: 5}}), OWNER)
    assert "alpha_pattern" in str(caught.value.found)


@pytest.mark.parametrize(
    "text",
    [
        *('{"lora_alpha": "8"}', '{"lora_alpha": true}', '{"lora_alpha": NaN}', '{"lora_alpha": 1e999}', '{"lora_alpha": null}'),
        *(
            '{"alpha_pattern": [1]}',
            '{"alpha_pattern": {"to_q": "x"}}',
            "[]",
            "1",
            "",
            "{",
            "[" * 100_000,
            '{"lora_alpha": 1%s}' % ("0" * 400),
        ),
    ],
)
def test_a_damaged_config_is_an_artifact_error(text: str) -> None:
    with pytest.raises(ArtifactError, match="is damaged"):
        config_in_text(text, OWNER)
