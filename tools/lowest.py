"""Environments with the lowest versions that `pyproject.toml` allows: `make test-lowest` and `make test-lowest-export`.

    python -m tools.lowest runtime            prints the requirements for sampling and building engines, one a line
    python -m tools.lowest export             prints those for exporting
    python -m tools.lowest bundles FOLDER     exports the bundles that the tests of `runtime` need to FOLDER

The packages of the extra `export` are not in `runtime`: transformers asks for a newer tokenizers. So the bundles are exported
outside, and tests that import PyTorch or diffusers are skipped there (tests/support/runtime_only.py).
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Lowest:
    """What is in one environment."""

    #: The extras of the package.
    extras: tuple[str, ...]
    #: What the tests need beside the package, in any version.
    testing: tuple[str, ...]
    #: What the tests need of the extra `dev`, in its lowest version.
    dev: tuple[str, ...] = ()
    #: Requirements of which another package here asks for a newer version.
    newer: tuple[str, ...] = ()


ENVIRONMENTS = {
    "runtime": Lowest(("cpu", "tensorrt-rtx"), ("onnx", "pytest", "psutil", "hypothesis")),
    "export": Lowest(("cpu", "export"), ("pytest", "psutil", "hypothesis"), dev=("peft",), newer=("tokenizers",)),
}


def requirements(environment: str, project: Path = ROOT / "pyproject.toml") -> Iterator[str]:
    """The lowest version of each requirement, then what the tests need."""
    lowest = ENVIRONMENTS[environment]
    table = tomllib.loads(project.read_text("utf-8"))["project"]
    extras = table["optional-dependencies"]
    for requirement in (*table["dependencies"], *(line for extra in lowest.extras for line in extras[extra])):
        if _name(requirement) not in lowest.newer:
            yield _lowest(requirement)
    yield from (_lowest(line) for line in extras["dev"] if _name(line) in lowest.dev)
    yield from lowest.testing


def _name(requirement: str) -> str:
    return requirement.partition(">=")[0]


def _lowest(requirement: str) -> str:
    name, _, version = requirement.partition(">=")
    # TensorRT's releases have four numbers: the first of a series cannot be named by two.
    return f"{name}=={version}.*" if name.startswith("tensorrt") else f"{name}=={version}"


def export_bundles(folder: Path) -> None:
    """Export the bundles of the tests to `folder`, if it does not have them."""
    from tests.support.bundles import sprint_bundle_in, tiny_bundle_in

    folder.mkdir(parents=True, exist_ok=True)
    tiny_bundle_in(folder)
    sprint_bundle_in(folder)


if __name__ == "__main__":
    if sys.argv[1] == "bundles":
        export_bundles(Path(sys.argv[2]))
    else:
        print("\n".join(requirements(sys.argv[1])))
