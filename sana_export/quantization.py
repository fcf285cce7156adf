"""Quantization: the schemes, which layers take one, and what a user may ask for. Tables, and the functions that read them.

A scheme says how a layer's weights are stored. A layer rule says how few bits a layer tolerates, and why not
fewer. An export applies one scheme to each part of a bundle: to a graph, or to the embedding table.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from sana_export.contract import WEIGHTS_OF
from sana_export.errors import UsageError
from sana_export.gpu_support import RTX_CAPABILITIES, RTX_PORTABLE
from sana_export.quantization_method import NEAREST, Method, parse_method

#: The bits of one value of each type.
BITS = {"int8": 8, "fp8": 8, "int4": 4, "fp4": 4}
#: The type that ONNX Runtime has no kernels for.
NO_KERNELS = "fp4"
#: How many numbers of FP4 share a scale.
BLOCK = 16
#: Bytes of one scale of the types whose scales do not have the bundle's precision. NVFP4 stores its own in FP8.
SCALE_BYTES = {"fp4": 1}
#: The name of the embedding table among the parts. It belongs to no graph.
EMBEDDINGS = "embeddings"
#: In place of a scheme: the part keeps the bundle's precision.
NONE = "none"


@dataclass(frozen=True)
class Scheme:
    """One way to store a layer."""

    #: Its name on the command line.
    name: str
    #: The type of the weights.
    weights: str
    #: How many inputs of one output channel share a scale. 0: all of them.
    block: int
    #: The first version of ONNX's operator set that can express it.
    opset: int
    #: The compute capabilities of the GPUs that TensorRT-RTX compiles it for.
    capabilities: tuple[str, ...]
    #: The type of the layers' inputs. "": the bundle's precision.
    inputs: str = ""
    #: How its numbers are chosen if the user does not say.
    method: Method = field(default_factory=Method)
    #: The steps of a method that it can take.
    steps: tuple[str, ...] = ("search", "gptq")
    #: The least cosine of a graph's outputs with those of the same graph of diffusers.
    cosine_limit: float = 0.0
    #: The least PSNR in dB of an image against diffusers'.
    psnr_limit: float = 0.0
    #: The least mean PSNR in dB of the images of `verify --quality`. Plain rounding gives `tiny` 50.5 dB in 8 bits, 29.3 dB in 4.
    quality_psnr: float = 30.0
    #: The largest difference in percentage points between the top-1 of `verify --quality` and the reference's.
    quality_top1: float = 1.0

    @property
    def bits(self) -> int:
        """Bits of one weight."""
        return BITS[self.weights]

    @property
    def input_bits(self) -> int:
        """Bits of one number of the layers' inputs."""
        return BITS.get(self.inputs, 16)


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8-weight", "int8", 0, 20, RTX_CAPABILITIES, cosine_limit=0.998, psnr_limit=25.0),
        Scheme(
            "int4-weight",
            "int4",
            32,
            21,
            RTX_CAPABILITIES[1:],
            method=Method(search=True, rank=32),
            steps=("search", "gptq", "rescale", "low-rank"),
            cosine_limit=0.95,
            psnr_limit=12.0,
            quality_psnr=25.0,
            quality_top1=3.0,
        ),
        Scheme(
            "int8",
            "int8",
            0,
            20,
            RTX_CAPABILITIES,
            inputs="int8",
            method=Method(rescale=True),
            steps=("search", "gptq", "rescale", "ranges"),
            cosine_limit=0.99,
            psnr_limit=15.0,
        ),
        Scheme(
            "fp8",
            "fp8",
            0,
            20,
            ("8.9", "12.0", "12.1"),
            inputs="fp8",
            steps=("rescale", "ranges"),
            cosine_limit=0.99,
            psnr_limit=15.0,
        ),
        Scheme(
            "nvfp4",
            "fp4",
            BLOCK,
            23,
            ("12.0", "12.1"),
            inputs="fp4",
            method=Method(search=True, rank=32),
            steps=("search", "gptq", "rescale", "low-rank"),
            cosine_limit=0.95,
            psnr_limit=12.0,
            quality_psnr=25.0,
            quality_top1=3.0,
        ),
    )
}
#: What a layer takes that does not tolerate, or does not fit, the blocks of a scheme with fewer bits.
FALLBACK = SCHEMES["int8-weight"]


@dataclass(frozen=True)
class LayerRule:
    """How few bits the layers of some parameters tolerate."""

    #: A regular expression that matches the end of a parameter's name in its graph.
    pattern: str
    #: The fewest bits of its weights: 4 or 8, or 16 for a layer that keeps the bundle's precision.
    bits: int
    #: Why not fewer.
    reason: str
    #: The fewest bits of the layers' inputs.
    inputs: int = 16


