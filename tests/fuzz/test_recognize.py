"""Files of any content, wherever a file of a certain kind is wanted: an error that says what it is, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sana_export.adapters import Lora, read_lora
from sana_export.checkpoint.hub import read_json
from sana_export.checkpoint.single_file import open_single_file
from sana_export.errors import ArtifactError
from sana_export.formats.onnx_weights import check_external_data
from sana_export.formats.recognize import recognize
from sana_export.formats.tokenizer_file import read_tokenizer
from sana_export.manifest import Manifest
from tests.fuzz.support import MIB, at_most, inputs

STARTS = (
    *(b"version https://git-lfs.github.com/spec/v1\noid sha256:", b"GGUF", b"PK\x03\x04", b"\x80\x02}q", b"<!doctype html><title>"),
    *(b"\x1f\x8b", b"7z\xbc\xaf\x27\x1c", b"\x93NUMPY", b"\x08\x0a\x12\x07pytorch", b'{"error":', b'{"weight_map":', b"\x00" * 32),
    *(b"\x0a\x0e\x0a\x05<unk>", b"Entry not found", b"\xef\xbb\xbf<html>", b'\x10\0\0\0\0\0\0\0{"a":', b"{", b"[[[["),
)
CONTENTS = st.binary(max_size=300) | st.builds(lambda start, end: start + end, st.sampled_from(STARTS), st.binary(max_size=200))


def manifest(path: Path) -> None:
    Manifest.load(path.parent)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "weights": ("x.safetensors", open_single_file),
    "LoRA": ("x.safetensors", lambda path: read_lora(Lora(path), {"transformer_blocks.0.attn1.to_q": (8, 8)})),
    "config": ("config.json", read_json),
    "tokenizer": ("tokenizer.json", read_tokenizer),
    "ONNX": ("model.onnx", lambda path: check_external_data(path, [])),
    "manifest": ("manifest.json", manifest),
}


@pytest.mark.parametrize("kind", READERS)
@given(CONTENTS)
@example(b"")
@example(b"\0" * 100)
def test_a_reader_refuses_what_it_cannot_read(tmp_path: Path, kind: str, content: bytes) -> None:
    name, read = READERS[kind]
    (tmp_path / name).write_bytes(content)
    try:
        with at_most(4 * MIB):
            read(tmp_path / name)
    except ArtifactError as error:
        assert name in str(error)
        assert error.found is not None
        assert len(str(error)) < 3000


@inputs(5)
@given(CONTENTS, st.sampled_from(["x.safetensors", "x.json", "x"]))
def test_recognition_never_fails(tmp_path: Path, content: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with at_most(MIB):
        kind = recognize(path)
    assert kind is None or (kind.name and kind.name.isprintable())
