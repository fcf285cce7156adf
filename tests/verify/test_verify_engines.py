"""`verify` with engines: every check uses shapes that they were built for."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from sana_export.machine import Gpu
from sana_export.manifest import Manifest
from sana_export.profiles import custom_profile
from sana_export.runtime.backends.tensorrt import TensorRTBackend
from sana_export.trt.compatibility import Host
from sana_export.verify.bundle import Sampling, verify_bundle
from tests.support.host_device import HostDevice
from tests.support.host_tensorrt import HostTensorRT, with_engines

HERE = Host((Gpu("Host GPU 1", "8.9"),), {"tensorrt-rtx": "1.7.1.116"}, "linux-x86_64")
WHOLE = {"text_encoder", "context", "denoiser", "sampler", "vae_decoder", "postprocess"}


@pytest.mark.parametrize(("profile", "size"), [("default", 128), ("one size", 96)])
def test_engines_of_a_profile_pass(tiny_checkpoint: Any, tiny_bundle: Path, tmp_path: Path, profile: str, size: int) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    manifest = Manifest.load(bundle)
    with_engines(bundle, "default" if profile == "default" else custom_profile(manifest.model, height=size, width=size))
    manifest = Manifest.load(bundle)
    engines = tuple(engine for engine in manifest.engines if engine.graph in WHOLE)
    dataclasses.replace(manifest, engines=engines).save(bundle)
    device = HostDevice()
    module = HostTensorRT(device)

    def backend(bundle: Path, manifest: Manifest) -> TensorRTBackend:
        return TensorRTBackend(bundle, manifest, "tensorrt-rtx", module=module, device=device, machine=HERE)

    sampling = Sampling(("a red fox", "一只可爱的熊猫"), size, size, 2)
    report: Any = verify_bundle(bundle, tiny_checkpoint, sampling, backend=backend)  # type: ignore[arg-type]
    assert report.passed, report.as_text()
    assert {row.name for row in report.graphs} == WHOLE
    assert set(module.runs) == WHOLE
    assert report.backend == "tensorrt-rtx"
    assert len(report.images) == 4
    assert device.used == 0, "the runtime is closed afterwards"
