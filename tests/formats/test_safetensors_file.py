from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sana_export.errors import ArtifactError
from sana_export.formats.safetensors_file import TensorFile

FIX = "sana-export export tiny-random -o bundle"


def write(path: Path, header: object, values: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + values)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_floating_point_tensors_are_read_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    table = (torch.randn(50, 7) * 10 ** torch.randn(50, 1)).to(dtype)
    table[3, :4] = torch.tensor([torch.inf, -torch.inf, -0.0, torch.finfo(dtype).tiny / 2])
    save_file({"embed": table, "first": torch.randn(3)}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "a.safetensors")
    assert set(file) == {"embed", "first"}
    assert file["embed"].shape == (50, 7)
    everything = file["embed"].read()
    assert everything.dtype == np.float32
    np.testing.assert_array_equal(everything.view(np.uint32), table.float().numpy().view(np.uint32))
    rows = file["embed"].rows([3, 49, 3, 0])
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows.view(np.uint32), table.float()[[3, 49, 3, 0]].numpy().view(np.uint32))


def test_integers_stay_integers(tmp_path: Path) -> None:
    ids = torch.randint(-(2**40), 2**40, (9,))
    save_file({"ids": ids, "none": torch.zeros(0, 4)}, tmp_path / "a.safetensors")
    file = TensorFile(tmp_path / "a.safetensors")
    assert file["ids"].read().dtype == np.int64
    np.testing.assert_array_equal(file["ids"].read(), ids.numpy())
    assert file["none"].read().shape == (0, 4)


def test_values_are_mapped_not_loaded(tmp_path: Path) -> None:
    save_file({"embed": torch.randn(4, 4).bfloat16()}, tmp_path / "a.safetensors")
    stored = TensorFile(tmp_path / "a.safetensors")["embed"].stored
    assert type(stored) is np.memmap
    assert not stored.flags.writeable


def test_a_truncated_file_is_damaged(tmp_path: Path) -> None:
    save_file({"a": torch.randn(5, 3), "b": torch.randn(2)}, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    for size in [*range(0, len(whole) - 1, 7), len(whole) - 1]:
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(whole[:size])
        with pytest.raises(ArtifactError, match=r"cut\.safetensors is (damaged|not a safetensors file)") as caught:
            TensorFile(cut, fix=FIX)
        assert caught.value.exit_code == 4
        assert FIX in str(caught.value)


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        b"no JSON",
        b"[1, 2]",
        b"\xff\xfe",
        b"[" * 100_000,
        {"a": 3},
        {"a": {**GOOD, "dtype": "F8_E4M3"}},
        {"a": {**GOOD, "shape": [3]}},
        {"a": {**GOOD, "shape": [-1, -2]}},
        {"a": {**GOOD, "shape": "2"}},
        {"a": {**GOOD, "shape": [2.0]}},
        {"a": {**GOOD, "data_offsets": [4, 12]}},
        {"a": {**GOOD, "data_offsets": [-8, 0]}},
        {"a": {**GOOD, "data_offsets": [8, 0]}},
        {"a": {**GOOD, "data_offsets": [0]}},
        {"a": {"dtype": "F32", "shape": [2]}},
    ],
)
def test_a_damaged_header_is_an_artifact_error(tmp_path: Path, header: object) -> None:
    with pytest.raises(ArtifactError, match="is damaged"):
        TensorFile(write(tmp_path / "a.safetensors", header, b"\0" * 8))


def test_the_header_of_these_tests_is_right_without_the_damage(tmp_path: Path) -> None:
    values = np.array([1.5, -2.0], dtype="<f4")
    file = TensorFile(write(tmp_path / "a.safetensors", {"a": GOOD}, values.tobytes()))
    np.testing.assert_array_equal(file["a"].read(), values)


@pytest.mark.parametrize("length", [0, 2**20, 2**63, 2**64 - 8])
def test_a_wrong_header_length_is_an_artifact_error(tmp_path: Path, length: int) -> None:
    with pytest.raises(ArtifactError, match="is damaged"):
        TensorFile(write(tmp_path / "a.safetensors", {"a": GOOD}, b"\0" * 8, length=length))


def test_a_missing_file_and_a_missing_tensor_are_reported(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is missing"):
        TensorFile(tmp_path / "none.safetensors")
    with pytest.raises(ArtifactError, match="no tensor 'b', but a"):
        TensorFile(write(tmp_path / "a.safetensors", {"a": GOOD}, b"\0" * 8))["b"]
