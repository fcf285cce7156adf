"""Writes the bundle's files that turn a prompt into the text encoder's input: tokenizer, instruction and embedding table."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.checkpoint.tokenizer import complex_human_instruction, load_tokenizer
from sana_export.graphs.text_encoder import encode_instruction

TOKENIZER = "tokenizer/tokenizer.json"
INSTRUCTION = "instruction.safetensors"
EMBEDDINGS = "embeddings.safetensors"


def write_text_files(checkpoint: SanaCheckpoint, bundle: Path) -> str:
    """Write the tokenizer, the instruction's keys and values, and the embedding table. Returns the instruction's text."""
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
    for file, content in ((INSTRUCTION, tensors), (EMBEDDINGS, {"embed_tokens.weight": table})):
        save_file(content, bundle / file)
        (bundle / file).chmod(0o644)  # save_file makes it readable for the owner only
    return instruction
