"""Files that are something else are called what they are, by every reader."""

from __future__ import annotations

import gzip
import io
import pickle
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from sana_export.adapters import Lora, read_lora
from sana_export.checkpoint.checkpoint import open_checkpoint
from sana_export.errors import ArtifactError
from sana_export.files import FileEntry, check_files
from sana_export.formats.recognize import recognize
from sana_export.formats.safetensors_file import TensorFile
from sana_export.manifest import Manifest
from tests.support.checkpoint_edits import linked_copy

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 3209543\n"


def written(write: Any) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def archive(name: str) -> bytes:
    def write(buffer: io.BytesIO) -> None:
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr(name, b"content")

    return written(write)


#: Files that a library wrote or a server sent, and words of what they are.
FILES: dict[str, tuple[bytes, str]] = {
    "pointer": (POINTER, "a git-lfs pointer to the file, which has 3209543 bytes"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(40), "a GGUF file"),
    "torch.save": (written(lambda buffer: torch.save({"a": torch.ones(2)}, buffer)), "a pickle of PyTorch"),
    "torch.save, old": (
        written(lambda buffer: torch.save({"a": torch.ones(2)}, buffer, _use_new_zipfile_serialization=False)),
        "a pickle, which can run code",
    ),
    "pickle": (pickle.dumps({"a": 1}), "a pickle, which can run code"),
    "page": (b"\n<!DOCTYPE html>\n<html><head><title>Log in - Hub</title>", "an HTML page with the title 'Log in - Hub'"),
    "S3": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML document"),
    "server": (b'{"error":"Access to model x is restricted"}', "an error message of a server"),
    "text": (b"Entry not found", "a text, 'Entry not found'"),
    "index": (b'{"metadata": {}, "weight_map": {"a": "b.safetensors"}}', "the index of a sharded model"),
    "zip": (archive("weights/a.txt"), "a zip archive"),
    "npz": (written(lambda buffer: np.savez(buffer, a=np.ones(3))), "a NumPy archive"),
    "npy": (written(lambda buffer: np.save(buffer, np.ones(3))), "a NumPy array"),
    "gzip": (gzip.compress(b"content"), "a gzip archive"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\x04", "a 7z archive"),
    "xz": (b"\xfd7zXZ\0\0", "an xz archive"),
    "PNG": (written(lambda buffer: Image.new("RGB", (2, 2)).save(buffer, "PNG")), "a PNG image"),
    "JPEG": (written(lambda buffer: Image.new("RGB", (2, 2)).save(buffer, "JPEG")), "a JPEG image"),
    "ONNX": (
        onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []), producer_name="pytorch").SerializeToString(),
        "an ONNX model",
    ),
    "zeros": (bytes(5000), "a file of zeros"),
    "empty": (b"", "an empty file"),
}


@pytest.mark.parametrize("kind", FILES)
def test_weights_that_are_something_else(tmp_path: Path, kind: str) -> None:
    content, words = FILES[kind]
    path = tmp_path / "style.safetensors"
    path.write_bytes(content)
    for read in (lambda path: TensorFile(path, fix="download it again"), lambda path: read_lora(Lora(path), {"proj_out": (2, 2)})):
        with pytest.raises(ArtifactError, match=r"style\.safetensors is not a safetensors file") as caught:
            read(path)
        assert words in str(caught.value.found)
        assert caught.value.fix is not None


@pytest.mark.parametrize("kind", ["pointer", "page", "PNG", "zeros", "empty"])
@pytest.mark.parametrize("name", ["transformer/config.json", "model_index.json", "tokenizer/tokenizer.json", "weights", "file"])
def test_parts_of_a_checkpoint_that_are_something_else(tiny_checkpoint: Any, tmp_path: Path, kind: str, name: str) -> None:
    content, words = FILES[kind]
    folder = linked_copy(tiny_checkpoint.folder, tmp_path / "checkpoint")
    (weights,) = (folder / "transformer").glob("*.safetensors")
    path = {"weights": weights, "file": tmp_path / "mine.safetensors"}.get(name, folder / name)
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        open_checkpoint(str(folder), transformer=path if name == "file" else None)
    assert words in str(caught.value)
    assert path.name in str(caught.value)


def test_the_command_for_a_pointer_names_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a b" / "transformer"
    folder.mkdir(parents=True)
    (folder / "x.safetensors").write_bytes(POINTER)
    kind = recognize(folder / "x.safetensors")
    assert kind is not None
    assert "git lfs pull in the repository that it comes from" in str(kind.fix)
    subprocess.run(["git", "init", "-q", tmp_path / "a b"], check=True)
    kind = recognize(folder / "x.safetensors")
    assert kind is not None
    assert kind.fix == f"git -C '{folder}' lfs pull"


def test_a_bundle_in_git_lfs(bundle: Path) -> None:
    entry = Manifest.load(bundle).graphs["vae_decoder"].data[0]
    (bundle / entry.path).write_bytes(POINTER)
    with pytest.raises(ArtifactError, match=f"is not the file of {entry.bytes} bytes that the manifest lists") as caught:
        check_files(bundle, [entry], fix="export again")
    assert "a git-lfs pointer" in str(caught.value.found)
    assert "lfs pull" in str(caught.value.fix)
    (bundle / "manifest.json").write_bytes(POINTER)
    with pytest.raises(ArtifactError, match=r"manifest\.json is not a manifest") as caught:
        Manifest.load(bundle)
    assert "lfs pull" in str(caught.value.fix)


def test_a_file_of_the_right_kind_that_is_too_short_is_damaged(bundle: Path) -> None:
    path = bundle / "instruction.safetensors"
    with pytest.raises(ArtifactError, match=r"instruction\.safetensors is damaged"):
        check_files(bundle, [FileEntry("instruction.safetensors", "0" * 64, path.stat().st_size + 1)], fix="export again")


def test_pipes_and_folders_are_not_opened(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for name, words in (("pipe", "a pipe"), ("folder", "a folder")):
        with pytest.raises(ArtifactError) as caught:
            TensorFile(tmp_path / f"{name}.safetensors")
        assert words in str(caught.value.found)


def test_a_tokenizer_of_sentencepiece_alone(tiny_checkpoint: Any, tmp_path: Path) -> None:
    folder = linked_copy(tiny_checkpoint.folder, tmp_path / "check point")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<pad>\x15\0\0\0\0\x18\x03")
    with pytest.raises(ArtifactError, match=r"the tokenizer of .* is missing") as caught:
        open_checkpoint(str(folder))
    assert "tokenizer/tokenizer.model" in str(caught.value.found)
    assert str(caught.value.fix).startswith("pip install sentencepiece protobuf && python -c")
    assert "add_bos_token=True" in str(caught.value.fix)  # without, transformers 5 converts to a tokenizer without BOS
    assert f"'{folder / 'tokenizer'}'" in str(caught.value.fix)
