"""The config of a LoRA: PEFT's adapter_config.json, or the same in the metadata of a file of diffusers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sana_export.errors import ArtifactError
from sana_export.formats.recognize import not_what_was_wanted

#: The key of a safetensors file's metadata under which diffusers stores the adapter's config. Its keys start with "transformer.".
METADATA = "lora_adapter_metadata"
#: PEFT's default of alpha, and of the rank.
PEFT_ALPHA = 8.0
#: The supported kinds of PEFT's adapters, with the key of their alpha.
KINDS = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
#: Keys of a config that make an adapter something else than a change of weights that its tensors say.
UNSUPPORTED = (
    "use_qalora",
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
    "target_parameters",
    "use_bdlora",
)
#: Values of init_lora_weights that do not change the base weights.
PLAIN_INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal")

#: The most bytes of a config.
_MOST_BYTES = 10_000_000
#: The most repetitions in one pattern. More could take the regular expression forever.
_MOST_REPETITIONS = 3
_MOST_PATTERNS, _LONGEST_PATTERN = 10_000, 1000


#: Numbers by pattern.
Patterns = tuple[tuple[re.Pattern[str], float], ...]


@dataclass(frozen=True)
class LoraConfig:
    """What of a config matters."""

    #: alpha of the layers that no pattern fits.
    alpha: float
    #: alpha by pattern. The first that fits a layer counts.
    patterns: Patterns
    #: Whether alpha is divided by the square root of the rank, not by the rank.
    rslora: bool
    #: The rank of the layers that no pattern fits, for layers whose tensors do not have it.
    rank: float = PEFT_ALPHA
    #: The rank by pattern.
    rank_patterns: Patterns = ()

    def alpha_of(self, layer: str) -> float:
        """The layer's alpha."""
        return _first(self.patterns, layer, self.alpha)

    def rank_of(self, layer: str) -> float:
        """The layer's rank."""
        return _first(self.rank_patterns, layer, self.rank)


def _first(patterns: Patterns, layer: str, otherwise: float) -> float:
    return next((number for pattern, number in patterns if pattern.match(layer)), otherwise)


def config_in_file(path: Path, owner: Path) -> LoraConfig:
    """The config in `path`, an adapter_config.json of the LoRA `owner`. Raises ArtifactError if it is damaged or unsupported."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES} bytes")
        text = path.read_text("utf-8")
        json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise not_what_was_wanted(path, "the config of a LoRA in JSON", error, fix="download the LoRA again") from error
    return config_in_text(text, owner)


def config_in_text(text: str, owner: Path) -> LoraConfig:
    """The config in `text`. Raises ArtifactError if it is damaged or of a kind that is not supported."""
    try:
        if len(text) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES} characters")
        document = json.loads(text)
        if not isinstance(document, dict):
            raise TypeError("not a JSON object")
        config = {key.removeprefix("transformer."): value for key, value in document.items()}
        _check_kind(config, owner)
        kind = config.get("peft_type") or "LORA"
        found = LoraConfig(
            _number(KINDS[kind], config.get(KINDS[kind], PEFT_ALPHA)),
            _patterns(config, "alpha_pattern"),
            kind == "LORA" and bool(config.get("use_rslora")),
        )
        if kind != "LOKR":  # the tensors of the others have the rank
            return found
        ranks = _patterns(config, "rank_pattern")
        found = replace(found, rank=_number("r", config.get("r", PEFT_ALPHA)), rank_patterns=ranks)
        if min(found.rank, *(number for _, number in ranks), math.inf) <= 0:
            raise ValueError("a rank is not positive")
        return found
    except (ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"the config of the LoRA {owner} is damaged",
            found=error,
            wanted="a JSON object, as PEFT writes it",
            fix="download the LoRA again",
        ) from error


def _patterns(config: Mapping[str, Any], name: str) -> Patterns:
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict) or len(patterns) > _MOST_PATTERNS:
        raise TypeError(f"{name} = {patterns!r:.80}")
    return tuple((_compiled(pattern, name), _number(name, number)) for pattern, number in patterns.items())


def _check_kind(config: Mapping[str, Any], owner: Path) -> None:
    unsupported = [key for key in UNSUPPORTED if config.get(key)]
    if (config.get("peft_type") or "LORA") not in (*KINDS,):
        unsupported.append("peft_type")
    if config.get("init_lora_weights") not in PLAIN_INITIALIZATIONS:
        unsupported.append("init_lora_weights")
    if unsupported:
        raise ArtifactError(
            f"the LoRA {owner} is of a kind that is not supported",
            found=f"{unsupported[0]} = {config[unsupported[0]]!r:.200}",
            wanted="a LoRA, DoRA, LoHa or LoKr that was not initialized from the weights",
            fix="merge it with PEFT and export the merged checkpoint",
        )


def _compiled(pattern: str, name: str) -> re.Pattern[str]:
    """The expression that matches a layer's name as in PEFT.

    Raises ValueError for one that could take forever: a repeated group, or many repetitions.
    """
    repetitions = len(re.findall(r"(?<!\\)[*+{]", pattern))
    if len(pattern) > _LONGEST_PATTERN or repetitions > _MOST_REPETITIONS or re.search(r"\)[*+{]|\\\d|\(\?", pattern):
        raise ValueError(f"{name} has the pattern {pattern[:80]!r}, which is too complicated")
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{name} has the pattern {pattern[:80]!r}: {error}") from error


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r:.80}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} is not finite")
    return number
