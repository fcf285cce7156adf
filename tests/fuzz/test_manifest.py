"""Manifests that were changed and sealed again: a manifest whose files are inside the bundle, or an error of ours."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sana_export.cli.verbs.inspect import damaged_files
from sana_export.errors import ArtifactError, DependencyError, SanaExportError, UsageError
from sana_export.files import check_files
from sana_export.manifest import FILE_NAME, Manifest, seal
from sana_export.runtime import Request, SanaRuntime
from tests.fuzz.support import MIB, at_most, inputs

PATHS = st.sampled_from(
    [
        "../secret",
        "/etc/passwd",
        "..",
        ".",
        "",
        "C:\\x",
        "a/../../secret",
        "link",
        "pipe",
        "zero",
        "onnx",
        "\0",
        "é\u202e",
        "x" * 5000,
        FILE_NAME,
    ]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 10**9, 2**63, 10**400, 1e308, -0.0])
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | PATHS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def document(tiny_bundle: Path) -> dict[str, Any]:
    """The manifest of a bundle, with an engine, without its seal."""
    found: dict[str, Any] = json.loads((tiny_bundle / FILE_NAME).read_text("utf-8"))
    del found["sha256"]
    found["engines"] = [
        {
            **{"graph": "sampler", "backend": "tensorrt-rtx", "key": "k", "file": found["files"][0], "onnx_sha256": "1" * 64},
            **{"backend_version": "1.7", "compute_capabilities": ["8.9"], "operating_system": "any", "profile": "default"},
            **{"ranges": {"batch": [1, 1, 4]}, "options": {"tf32": False}},
        }
    ]
    return found


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundle, with traps in it and a secret beside it."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "secret").write_text("secret")
    copied = shutil.copytree(tiny_bundle, folder / "bundle")
    (copied / "link").symlink_to(folder / "secret")
    (copied / "zero").symlink_to("/dev/zero")
    os.mkfifo(copied / "pipe")
    return copied


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value in a document."""
    yield path
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*path, key))


@st.composite
def changes(draw: st.DrawFn) -> list[tuple[float, str, Any]]:
    """Up to three changes: where, as a share of all places; what is done; and a value."""
    return draw(
        st.lists(
            st.tuples(st.floats(0, 0.999), st.sampled_from(["set", "set", "delete", "rename", "copy"]), VALUES),
            min_size=1,
            max_size=3,
        )
    )


def changed(document: dict[str, Any], edits: list[tuple[float, str, Any]]) -> Any:
    found: Any = copy.deepcopy(document)
    for share, what, value in edits:
        every = list(places(found))
        path = every[int(share * len(every))]
        if not path:
            found = value if what == "set" else found
            continue
        parent = found
        for key in path[:-1]:
            parent = parent[key]
        if what == "set":
            parent[path[-1]] = value
        elif what == "copy" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        elif what == "rename" and isinstance(parent, dict):
            parent[str(value)] = parent.pop(path[-1])
        else:
            del parent[path[-1]]
        if not isinstance(found, dict | list):
            break
    return found


def write(bundle: Path, content: Any) -> None:
    """Write a manifest, sealed if that is possible."""
    if isinstance(content, dict):
        try:
            content = {**content, "sha256": seal(content)}
        except UnicodeEncodeError:
            content = {**content, "sha256": "0"}
    (bundle / FILE_NAME).write_text(json.dumps(content))


@given(changes())
def test_a_changed_manifest_is_read_within_the_bundle_or_refused(bundle: Path, document: dict[str, Any], edits: list[Any]) -> None:
    write(bundle, changed(document, edits))
    with at_most(64 * MIB):
        try:
            manifest = Manifest.load(bundle)
        except ArtifactError:
            return
    for entry in manifest.entries():
        path = bundle / entry.path
        assert Path(os.path.normpath(path)).is_relative_to(bundle)
        with contextlib.suppress(ArtifactError, DependencyError):
            check_files(bundle, [entry], fix="")
    damaged_files(bundle, list(manifest.files))


@inputs(0.25)
@given(changes())
def test_a_runtime_of_a_changed_manifest_plans_or_refuses(bundle: Path, document: dict[str, Any], edits: list[Any]) -> None:
    write(bundle, changed(document, edits))
    with (
        contextlib.suppress(ArtifactError, UsageError, DependencyError),
        SanaRuntime.from_pretrained(bundle, backend="onnxruntime") as runtime,
    ):
        runtime.tokenize(runtime.plan(Request("x", seed=1, num_inference_steps=2, height=64, width=64)))


@given(st.binary(max_size=300) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_bytes(bundle: Path, content: bytes) -> None:
    (bundle / FILE_NAME).write_bytes(content)
    with pytest.raises(SanaExportError) as caught:
        Manifest.load(bundle)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    "content", ['{"a":' * 3000, "[" * 10**6, '{"format": 2, "sha256": "", "x": ' + "[" * 900 + "]" * 900 + "}", " " * 40_000_000]
)
def test_deep_and_large_files(bundle: Path, content: str) -> None:
    (bundle / FILE_NAME).write_text(content)
    with pytest.raises(ArtifactError, match=r"damaged|another version"):
        Manifest.load(bundle)
