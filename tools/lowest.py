"""The environment of `make test-lowest`: the lowest versions that `pyproject.toml` allows for sampling and for building engines.

    python -m tools.lowest            prints the requirements of that environment, one a line
    python -m tools.lowest FOLDER     exports the bundles that its tests need to FOLDER

The packages of the extra `export` are not in it: transformers asks for newer tokenizers. So the bundles are exported outside, and
tests that import PyTorch or diffusers are skipped there (tests/support/runtime_only.py).
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTRAS = ("cpu", "tensorrt-rtx")
#: What the tests need beside the package.
TESTING = ("onnx", "pytest", "psutil")


def requirements(project: Path = ROOT / "pyproject.toml") -> Iterator[str]:
    """The lowest version of each requirement, then what the tests need."""
    tables = tomllib.loads(project.read_text("utf-8"))["project"]
    for requirement in (*tables["dependencies"], *(line for extra in EXTRAS for line in tables["optional-dependencies"][extra])):
        name, _, lowest = requirement.partition(">=")
        # TensorRT's releases have four numbers: the first of a series cannot be named by two.
        yield f"{name}=={lowest}.*" if name.startswith("tensorrt") else f"{name}=={lowest}"
    yield from TESTING


def export_bundles(folder: Path) -> None:
    """Export the bundles of the tests to `folder`, if it does not have them."""
    from tests.support.bundles import sprint_bundle_in, tiny_bundle_in

    folder.mkdir(parents=True, exist_ok=True)
    tiny_bundle_in(folder)
    sprint_bundle_in(folder)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        export_bundles(Path(sys.argv[1]))
    else:
        print("\n".join(requirements()))
