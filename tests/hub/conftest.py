"""A local test server as the hub, and a small bundle with engines for two kinds of machines."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from sana_export.files import file_entry
from sana_export.manifest import Manifest
from tests.support.engine_entries import ENGINE
from tests.support.hub_server import LocalHub, connect, running

REPO = "me/sana-bundle"


@pytest.fixture
def local_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A hub on a port of this machine that the real huggingface_hub uses, with an empty cache and the token of `me`."""
    with running() as hub:
        connect(hub, tmp_path / "hf-cache", monkeypatch, "hf_owner")
        yield hub


def add_engine(bundle: Path, name: str, content: bytes = b"engine", **fields: object) -> Manifest:
    """Put an engine into the manifest, whose file has a few bytes."""
    path = bundle / "engines" / "tensorrt-rtx" / name / "sampler.engine"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content + name.encode())
    fields = {"key": name.ljust(64, "0"), "file": file_entry(bundle, path), **fields}
    entry = dataclasses.replace(ENGINE, **fields)  # type: ignore[arg-type]
    manifest = Manifest.load(bundle).with_engine(entry)
    manifest.save(bundle)
    return manifest


@pytest.fixture
def engine_bundle(bundle: Path) -> Path:
    """The small bundle with a portable engine, and one for compute capability 7.5."""
    add_engine(bundle, "a1")
    add_engine(bundle, "b2", compute_capabilities=("7.5",))
    return bundle
