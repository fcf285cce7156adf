from pathlib import Path

import pytest

from tests.trt.small_bundles import write_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle with the graphs `sampler` and `vae_decoder` and no engines."""
    write_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"
