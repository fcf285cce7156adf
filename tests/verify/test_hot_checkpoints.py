"""A checkpoint whose activations exceed the range of fp16: fp16 graphs give the image of the clamped fp32 reference."""

from __future__ import annotations

from sana_export.checkpoint.checkpoint import open_checkpoint
from sana_export.export.bundle import export_bundle
from sana_export.runtime import SanaRuntime
from sana_export.verify.bundle import Sampling, measure_ranges, verify_bundle
from tests.support.hot_checkpoints import make_all_hot

SAMPLING = Sampling(prompts=["a red apple", "一只熊猫 🐼"], height=128, width=192)


def test_fp16_graphs_pass(tmp_path, monkeypatch):
    """With intermediates in fp16, every graph is close to its reference, images reach 40 dB, and no tensor overflows.

    Attention, text encoder and decoder are hot, each as tests/synth/test_hot_checkpoints.py says.
    """
    checkpoint = open_checkpoint(str(make_all_hot(tmp_path / "checkpoint")))
    bundle = tmp_path / "bundle"
    manifest = export_bundle(checkpoint, bundle, precision="fp16")
    assert manifest.options.clamp is True
    report = verify_bundle(bundle, checkpoint, SAMPLING)
    assert report.backend.startswith("cpu, float16")
    assert report.passed, report.as_text()
    assert min(row.psnr_db for row in report.images) >= 40.0
    closed = []
    monkeypatch.setattr(SanaRuntime, "close", lambda runtime: closed.append(runtime.bundle))
    ranges = measure_ranges(bundle, SAMPLING)
    assert closed == [bundle]
    assert ranges.rows[0].headroom > 1.0, ranges.as_text()