_TOLERATES = "published 4-bit Sana stores it in 4 bits (deepcompressor)"
_SMALL = "small, and every step depends on it"
_EVERYTHING_ELSE = LayerRule("", 16, "no matrix: biases, norms and tables are small")
_TRANSFORMER = (
    LayerRule(r"blocks\.\d+\.qkv|\.out\.weight|\.cross_query\.weight|\.cross_out\.weight", 4, _TOLERATES, inputs=4),
    LayerRule(r"\.inverted\.weight", 4, _TOLERATES, inputs=4),
    LayerRule(r"\.point\.weight", 4, f"{_TOLERATES}; its input has outliers of 50 times its root mean square"),
    LayerRule(r"\.depthwise\.weight", 16, "nine weights for each channel: little to save, and published 4-bit Sana keeps it"),
    LayerRule(r"time_embed\..*\.weight", 16, "small: little to save"),
    LayerRule(r"(patch_embed|latents_embed|control_embed|control_in|proj_out|outputs\.\d+)\.weight", 16, _SMALL),
)
_CONTEXT = (LayerRule(r"\.weight", 16, "cross-attention's keys and values: published 4-bit Sana keeps them in 16 bits"),)
_AUTOENCODER = (
    LayerRule(
        r"\.qkv|\.attention\.out|\.inverted\.weight|\.point\.weight|\.conv[12]\.weight",
        8,
        "4 bits were never tried; rounded inputs would make most of it, the 3x3 convolutions, slower on a CPU",
    ),
    LayerRule(r"\.depthwise\.weight|\.aggregations\.\d+\.\w+\.weight", 16, "few weights for each channel"),
    LayerRule(
        r"stages\.\d+\.\d+\.weight",
        16,
        "contains the 1.0 weights of its shortcut, which set a scale too coarse for its other weights",
    ),
    LayerRule(r"conv_(in|out)\.weight", 16, "small, and the whole image depends on it"),
)
#: The rules of each part, the first that matches counts. Graphs that are not here have nothing to quantize.
LAYERS: dict[str, tuple[LayerRule, ...]] = {
    EMBEDDINGS: (LayerRule("embed_tokens", 8, "rows are looked up, not multiplied: 8 bits with a scale for each row"),),
    "text_encoder": (LayerRule(r"\.(qkv|out|gate|up|down)\.weight", 4, "weight-only 4 bits are common for language models"),),
    "context": _CONTEXT,
    "denoiser": _TRANSFORMER,
    "controlnet": _TRANSFORMER,
    "controlnet_context": _CONTEXT,
    "vae_decoder": _AUTOENCODER,
    "vae_encoder": _AUTOENCODER,
}
#: The parts of a bundle that take a scheme.
PARTS = tuple(part for part, rules in LAYERS.items() if any(rule.bits < 16 for rule in rules))
#: The parts whose inputs calibration sees. It makes latents from text, and decodes none.
CALIBRATED_PARTS = ("text_encoder", "denoiser")


def part_of(graph: str) -> str:
    """The part that `graph` belongs to. Graphs that share a weight file share a scheme."""
    return WEIGHTS_OF.get(graph, graph)


def layer_rule(part: str, parameter: str) -> LayerRule:
    """The rule for a parameter of a part's graph."""
    found = (rule for rule in LAYERS.get(part, ()) if re.search(f"({rule.pattern})$", f".{parameter}"))
    return next(found, _EVERYTHING_ELSE)


def layer_scheme(part: str, rule: LayerRule, scheme: Scheme, inputs: int) -> Scheme | None:
    """What a layer of `part` with `rule` and so many `inputs` takes of `scheme`; None if it keeps the bundle's precision.

    A layer takes `FALLBACK` if it does not tolerate the scheme's bits, or if the scheme's blocks do not divide its inputs. If the
    scheme rounds inputs, and the layer does not tolerate that or calibration does not see its inputs, it takes the weights alone.
    """
    if rule.bits > FALLBACK.bits:
        return None
    return _tolerated_by(part, rule, scheme) if not scheme.block or inputs % scheme.block == 0 else FALLBACK


