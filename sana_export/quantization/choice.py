"""What a user may ask for: `--quantize` and `--quantize-method`, checked against the tables."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from sana_export.errors import UsageError
from sana_export.quantization.layers import (
    CALIBRATED_PARTS,
    EMBEDDINGS,
    LAYERS,
    PARTS,
    part_of,
    reason_against,
    rounds_inputs,
    tolerated_scheme,
)
from sana_export.quantization.method import NEAREST, Method, parse_method
from sana_export.quantization.schemes import FALLBACK, SCHEMES, Scheme

#: In place of a scheme: the part keeps the bundle's precision.
NONE = "none"


def choose_quantization(words: Iterable[str], graphs: Collection[str]) -> dict[str, str]:
    """The scheme of each part of an export of `graphs`. `words` are SCHEME, for all parts, and PART=SCHEME, which comes before it.

    A part that does not tolerate the scheme for all gets `FALLBACK`. Raises UsageError for an unknown or unavailable scheme, and
    for a part that is unknown, given twice, not exported, or does not tolerate its own scheme.
    """
    given: dict[str, str] = {}
    for word in words:
        part, _, scheme = word.rpartition("=")
        if part in given:
            what = f"for {part}" if part else "for all parts"
            raise UsageError(f"two quantization schemes {what}", found=f"{given[part]} and {scheme}", wanted="one of them")
        if part and part not in PARTS:
            why = f": {reason_against(part, FALLBACK)}" if part in LAYERS else ""
            wanted = f"SCHEME, or PART=SCHEME with {', '.join(PARTS)}"
            raise UsageError(f"nothing of {part!r} can be quantized{why}", found=word, wanted=wanted)
        _check_scheme(scheme)
        if part and scheme != NONE and (better := tolerated_scheme(part, scheme)) != scheme:
            why, fix = reason_against(part, SCHEMES[scheme]), f"--quantize {part}={better}"
            raise UsageError(f"{part} does not take {scheme}: {why}", found=word, wanted=better, fix=fix)
        given[part] = scheme
    present = {EMBEDDINGS, *map(part_of, graphs)}
    exported = [part for part in PARTS if part in present]
    if absent := [part for part in given if part and part not in exported]:
        fix = "add --graphs, or leave it out of --quantize"
        raise UsageError(f"the graph {absent[0]} is not exported", found=f"--quantize {absent[0]}={given[absent[0]]}", fix=fix)
    chosen = {part: given.get(part, given.get("", NONE)) for part in exported}
    return {part: tolerated_scheme(part, scheme) for part, scheme in chosen.items() if scheme != NONE}


def check_method(chosen: Mapping[str, str], words: Iterable[str]) -> tuple[str, ...]:
    """`words` of `--quantize-method` in one order. Raises UsageError for an unknown one, or one that nothing in `chosen` takes."""
    method = parse_method(words)
    if method is None:
        return ()
    taken = {step for scheme in chosen.values() for step in SCHEMES[scheme].steps}
    if unused := [step for step in method.steps if step not in taken]:
        found = ", ".join(sorted(set(chosen.values()))) or "nothing quantized"
        raise UsageError(
            f"no scheme here takes the step {unused[0]}", found=found, wanted=f"a scheme with {unused[0]}, or other steps"
        )
    return method.words


def calibrated_parts(chosen: Mapping[str, str], words: Iterable[str]) -> tuple[str, ...]:
    """The parts among `chosen`, by scheme, that cannot be quantized without calibration. `words`: as for `method_of`."""
    return tuple(
        part
        for part in CALIBRATED_PARTS
        if part in chosen and (rounds_inputs(part, SCHEMES[chosen[part]]) or method_of(SCHEMES[chosen[part]], words).looks_at_data)
    )


def method_of(scheme: Scheme, words: Iterable[str]) -> Method:
    """What `--quantize-method` says in `words`, or without words the scheme's own method. Raises UsageError."""
    return parse_method(words) or scheme.method


def taken_steps(chosen: Mapping[str, str], words: Iterable[str]) -> tuple[str, ...]:
    """Those of `words` of `--quantize-method` whose steps a scheme in `chosen` takes."""
    taken = {step for scheme in chosen.values() for step in SCHEMES[scheme].steps}
    return tuple(word for word in words if word == NEAREST or word.partition("=")[0] in taken)


def quantization_words(chosen: Mapping[str, str]) -> str:
    """What `--quantize` takes to choose `chosen`. "" for nothing."""
    return ",".join(f"{part}={chosen[part]}" for part in PARTS if part in chosen)


def _check_scheme(name: str) -> None:
    if name not in (*SCHEMES, NONE):
        raise UsageError("unknown quantization scheme", found=name or "nothing", wanted=", ".join((*SCHEMES, NONE)))
