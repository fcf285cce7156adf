"""The GPUs of this machine, from nvidia-smi or from the driver."""

from __future__ import annotations

import subprocess

import pytest

from sana_export import machine
from sana_export.machine import Gpu, find_gpus, gpu_names


def test_gpus_as_nvidia_smi_lists_them(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "NVIDIA GeForce RTX 4090, 8.9, 24564, 560.35.03\nGraphics, odd name, 12.0, [N/A], 570.00\n"
    done = subprocess.CompletedProcess((), 0, listed, "")
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: done)
    assert find_gpus.__wrapped__() == (
        Gpu("NVIDIA GeForce RTX 4090", "8.9", 24564 << 20, "560.35.03"),
        Gpu("Graphics, odd name", "12.0", None, "570.00"),
    )


@pytest.mark.parametrize(("capability", "gpus"), [(None, ()), ("9.0", (Gpu("an NVIDIA GPU", "9.0"),))])
def test_the_driver_is_asked_if_nvidia_smi_is_missing(
    capability: str | None, gpus: tuple[Gpu, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(machine.subprocess, "run", missing)
    monkeypatch.setattr(machine, "gpu_compute_capability", lambda: capability)
    assert find_gpus.__wrapped__() == gpus


def test_names_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "find_gpus", lambda: (Gpu("NVIDIA H100", "9.0", 80 << 30, "570.1"), Gpu("an NVIDIA GPU", "8.9")))
    assert gpu_names() == ["NVIDIA H100, 570.1", "an NVIDIA GPU"]
