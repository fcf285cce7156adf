"""What CUDA's errors mean, in each of the forms in which libraries report them."""

from __future__ import annotations

import pytest

from sana_export.cuda_errors import OUT_OF_MEMORY, find_failure


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        # cuda-core since 1.1, and before
        ("CUDA_ERROR_OUT_OF_MEMORY: The API call failed because it was unable to allocate enough memory", "--memory staged"),
        ("Failed to allocate memory from pool", "--memory staged"),
        # TensorRT and TensorRT-RTX
        ("Error Code 1: Cuda Runtime (out of memory)", "--memory staged"),
        ("[x.cpp::f::250] Error Code 1: Cuda Runtime (In f at x.cpp:250 (cudaError 2: out of memory))", "--memory staged"),
        ("CUDA initialization failure with error: 35. Please check your CUDA installation", "update NVIDIA's driver"),
        ("Error Code 1: Cuda Runtime (CUDA driver version is insufficient for CUDA runtime version)", "update NVIDIA's driver"),
        ("Error Code 1: Cuda Runtime (In f at x.cpp:250 (cudaError 500: named symbol not found))", "update NVIDIA's driver"),
        ("Error Code 1: Cuda Runtime (no CUDA-capable device is detected)", "CUDA_VISIBLE_DEVICES"),
        ("CUDA initialization failure with error: 100", "CUDA_VISIBLE_DEVICES"),
        ("CUDA error 101", "CUDA_VISIBLE_DEVICES"),
        ("(cudaError 802: system not yet initialized)", "nvidia-fabricmanager"),
        ("system has unsupported display driver / cuda driver combination", "restart the machine"),
        ("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "restart the machine"),
        ("cudaErrorCompatNotSupportedOnDevice", "cuda-compat"),
        ("CUDA error 999", "nvidia-smi"),
        ("Error Code 1: Cuda Driver (unknown error)", "nvidia-smi"),
        ("CUDA_ERROR_UNKNOWN", "nvidia-smi"),
        ("CUDA-capable device(s) is/are busy or unavailable", "close the other program"),
        ("an illegal memory access was encountered", "start the program again"),
        ("CUDA_ERROR_LAUNCH_FAILED: An exception occurred on the device", "start the program again"),
        # cuda-core without a driver
        ('"cuda" is an NVIDIA driver library […]. Ensure the NVIDIA display driver is installed.', "install NVIDIA's driver"),
        ("Failed to dlopen libcuda.so.1", "install NVIDIA's driver"),
        ("cudaErrorInsufficientDriver", "update NVIDIA's driver"),
    ],
)
def test_errors_are_recognized_by_name_number_or_words(text: str, fix: str) -> None:
    failure = find_failure(text)
    assert failure is not None
    assert fix in failure.fix


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Error Code 1: Serialization (magic tag 2 is not 100)",
        "Error Code 2: Internal Error (assertion failed)",
        "Error Code 3: API Usage Error (profile 802 is out of range)",
        "[checkMacros.cpp::catchCudaError::250] Error Code 1: Myelin (999)",
        "the engine was built for compute capability 8.9",
    ],
)
def test_other_errors_are_left_alone(text: str) -> None:
    assert find_failure(text) is None


def test_numbers_and_names_are_complete() -> None:
    """`cudaError 20` is not error 2, and CUDA_ERROR_NOT_FOUND_X is not CUDA_ERROR_NOT_FOUND."""
    assert find_failure("cudaError 20: x") is None
    assert find_failure("CUDA_ERROR_NOT_FOUND_X") is None
    assert find_failure("cudaError 2: x") is OUT_OF_MEMORY
