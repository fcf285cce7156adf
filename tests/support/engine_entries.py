"""An engine's entry in a manifest and a machine that runs it. Tests change the fields that they are about."""

from __future__ import annotations

from sana_export.files import FileEntry
from sana_export.machine import Gpu
from sana_export.manifest import EngineEntry
from sana_export.trt.compatibility import Host

ADA, HOPPER = Gpu("NVIDIA RTX 4090", "8.9"), Gpu("NVIDIA H100", "9.0")
ENGINE = EngineEntry(
    graph="sampler",
    backend="tensorrt-rtx",
    key="0" * 64,
    file=FileEntry("engines/tensorrt-rtx/0/sampler.engine", "0" * 64, 6),
    onnx_sha256="1" * 64,
    backend_version="1.7.1",
    compute_capabilities=(),
    operating_system="any",
    profile="default",
    ranges={"batch": (1, 1, 4), "latent_height": (4, 16, 64), "latent_width": (4, 16, 64)},
)
THERE = Host((ADA,), {"tensorrt-rtx": "1.7.1", "tensorrt": "11.0"}, "linux-x86_64")
