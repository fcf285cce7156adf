"""How many bytes a bundle takes, known from the checkpoint's headers before anything is written."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.formats.dtypes import WEIGHT_DTYPES
from sana_export.manifest import Options

_TEXT = r"caption_|.*\.attn2\.(to_k|to_v|norm_k)\."


@dataclass(frozen=True)
class GraphWeights:
    """Which of a component's tensors become weights of a graph, and how many numbers the graph holds for each of theirs."""

    component: str
    pattern: str
    growth: float = 1.0


#: The graphs that hold weights of their own. The decoder's upsampling convolutions are four times 2x2 instead of 3x3.
GRAPH_WEIGHTS = {
    "text_encoder": GraphWeights("text_encoder", r"(?!embed_tokens)"),
    "context": GraphWeights("transformer", _TEXT),
    "denoiser": GraphWeights("transformer", f"(?!{_TEXT})"),
    "vae_decoder": GraphWeights("vae", r"decoder\.", growth=1.1),
}
#: Room for the ONNX files, the tokenizer, alignment and whatever a file system adds.
OVERHEAD = 64 << 20
#: The instruction is about 250 tokens of Gemma-2.
_INSTRUCTION_TOKENS = 512


def graph_bytes(name: str, checkpoint: SanaCheckpoint, options: Options) -> int:
    """Bytes of the weight file of the graph `name`; 0 for a graph without weights or with another's."""
    if name not in GRAPH_WEIGHTS:
        return 0
    part = GRAPH_WEIGHTS[name]
    weights = checkpoint.weights(part.component)
    numbers = sum(math.prod(weights.shape(tensor)) for tensor in weights if re.match(part.pattern, tensor))
    return int(numbers * part.growth) * WEIGHT_DTYPES[options.dtype].bytes


def text_bytes(checkpoint: SanaCheckpoint) -> int:
    """Bytes of the embedding table as it is stored, and of the instruction's keys and values in float32."""
    config, weights = checkpoint.config("text_encoder"), checkpoint.weights("text_encoder")
    table = weights.stored["embed_tokens.weight"].bytes
    row = 2 * config["num_key_value_heads"] * config["head_dim"]
    return table + 4 * config["num_hidden_layers"] * row * _INSTRUCTION_TOKENS
