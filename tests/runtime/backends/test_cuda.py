"""`CudaDevice` and the engines above it on a stand-in for the CUDA driver, with the real cuda-core. Each run is a child process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support import cuda_driver
from tests.support.cuda_driver.faults import FAULTS

HERE = Path(__file__).parent
DEVICE_CHECKS = str(HERE / "test_gpu_cuda.py")
#: The tests of engines that show most of what the device does, by file.
ENGINE_CHECKS = {
    HERE / "test_tensorrt.py": (
        "test_images_are_those_of_onnxruntime[defaults]",
        "test_images_are_those_of_onnxruntime[prompt,num_images_per_prompt,seed]",
        "test_images_are_those_of_onnxruntime[height,width,decoder_tile]",
        "test_a_captured_loop_stays_valid_whatever_runs_in_between[pag_scale]",
        "test_a_captured_loop_stays_valid_whatever_runs_in_between[width]",
        "test_a_loop_is_captured_again_when_its_memory_has_moved",
        "test_steps_are_replayed_one_by_one_for_a_callback",
        "test_times_are_of_the_device",
        "test_a_capture_that_fails_is_replaced_by_steps_without_a_graph",
        "test_threads_share_a_runtime",
    ),
    HERE.parent / "test_memory.py": ("test_nothing_of_a_closed_runtime_stays_on_the_device",),
}
#: Opens the device, as a user's program does.
OPEN = """
from sana_export.errors import SanaExportError
from sana_export.runtime.backends.cuda import CudaDevice
try:
    CudaDevice()
except SanaExportError as error:
    print(type(error).__name__, error)
"""


def test_the_device_works(driver_library: Path) -> None:
    """What the device does on a GPU (test_gpu_cuda.py)."""
    run = cuda_driver.run_tests(driver_library, ["-m", "gpu", DEVICE_CHECKS])
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(driver_library: Path, name: str) -> None:
    check = FAULTS[name].found_by
    for _ in range(3):  # two threads do not meet in every run
        run = cuda_driver.run_tests(driver_library, ["-m", "gpu", f"{DEVICE_CHECKS}::{check}"], CUDA_STAND_IN_FAULT=name)
        if run.returncode == 1:
            break
    assert run.returncode == 1, run.stdout + run.stderr
    assert f"::{check}" in run.stdout


def test_engines_run_in_graphs_of_the_driver(driver_library: Path) -> None:
    """The real device under the TensorRT backend: engines are host functions of its stream and its graphs."""
    checks = [f"{file}::{name}" for file, names in ENGINE_CHECKS.items() for name in names]
    run = cuda_driver.run_tests(driver_library, checks)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("code", "found", "fix"),
    [
        (100, "CUDA_ERROR_NO_DEVICE", "docker run --gpus all"),
        (802, "CUDA_ERROR_SYSTEM_NOT_READY", "systemctl start nvidia-fabricmanager"),
        (803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "restart the machine"),
        (999, "CUDA_ERROR_UNKNOWN", "run nvidia-smi"),
    ],
)
def test_a_driver_that_does_not_start_is_explained(driver_library: Path, code: int, found: str, fix: str) -> None:
    run = cuda_driver.run(driver_library, ["-c", OPEN], CUDA_STAND_IN_INIT=str(code))
    assert run.stdout.startswith("DependencyError the GPU cannot be used: opening the GPU failed\n"), run.stdout + run.stderr
    assert found in run.stdout
    assert fix in run.stdout
    assert "install NVIDIA's driver" not in run.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="the stand-in is for Linux")
def test_what_the_stand_in_lacks_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("cuda.core")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C compiler" in str(cuda_driver.why_not())
    monkeypatch.setenv("CC", sys.executable)
    monkeypatch.setattr("importlib.metadata.files", lambda _: None)
    assert "pip install nvidia-cuda-runtime" in str(cuda_driver.why_not())
