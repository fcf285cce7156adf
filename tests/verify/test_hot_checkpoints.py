"""Checkpoints as hot as the published ones are known to be: fp16 graphs still draw the clamped fp32 reference's picture."""

from __future__ import annotations

import pytest

from sana_export.checkpoint.checkpoint import open_checkpoint
from sana_export.export.bundle import export_bundle
from sana_export.verify.bundle import Sampling, measure_ranges, verify_bundle
from tests.support.hot_checkpoints import HOT_CHECKPOINTS

SAMPLING = Sampling(prompts=["a red apple", "一只熊猫 🐼"], height=128, width=192)


@pytest.mark.parametrize("kind", HOT_CHECKPOINTS)
def test_fp16_graphs_hold(kind, tmp_path):
    """Intermediates stored in fp16: every graph close to its reference, pictures at 40 dB or better, no tensor overflows."""
    checkpoint = open_checkpoint(str(HOT_CHECKPOINTS[kind](tmp_path / "checkpoint")))
    bundle = tmp_path / "bundle"
    manifest = export_bundle(checkpoint, bundle, precision="fp16")
    assert manifest.options.clamp is (kind == "attention")
    report = verify_bundle(bundle, checkpoint, SAMPLING)
    assert report.backend.startswith("cpu, float16")
    assert report.passed, report.as_text()
    assert min(row.psnr_db for row in report.images) >= 40.0
    ranges = measure_ranges(bundle, SAMPLING)
    assert ranges.rows[0].headroom > 1.0, ranges.as_text()
