"""The order of the test files: the longest first, so that no process of `make test` is left with one of them at the end."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
#: The files that take longest. The first does not need the bundle that the second exports: two processes begin with them.
LONGEST = (
    "verify/test_hot_checkpoints.py",
    "bench/test_run.py",
    "runtime/backends/test_tensorrt.py",
    "bench/test_gpu_check_parts.py",
    "runtime/backends/test_cuda.py",
    "verify/test_quality.py",
    "export/test_sprint.py",
    "graphs/test_full_width_decoder.py",
    "graphs/test_full_width.py",
    "export/test_vae.py",
    "verify/test_verify_bundle.py",
    "cli/test_engines.py",
    "export/test_component_layout.py",
    "integrations/test_bundle_refusals.py",
    "synth/test_full_size.py",
    "verify/test_layers.py",
    "test_examples.py",
    "test_example_cpp.py",
    "tools/test_gpu_check.py",
)


def longest_first(items: Iterable[Any]) -> list[Any]:
    """Tests in their order, but those of `LONGEST` before all others."""
    places = {TESTS / name: place for place, name in enumerate(LONGEST)}
    return sorted(items, key=lambda item: places.get(item.path, len(places)))
