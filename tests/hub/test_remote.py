"""A stranger's manifest: what is refused before a file is downloaded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sana_export.errors import ArtifactError
from sana_export.files import FileEntry
from sana_export.hub.bundles.fetch import pull_bundle
from sana_export.hub.bundles.push import push_bundle
from sana_export.hub.bundles.remote import check_names
from sana_export.manifest import MAX_BYTES, Manifest, seal
from tests.support.hub_server import LocalHub

REPO = "me/sana-bundle"


def with_file(manifest: Manifest, *paths: str) -> Manifest:
    return dataclasses.replace(manifest, files=(*manifest.files, *(FileEntry(path, "0" * 64, 1) for path in paths)))


@pytest.mark.parametrize(
    "path",
    [
        *("a\\b", "C:x", "a:b", "a*", "a?", "[a]\n", "a\tb", 'a"b', "a<b", "a|b", "a\x7f", "\u202eexe.txt"),
        *("NUL", "con", "onnx/COM1", "aux.txt", "CON.data", "a/prn/b", "lpt9 .x", "Com\u00b2", "CONIN$"),
        *("kernels.cache", "engines/tensorrt-rtx/a/sampler.gpu.Cache", "engines/onnxruntime-tensorrt-rtx/a/x", "Onnx/x"),
        *("a//b", "./a", "a/./b", "a/", ".git/config", "onnx/.hidden", ".cache/x", "end.", "end ", "a/end./b", "x" * 256),
        *(
            "manifest.json",
            "Manifest.JSON",
            "hub.json",
            "INSTRUCTION.safetensors",
            "onnx",
            "ONNX/vae_decoder",
            "instruction.safetensors/x",
        ),
    ],
)
def test_names_that_are_refused(bundle: Path, path: str) -> None:
    with pytest.raises(ArtifactError, match="lists files that cannot be downloaded"):
        check_names(REPO, with_file(Manifest.load(bundle), path))


@pytest.mark.parametrize(
    "paths", [("Gr\u00f6\u00dfe", "Gro\u0308\u00dfe"), ("a/\u00e9", "a/E\u0301"), ("stra\u00dfe", "STRASSE"), ("b/x", "B/y")]
)
def test_two_names_that_some_system_takes_for_one(bundle: Path, paths: tuple[str, str]) -> None:
    manifest = Manifest.load(bundle)
    for path in paths:
        check_names(REPO, with_file(manifest, path))
    with pytest.raises(ArtifactError, match="in two spellings"):
        check_names(REPO, with_file(manifest, *paths))


@pytest.mark.parametrize(
    "path",
    [
        *("notes.txt", "sampler.engine", "engines/sampler.engine", "engines/tensorrt-rtx/sampler.engine"),
        *("engines/tensorrt/a/sampler.engine", "engines/tensorrt-rtx/a/denoiser.engine", "engines/tensorrt-rtx/a/sampler.engine/x"),
    ],
)
def test_engines_at_other_places_are_refused(engine_bundle: Path, path: str) -> None:
    manifest = Manifest.load(engine_bundle)
    check_names(REPO, manifest)
    first, *others = manifest.engines
    engine = dataclasses.replace(first, file=dataclasses.replace(first.file, path=path))
    with pytest.raises(ArtifactError, match="lists files that cannot be downloaded") as caught:
        check_names(REPO, dataclasses.replace(manifest, engines=(engine, *others)))
    assert str(caught.value.wanted) == "engines/tensorrt-rtx/.../sampler.engine"


@pytest.mark.parametrize(
    "path",
    [
        "a",
        "COM",
        "console",
        "nul1/auxiliary.txt",
        "com10",
        "onnx/x y/model (1).onnx",
        "Größe/模型.data",
        "a,b;c&d='e'!#%+@~",
        "[a]",
    ],
)
def test_names_that_are_taken_as_they_are(bundle: Path, local_hub: LocalHub, tmp_path: Path, path: str) -> None:
    target = bundle / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(b"x")
    digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    manifest = Manifest.load(bundle)
    dataclasses.replace(manifest, files=(*manifest.files, FileEntry(path, digest, 1))).save(bundle)
    push_bundle(bundle, REPO)
    assert (pull_bundle(REPO, tmp_path / "out").folder / path).read_bytes() == b"x"


def test_a_file_that_is_listed_twice(bundle: Path, local_hub: LocalHub, tmp_path: Path) -> None:
    manifest = Manifest.load(bundle)
    dataclasses.replace(manifest, files=(*manifest.files, *manifest.files)).save(bundle)
    push_bundle(bundle, REPO)
    pull_bundle(REPO, tmp_path / "out")
    assert len(local_hub.downloads) == len(set(local_hub.downloads))
    with pytest.raises(ArtifactError, match=r"instruction\.safetensors twice"):
        check_names(REPO, with_file(manifest, "instruction.safetensors"))


def edited(document: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The manifest with a change, sealed again."""
    document.pop("sha256")
    change(document)
    return json.dumps({**document, "sha256": seal(document)}).encode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda manifest: manifest.update(tool_version="9.9.0"), ("written by another version", "written by 9.9.0")),
        (lambda manifest: manifest.update(format=99), ("written by another version", "format 99")),
        (lambda manifest: manifest["files"][0].update(path="../../.bashrc"), ("names a file outside itself",)),
        (lambda manifest: manifest["files"][0].update(path="/etc/passwd"), ("names a file outside itself",)),
        (
            lambda manifest: manifest["files"][0].update(bytes=1 << 60),
            ("not the file that its", "1152921504606846976"),
        ),
        (lambda manifest: manifest["files"][0].update(bytes=-1), ("is not the file that its manifest lists",)),
        (
            lambda manifest: manifest["files"][0].update(sha256="0" * 64),
            ("not the file that its", "wanted: sha256 0000"),
        ),
        (lambda manifest: manifest["model"].update(latent_channels=1 << 40), ("is damaged",)),
    ],
    ids=["version", "format", "parent", "absolute", "huge", "negative", "hash", "numbers"],
)
def test_sealed_manifests_that_ask_for_too_much(
    bundle: Path, local_hub: LocalHub, tmp_path: Path, change: Callable[[dict[str, Any]], Any], words: tuple[str, ...]
) -> None:
    push_bundle(bundle, REPO)
    files = local_hub.files(REPO)
    local_hub.put(REPO, {**files, "manifest.json": edited(json.loads(files["manifest.json"]), change)})
    local_hub.downloads.clear()
    with pytest.raises(ArtifactError) as caught:
        pull_bundle(REPO, tmp_path / "out")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert REPO in str(caught.value)
    assert "hf-cache" not in str(caught.value)
    assert set(local_hub.downloads) == {"manifest.json"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []


def test_other_manifests(bundle: Path, local_hub: LocalHub, tmp_path: Path) -> None:
    for content, words in ((b"not JSON", "is damaged"), (b"<html>", "manifest.json"), (b" " * (MAX_BYTES + 1), "too large")):
        local_hub.put(REPO, {"manifest.json": content})
        with pytest.raises(ArtifactError, match=words):
            pull_bundle(REPO, tmp_path / "out")
    assert local_hub.downloads.count("manifest.json") <= 4  # not the large one
    local_hub.put(REPO, {"manifest.json": (bundle / "manifest.json").read_bytes()})
    with pytest.raises(ArtifactError, match="is not the file that its manifest lists") as caught:
        pull_bundle(REPO, tmp_path / "out")
    assert "no such file" in str(caught.value)
