"""Writes the bundle's files that turn a prompt into the text encoder's input: tokenizer, instruction and embedding table."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.checkpoint.tokenizer import complex_human_instruction, load_tokenizer
from sana_export.export.quantize.rounding import round_to_nearest
from sana_export.formats.dtypes import WEIGHT_DTYPES
from sana_export.graphs.text_encoder import encode_instruction

TOKENIZER = "tokenizer/tokenizer.json"
INSTRUCTION = "instruction.safetensors"
EMBEDDINGS = "embeddings.safetensors"
#: How many rows of the embedding table are quantized at a time.
_ROWS = 4096


def write_text_files(checkpoint: SanaCheckpoint, bundle: Path, *, quantized: bool = False) -> str:
    """Write the tokenizer, the instruction's keys and values, and the embedding table. Returns the instruction's text.

    `quantized`: the table in 8 bits. The instruction is encoded with the checkpoint's own weights in any case.
    """
    text, weights = checkpoint.config("text_encoder"), checkpoint.weights("text_encoder")
    backend = load_tokenizer(checkpoint).backend_tokenizer
    path = bundle / TOKENIZER
    path.parent.mkdir(parents=True, exist_ok=True)
    backend.save(str(path))

    instruction = complex_human_instruction()
    token_ids = torch.tensor(backend.encode(instruction).ids)
    table = weights["embed_tokens.weight"]
    prefix, bos_row = encode_instruction(text, weights, table[token_ids].float())
    # The instruction's last token may merge with the prompt, so its keys and values cannot be reused.
    tensors = {"token_ids": token_ids, "prefix": prefix[..., :-1, :].contiguous(), "bos_row": bos_row}
    rows = quantize_rows(table) if quantized else {"embed_tokens.weight": table}
    for file, content in ((INSTRUCTION, tensors), (EMBEDDINGS, rows)):
        save_file(content, bundle / file)
        (bundle / file).chmod(0o644)  # save_file makes it readable for the owner only
    return instruction


def quantize_rows(table: Tensor) -> dict[str, Tensor]:
    """The table [rows, C] in 8 bits, with a float32 scale for each row. A part of it at a time is in memory in float32."""
    values, scales = torch.empty(table.shape, dtype=torch.int8), torch.empty(table.shape[0])
    for first in range(0, len(table), _ROWS):
        part = table[first : first + _ROWS].float().numpy()
        rounded = round_to_nearest(part, "int8", axis=0, block=0, scales=WEIGHT_DTYPES["float32"])
        values[first : first + _ROWS] = torch.from_numpy(rounded.values)
        scales[first : first + _ROWS] = torch.from_numpy(rounded.scales)
    return {"embed_tokens.weight": values, "embed_tokens.scale": scales}
