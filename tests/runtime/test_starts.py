"""What is hashed when a bundle is loaded: every file once, and all of them again where a result depends on it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from sana_export.checkpoint.checkpoint import open_checkpoint
from sana_export.cli.verbs.inspect import damaged_files
from sana_export.errors import ArtifactError, UsageError
from sana_export.files import FileEntry
from sana_export.manifest import Manifest
from sana_export.profiles import Profile
from sana_export.runtime import SanaRuntime
from sana_export.runtime.backends.tensorrt import TensorRTBackend
from sana_export.synth.checkpoint import make_checkpoint
from sana_export.trt.compatibility import Gpu, Host
from sana_export.verify.bundle import verify_bundle
from tests.support.hashes import Hashes
from tests.support.host_device import HostDevice
from tests.support.host_tensorrt import HostTensorRT, with_engines

SMALL: dict[str, Any] = {"height": 96, "width": 96, "use_resolution_binning": False, "num_inference_steps": 2, "seed": 1}
HERE = Host((Gpu("Host GPU 1", "8.9"),), {"tensorrt-rtx": "1.7.1.116"}, "linux-x86_64")


def open_onnxruntime(bundle: Path, memory: str) -> SanaRuntime:
    return SanaRuntime.from_pretrained(bundle, backend="onnxruntime", memory=memory)


def open_engines(bundle: Path, memory: str) -> SanaRuntime:
    device = HostDevice()

    def backend(bundle: Path, manifest: Manifest) -> TensorRTBackend:
        return TensorRTBackend(bundle, manifest, "tensorrt-rtx", module=HostTensorRT(device), device=device, machine=HERE)

    return SanaRuntime.from_pretrained(bundle, backend=backend, memory=memory)


Opener = Callable[[Path, str], SanaRuntime]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path, hashes: Hashes) -> Path:
    copy = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    with_engines(copy, Profile("wide", (1, 1, 8), (1, 2, 3), ((32, 32), (512, 512))))
    time.sleep(0.02)  # more than the resolution of the file system's times
    hashes.restart()
    return copy


def names(entries: Iterable[FileEntry]) -> list[str]:
    return sorted({Path(entry.path).name for entry in entries})


def draw(opener: Opener, bundle: Path, memory: str) -> None:
    with opener(bundle, memory) as runtime:
        runtime("fox", **SMALL)
        runtime("a red fox", **SMALL)


@pytest.mark.parametrize("memory", ["resident", "staged"])
@pytest.mark.parametrize("opener", [open_onnxruntime, open_engines])
def test_the_second_start_hashes_nothing(bundle: Path, hashes: Hashes, opener: Opener, memory: str) -> None:
    """A staged runtime loads its graphs again for every image. They are not hashed again either."""
    draw(opener, bundle, memory)
    assert len(hashes) > len(Manifest.load(bundle).files)
    hashes.restart()
    draw(opener, bundle, memory)
    assert hashes == []


@pytest.mark.parametrize(
    ("opener", "file"),
    [
        (open_onnxruntime, "onnx/denoiser/model.onnx.data"),
        (open_onnxruntime, "embeddings.safetensors"),
        (open_engines, "engines/**/denoiser.engine"),
    ],
)
def test_a_file_that_changes_after_a_start_is_refused(bundle: Path, hashes: Hashes, opener: Opener, file: str) -> None:
    draw(opener, bundle, "resident")
    hashes.restart()
    (path,) = bundle.glob(file)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{path.name} is damaged or was replaced"):
        draw(opener, bundle, "resident")


def test_verify_hashes_what_it_loads(bundle: Path, hashes: Hashes, tmp_path: Path) -> None:
    draw(open_onnxruntime, bundle, "resident")
    hashes.restart()
    other = open_checkpoint(str(make_checkpoint("tiny-random", tmp_path / "other", seed=5)))
    with pytest.raises(UsageError, match="was not exported from"):  # it has loaded the bundle by then
        verify_bundle(bundle, other, backend="onnxruntime")
    assert set(hashes) == {"model.onnx", "model.onnx.data", *names(Manifest.load(bundle).files)}


def test_inspect_hashes_everything(bundle: Path, hashes: Hashes) -> None:
    manifest = Manifest.load(bundle)
    files = [*manifest.files, *(file for graph in manifest.graphs.values() for file in graph.files)]
    for _ in range(2):
        assert damaged_files(bundle, files) == {}
        assert sorted(set(hashes)) == names(files)
        hashes.restart()
