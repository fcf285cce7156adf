"""Writes the bundle's files that turn a prompt into the text encoder's input: tokenizer, instruction and embedding table."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
from safetensors.torch import save_file

from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.errors import ArtifactError
from sana_export.graphs.text_encoder import encode_instruction

TOKENIZER = "tokenizer/tokenizer.json"
INSTRUCTION = "instruction.safetensors"
EMBEDDINGS = "embeddings.safetensors"


def write_text_files(checkpoint: SanaCheckpoint, bundle: Path) -> str:
    """Write the tokenizer, the instruction's keys and values, and the embedding table. Returns the instruction's text.

    Raises ArtifactError if the tokenizer's file does not reproduce the tokenizer.
    """
    from transformers import AutoTokenizer

    text, weights = checkpoint.config("text_encoder"), checkpoint.weights("text_encoder")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder / "tokenizer", local_files_only=True)
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    path = bundle / TOKENIZER
    path.parent.mkdir(parents=True, exist_ok=True)
    backend.save(str(path))

    instruction = complex_human_instruction()
    token_ids = torch.tensor(backend.encode(instruction).ids)
    if token_ids.tolist() != tokenizer.encode(instruction) or token_ids[0] != tokenizer.bos_token_id:
        raise ArtifactError(
            f"{path} encodes the instruction differently from the checkpoint's tokenizer",
            found=f"tokens that start with {backend.encode(instruction).tokens[:4]}",
            wanted=f"{tokenizer.bos_token} first, then the same token ids as {type(tokenizer).__name__}",
            fix=f"replace {checkpoint.folder / 'tokenizer'} with the tokenizer of a published Sana checkpoint",
        )
    table = weights["embed_tokens.weight"]
    prefix, bos_row = encode_instruction(text, weights, table[token_ids].float())
    # The instruction's last token may merge with the prompt, so its keys and values cannot be reused.
    tensors = {"token_ids": token_ids, "prefix": prefix[..., :-1, :].contiguous(), "bos_row": bos_row}
    for file, content in ((INSTRUCTION, tensors), (EMBEDDINGS, {"embed_tokens.weight": table})):
        save_file(content, bundle / file)
        (bundle / file).chmod(0o644)  # save_file makes it readable for the owner only
    return instruction


def complex_human_instruction() -> str:
    """The instruction that Sana's pipelines put before a prompt: the default argument of diffusers' `SanaPipeline.__call__`."""
    from diffusers import SanaPipeline

    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)
