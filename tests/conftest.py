"""The small checkpoints, their bundles, and both ways to run them, made once per session."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from sana_export.environment import import_digest
from tests.support import cuda_driver
from tests.support.bundles import sprint_bundle_in, tiny_bundle_in
from tests.support.command_line import Cli, Ran
from tests.support.hashes import Hashes
from tests.support.longest import longest_first
from tests.support.small_bundles import write_bundle
from tests.support.translations import keep_translations

KEPT_SECONDS = 24 * 3600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = longest_first(items)


def pytest_runtest_setup() -> None:
    keep_translations()


@pytest.fixture(scope="session", autouse=True)
def _interrupts() -> Iterator[None]:
    """Programs that tests start react to Ctrl-C, even if the test run is a background job of a script, which ignores it."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def build_cache(request: pytest.FixtureRequest) -> Path:
    """A folder for what tests build, kept between runs until the code of the export or PyTorch changes.

    With $SANA_EXPORT_TEST_BUNDLES it is that folder, whose bundles another environment exported.
    """
    if given := os.environ.get("SANA_EXPORT_TEST_BUNDLES"):
        return Path(given)
    code = import_digest("sana_export.export.bundle")
    folder = request.config.cache.mkdir("built") / f"{code[:16]}-torch-{version('torch')}"
    for old in folder.parent.iterdir():
        if old != folder and old.stat().st_mtime < time.time() - KEPT_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def driver_library(build_cache: Path) -> Path:
    """The folder with the stand-in for the CUDA driver."""
    if (reason := cuda_driver.why_not()) is not None:
        pytest.skip(reason)
    return cuda_driver.build(build_cache)


@pytest.fixture(scope="session", autouse=True)
def own_cache(build_cache: Path) -> Iterator[None]:
    """sana_export's own cache is in `build_cache`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SANA_EXPORT_CACHE", str(build_cache))
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(own_cache: None) -> Any:
    """The alias `tiny-random`, opened. Its folder is a diffusers checkpoint."""
    from sana_export.checkpoint.checkpoint import open_checkpoint

    return open_checkpoint("tiny-random")


@pytest.fixture(scope="session")
def sprint_checkpoint(own_cache: None) -> Any:
    """The alias `tiny-sprint`, opened."""
    from sana_export.checkpoint.checkpoint import open_checkpoint

    return open_checkpoint("tiny-sprint")


@pytest.fixture(scope="session")
def tiny_bundle(own_cache: None, build_cache: Path) -> Path:
    """The float32 bundle of `tiny-random` with one PAG layer. Tests that change a bundle copy it first."""
    return tiny_bundle_in(build_cache)


@pytest.fixture(scope="session")
def sprint_bundle(own_cache: None, build_cache: Path) -> Path:
    """The float32 bundle of `tiny-sprint`."""
    return sprint_bundle_in(build_cache)


@pytest.fixture(scope="session")
def tiny_runtime(tiny_bundle: Path) -> Any:
    """The fp32 bundle of `tiny-random` in ONNX Runtime."""
    from sana_export.runtime import SanaRuntime

    return SanaRuntime.from_pretrained(tiny_bundle, backend="onnxruntime")


@pytest.fixture(scope="session")
def sprint_runtime(sprint_bundle: Path) -> Any:
    """The fp32 bundle of `tiny-sprint` in ONNX Runtime."""
    from sana_export.runtime import SanaRuntime

    return SanaRuntime.from_pretrained(sprint_bundle, backend="onnxruntime")


@pytest.fixture(scope="session")
def img2img_bundle(tiny_bundle: Path, build_cache: Path) -> Path:
    """The float32 bundle of `tiny-random` with the graphs for image-to-image. Tests that change a bundle copy it first."""
    from tests.support.img2img import with_encoder

    return with_encoder(tiny_bundle, build_cache)


@pytest.fixture(scope="session")
def img2img_runtime(img2img_bundle: Path) -> Any:
    """It in ONNX Runtime."""
    from sana_export.runtime import SanaRuntime

    return SanaRuntime.from_pretrained(img2img_bundle, backend="onnxruntime")


@pytest.fixture(scope="session")
def quantized_bundle(tiny_bundle: Path, tiny_checkpoint: Any, build_cache: Path) -> Path:
    """The float32 bundle of `tiny-random`, with three parts quantized (tests/support/quantized.py)."""
    from tests.support.quantized import quantized_bundle_in

    return quantized_bundle_in(build_cache, tiny_bundle, tiny_checkpoint)


@pytest.fixture(scope="session")
def component_layout(own_cache: None, build_cache: Path) -> Path:
    """`tiny-random` in float32 in optimum's layout. Tests that change a layout copy it first."""
    from tests.support.component_layout import layout_in

    return layout_in(build_cache)


@pytest.fixture(scope="session")
def controlnet_checkpoint(own_cache: None) -> Any:
    """The alias `tiny-random` with a ControlNet, opened."""
    from sana_export.checkpoint.checkpoint import open_checkpoint
    from tests.support.controlnet import ALIAS

    return open_checkpoint("tiny-random", controlnet=ALIAS)


@pytest.fixture(scope="session")
def controlnet_bundle(img2img_bundle: Path, controlnet_checkpoint: Any, build_cache: Path) -> Path:
    """The float32 bundle of `controlnet_checkpoint` with all graphs. Tests that change a bundle copy it first."""
    from tests.support.controlnet import with_controlnet

    return with_controlnet(controlnet_checkpoint, img2img_bundle, build_cache)


@pytest.fixture(scope="session")
def sprint_img2img_runtime(sprint_bundle: Path, build_cache: Path) -> Any:
    """The float32 bundle of `tiny-sprint` with the graphs for image-to-image, in ONNX Runtime."""
    from sana_export.runtime import SanaRuntime
    from tests.support.img2img import with_encoder

    return SanaRuntime.from_pretrained(with_encoder(sprint_bundle, build_cache), backend="onnxruntime")


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_checkpoint: Any) -> Any:
    """The reference: diffusers' SanaPipeline on `tiny-random` in float32."""
    from diffusers import SanaPipeline

    pipeline = SanaPipeline.from_pretrained(tiny_checkpoint.folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def sprint_pipeline(sprint_checkpoint: Any) -> Any:
    """The reference: diffusers' SanaSprintPipeline on `tiny-sprint` in float32."""
    from diffusers import SanaSprintPipeline

    pipeline = SanaSprintPipeline.from_pretrained(sprint_checkpoint.folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs `sana-export ARGUMENTS...` in this process."""

    from sana_export.cli.main import main

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle with the graphs `sampler` and `vae_decoder` and no engines."""
    write_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hashes:
    """The files that are hashed, with an empty cache folder in `tmp_path / "cache"`."""
    return Hashes(tmp_path / "cache", monkeypatch)
