"""The table of programs in docs/lora.md, made again from a file of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from sana_export.adapters import Lora, read_lora
from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.errors import ArtifactError
from tests.support.lora_programs import WRITTEN, Written

PAGE = Path(__file__).parents[2] / "docs" / "lora.md"
HEAD = "| Program | File | A name in it | Outcome |"


def outcome(written: Written, checkpoint: SanaCheckpoint, folder: Path) -> str:
    """What happens to such a file."""
    path = written.make(checkpoint, folder)
    weights = checkpoint.weights("transformer")
    shapes = {
        name.removesuffix(".weight"): tuple(weights.shape(name))
        for name in weights
        if name.endswith(".weight") and len(weights.shape(name)) in (2, 4)
    }
    try:
        folds = read_lora(Lora(path), shapes)
    except ArtifactError as error:
        return f"refused: `{error.message.replace(str(path), '…')}`"
    assert folds
    return "works"


@pytest.mark.parametrize("index", range(len(WRITTEN)), ids=[f"{written.program}, {written.what}" for written in WRITTEN])
def test_the_row_of_the_table(tiny_checkpoint: SanaCheckpoint, tmp_path: Path, index: int) -> None:
    lines = PAGE.read_text("utf-8").split("\n")
    written = WRITTEN[index]
    row = f"| {written.program} | {written.what} | `{written.name}` | {outcome(written, tiny_checkpoint, tmp_path)} |"
    assert lines[lines.index(HEAD) + 2 + index] == row
    assert index + 1 < len(WRITTEN) or lines[lines.index(HEAD) + 3 + index] == "", "no other rows"
