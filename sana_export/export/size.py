"""Estimates the size of a bundle from the checkpoint's headers, before anything is written."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.export.quantize.plan import stored_bytes
from sana_export.formats.dtypes import WEIGHT_DTYPES
from sana_export.manifest import Options
from sana_export.quantization.layers import EMBEDDINGS

_TEXT = r"caption_|.*\.attn2\.(to_k|to_v|norm_k)\."


@dataclass(frozen=True)
class GraphWeights:
    """The weights of a graph, in terms of the checkpoint's tensors."""

    #: The checkpoint component that they come from.
    component: str
    #: A regular expression that matches the start of the names of its tensors.
    pattern: str
    #: Numbers in the graph per number in the checkpoint.
    growth: float = 1.0


#: The graphs with weights of their own. The decoder's upsampling convolutions become four 2x2 kernels instead of one 3x3.
GRAPH_WEIGHTS = {
    "text_encoder": GraphWeights("text_encoder", r"(?!embed_tokens)"),
    "context": GraphWeights("transformer", _TEXT),
    "denoiser": GraphWeights("transformer", f"(?!{_TEXT})"),
    "controlnet_context": GraphWeights("controlnet", _TEXT),
    "controlnet": GraphWeights("controlnet", f"(?!{_TEXT})"),
    "vae_decoder": GraphWeights("vae", r"decoder\.", growth=1.1),
    "vae_encoder": GraphWeights("vae", r"encoder\."),
}
#: Bytes for the ONNX files, the tokenizer, alignment and the file system's own overhead.
OVERHEAD = 64 << 20
#: An upper bound. The instruction is about 250 Gemma-2 tokens.
_INSTRUCTION_TOKENS = 512


def graph_bytes(name: str, checkpoint: SanaCheckpoint, options: Options) -> int:
    """Bytes of the weight file of the graph `name`; 0 if it has no weights or shares those of another graph."""
    if options.scheme(name) is not None:
        return stored_bytes(name, checkpoint, options)
    return _whole_bytes(name, checkpoint, options)


def _whole_bytes(name: str, checkpoint: SanaCheckpoint, options: Options) -> int:
    """`graph_bytes` without quantization."""
    if name not in GRAPH_WEIGHTS:
        return 0
    source = GRAPH_WEIGHTS[name]
    weights = checkpoint.weights(source.component)
    numbers = sum(math.prod(weights.shape(tensor)) for tensor in weights if re.match(source.pattern, tensor))
    return int(numbers * source.growth) * WEIGHT_DTYPES[options.dtype].bytes


def temporary_bytes(name: str, checkpoint: SanaCheckpoint, options: Options) -> int:
    """Bytes of the temporary files of an export of the graph `name`: for a quantized one, its weights before and after rounding."""
    return 2 * _whole_bytes(name, checkpoint, options) if options.scheme(name) is not None else 0


def text_bytes(checkpoint: SanaCheckpoint, options: Options) -> int:
    """Bytes of the embedding table as it is stored plus the instruction's keys and values in float32."""
    config, weights = checkpoint.config("text_encoder"), checkpoint.weights("text_encoder")
    rows, channels = weights.shape("embed_tokens.weight")
    quantized = EMBEDDINGS in options.quantize
    table = rows * (channels + 4) if quantized else weights.stored["embed_tokens.weight"].bytes
    row = 2 * config["num_key_value_heads"] * config["head_dim"]
    return table + 4 * config["num_hidden_layers"] * row * _INSTRUCTION_TOKENS