def _tolerated_by(part: str, rule: LayerRule, scheme: Scheme) -> Scheme:
    """What a layer of `part` with `rule` takes of `scheme`."""
    if scheme.bits < rule.bits:
        return FALLBACK
    seen = not scheme.inputs or part in CALIBRATED_PARTS
    if seen and scheme.input_bits >= rule.inputs:
        return scheme
    return FALLBACK if scheme.bits == FALLBACK.bits else replace(scheme, inputs="")


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
            why = f": {_reason(part, FALLBACK)}" if part in LAYERS else ""
            wanted = f"SCHEME, or PART=SCHEME with {', '.join(PARTS)}"
            raise UsageError(f"nothing of {part!r} can be quantized{why}", found=word, wanted=wanted)
        _check_scheme(scheme)
        if part and scheme != NONE and (better := _tolerated(part, scheme)) != scheme:
            why, fix = _reason(part, SCHEMES[scheme]), f"--quantize {part}={better}"
            raise UsageError(f"{part} does not take {scheme}: {why}", found=word, wanted=better, fix=fix)
        given[part] = scheme
    present = {EMBEDDINGS, *map(part_of, graphs)}
    exported = [part for part in PARTS if part in present]
    if absent := [part for part in given if part and part not in exported]:
        fix = "add --graphs, or leave it out of --quantize"
        raise UsageError(f"the graph {absent[0]} is not exported", found=f"--quantize {absent[0]}={given[absent[0]]}", fix=fix)
    chosen = {part: given.get(part, given.get("", NONE)) for part in exported}
    return {part: _tolerated(part, scheme) for part, scheme in chosen.items() if scheme != NONE}


def _tolerated(part: str, name: str) -> str:
    """The scheme `name`, or `FALLBACK` if no layer of `part` takes it."""
    return name if any(_tolerated_by(part, rule, SCHEMES[name]) is not FALLBACK for rule in LAYERS[part]) else FALLBACK.name


def _reason(part: str, scheme: Scheme) -> str:
    """Why no layer of `part` takes `scheme`."""
    rule = min(LAYERS[part], key=lambda rule: rule.bits)
    if scheme.bits >= rule.bits and scheme.inputs:
        seen = part in CALIBRATED_PARTS
        return (
            "its layers' inputs keep the bundle's precision"
            if seen
            else "calibration, which makes latents from text, does not run it"
        )
    return rule.reason


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
        if part in chosen and (_rounds_inputs(part, SCHEMES[chosen[part]]) or method_of(SCHEMES[chosen[part]], words).looks_at_data)
    )


def _rounds_inputs(part: str, scheme: Scheme) -> bool:
    return any(_tolerated_by(part, rule, scheme).inputs for rule in LAYERS[part])


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


def check_target(part: str, name: str, backend: str, capabilities: Collection[str], *, fix: str, named: str) -> None:
    """Raise UsageError unless engines of `backend` for these compute capabilities can have the scheme `name` of `part`.

    No compute capability means a portable engine. TensorRT-RTX compiles one without the GPUs that lack the type, and says nothing,
    so it is refused if one that a portable engine contains is missing. `fix` is the command that exports `part` with `FALLBACK`,
    which has every target, and `named` the one that builds for the GPUs that have the type. For TensorRT the table is an
    assumption: it was never run.
    """
    portable = not capabilities and backend == "tensorrt-rtx"
    if refused := lacking(name, backend, capabilities):
        raise UsageError(
            f"{backend} has no {SCHEMES[name].weights} for compute capability {', '.join(refused)}"
            + (", which a portable engine is for too" if portable else ""),
            found=f"{part} quantized with {name}",
            wanted=f"compute capability {', '.join(SCHEMES[name].capabilities)}, or another scheme for {part}",
            fix=named if portable else fix,
        )


def lacking(name: str, backend: str, capabilities: Collection[str]) -> list[str]:
    """Those of the compute capabilities of an engine of `backend` that the scheme `name` does not exist for."""
    wanted = RTX_PORTABLE if not capabilities and backend == "tensorrt-rtx" else capabilities
    return [capability for capability in wanted if capability in RTX_CAPABILITIES and capability not in SCHEMES[name].capabilities]


def common_capabilities(names: Iterable[str]) -> tuple[str, ...]:
    """The compute capabilities that TensorRT-RTX compiles every one of these schemes for.

    Empty if those of a portable engine are among them: then a build does not have to name any.
    """
    own = [SCHEMES[name].capabilities for name in names]
    found = tuple(capability for capability in RTX_CAPABILITIES if all(capability in possible for possible in own))
    return () if set(RTX_PORTABLE) <= set(found) else found


def without_kernels(chosen: Mapping[str, str]) -> dict[str, str]:
    """Those parts of `chosen`, with their schemes, whose weights ONNX Runtime has no kernels for."""
    return {part: name for part, name in chosen.items() if SCHEMES[name].weights == NO_KERNELS}


def portable_targets(name: str) -> tuple[str, ...]:
    """The compute capabilities in a portable TensorRT-RTX engine with the scheme. Empty: those of every portable engine."""
    found = tuple(capability for capability in RTX_PORTABLE if capability in SCHEMES[name].capabilities)
    return () if found == RTX_PORTABLE else found
