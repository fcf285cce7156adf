"""The clip of self-attention is decided by how a checkpoint was trained, not by the dtype that its files happen to have."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from sana_export.checkpoint.checkpoint import open_checkpoint
from sana_export.checkpoint.clamp import trained_with_clamp
from sana_export.export.options import choose_options
from sana_export.variants import VARIANTS, recognize
from tests.support.checkpoint_edits import linked_copy

PLAIN, FP16, BF16 = (f"diffusion_pytorch_model{mark}.safetensors" for mark in ("", ".fp16", ".bf16"))
FP16_ROW, BF16_ROW = VARIANTS["sana-1600m-1024px"], VARIANTS["sana-1600m-1024px-bf16"]
#: The rows with the configs of Sana_1600M_1024px.
TWINS = recognize(FP16_ROW.transformer, FP16_ROW.scheduler)
KNOWN, UNKNOWN = recognize(VARIANTS["sana-600m-1024px"].transformer), ()


@pytest.mark.parametrize(
    ("rows", "names", "stored", "on", "certain"),
    [
        (KNOWN, [PLAIN], "F32", True, True),
        (KNOWN, [BF16], "BF16", True, True),
        (TWINS, [PLAIN, FP16], "F32", True, True),  # a published fp16 checkpoint, downloaded whole
        (TWINS, ["diffusion_pytorch_model.fp16-00001-of-00002.safetensors", PLAIN], "F32", True, True),
        (TWINS, [FP16], "F16", True, True),
        (TWINS, [PLAIN], "F16", True, True),
        (TWINS, [PLAIN], "F32", True, False),  # nothing says: the safe choice
        (TWINS, [PLAIN, BF16], "F32", False, True),
        (TWINS, [BF16], "BF16", False, True),
        (TWINS, [PLAIN, FP16], "BF16", True, True),  # converted
        (UNKNOWN, [PLAIN], "F32", False, True),
        (UNKNOWN, [PLAIN, FP16], "F32", True, True),
        (UNKNOWN, [PLAIN], "F16", True, True),
        (UNKNOWN, [PLAIN], "BF16", False, True),
    ],
)
def test_what_is_known_decides(rows: Any, names: list[str], stored: str, on: bool, certain: bool) -> None:
    found = trained_with_clamp(rows, names, stored)
    assert (found.on, found.certain) == (on, certain)
    assert found.reason


@pytest.fixture
def folder(tiny_checkpoint: Any, tmp_path: Path) -> Path:
    """A folder that is not synthetic."""
    folder = linked_copy(tiny_checkpoint.folder, tmp_path / "checkpoint")
    (folder / "sana_export.json").unlink()
    return folder


def test_fp16_files_beside_the_float32_ones(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = open_checkpoint(str(folder))
    assert choose_options(checkpoint, "fp32", (), None).clamp is False
    (folder / "transformer" / FP16).touch()
    assert choose_options(checkpoint, "fp32", (), None).clamp is True
    assert [path.name for path in checkpoint.weight_files("transformer")] == [PLAIN]


def test_the_rows_of_a_transformer_do_not_depend_on_the_scheduler(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder that looks like Sana_1600M_1024px with another scheduler: the clip is not lost, and a warning says what to do."""
    same = recognize(FP16_ROW.transformer)
    assert same == TWINS
    assert recognize(FP16_ROW.transformer, {"_class_name": "FlowMatchEulerDiscreteScheduler"}) == ()
    monkeypatch.setattr(
        "sana_export.checkpoint.checkpoint.recognize", lambda transformer, scheduler=None: same if scheduler is None else ()
    )
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.rows == ()
    with caplog.at_level(logging.WARNING):
        assert choose_options(checkpoint, "fp16", (), None).clamp is True
    assert "sana-1600m-1024px-bf16" in caplog.text
    assert "--no-clamp" in caplog.text
    caplog.clear()
    assert choose_options(checkpoint, "fp16", (), False).clamp is False
    assert caplog.text == ""
