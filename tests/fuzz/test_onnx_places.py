"""ONNX files that say anything about where their weights are: nothing outside the recorded files is ever read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from sana_export.errors import ArtifactError
from sana_export.formats.onnx_weights import (
    check_external_data,
    copies_of_shared,
    external_locations,
    read_tensors,
    structure_sha256,
)
from tests.fuzz.support import MIB, at_most, inputs

OWN, SECRET = b"o" * 64, b"s" * 64
NUMBERS = st.integers(-2, 70).map(str) | st.sampled_from(
    ["9" * 18, "9" * 19, "9" * 5000, str(2**63), str(2**64 - 8), "1e3", "0x8", " 8", "8 ", "+8", "1_0", "٣", "", "8\0", "-0"]
)
LOCATIONS = st.sampled_from(
    [
        *(
            "weights.data",
            "./weights.data",
            "../onnx/weights.data",
            "weights.data/",
            "link.data",
            "loop.data",
            "folder",
            "",
            ".",
            "..",
        ),
        *("../secret.data", "other.data", "weights.data\0", "a" * 5000, "*/_ORT_MEM_ADDR_/*", "\ud7ff", "/etc/passwd", "//", "~"),
    ]
) | st.text(max_size=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one recorded file, links, and files that are not recorded inside and outside of it."""
    folder = tmp_path / "onnx"
    (folder / "folder").mkdir(parents=True)
    (folder / "weights.data").write_bytes(OWN)
    for secret in (tmp_path / "secret.data", folder / "other.data"):
        secret.write_bytes(SECRET)
    (folder / "link.data").symlink_to(tmp_path / "secret.data")
    (folder / "loop.data").symlink_to(folder / "loop.data")
    return folder


@st.composite
def tensors(draw: Any, name: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, data_type=1, dims=[2], data_location=onnx.TensorProto.EXTERNAL)
    values = {"location": LOCATIONS, "offset": NUMBERS, "length": NUMBERS, "checksum": st.text(max_size=3)}
    usual = {"location": "weights.data", "offset": "0", "length": "8"}
    for key in [*draw(st.lists(st.sampled_from([*usual, "checksum"]), max_size=1)), *usual]:
        value = usual[key] if key in usual and draw(st.integers(0, 2)) else draw(values[key])
        tensor.external_data.add(key=key, value=value)
    return tensor


@st.composite
def models(draw: Any) -> onnx.ModelProto:
    graph = onnx.helper.make_graph([], "g", [], [], [draw(tensors(f"w{number}")) for number in range(draw(st.integers(0, 3)))])
    if draw(st.booleans()):
        inner = onnx.helper.make_graph([], "inner", [], [], [draw(tensors("inner"))])
        graph.node.append(onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner))
    if draw(st.booleans()):
        graph.node.append(onnx.helper.make_node("Constant", [], ["v"], value=draw(tensors("constant"))))
    return onnx.helper.make_model(graph)


@inputs(6)
@given(models())
def test_only_recorded_files_are_read(folder: Path, model: onnx.ModelProto) -> None:
    path, recorded = folder / "model.onnx", [folder / "weights.data"]
    path.write_bytes(model.SerializeToString())
    try:
        with at_most(4 * MIB):
            check_external_data(path, recorded)
    except ArtifactError as error:
        assert str(path) in str(error)
        return
    for name, values in read_tensors(path, recorded).items():
        (tensor,) = (one for one in model.graph.initializer if one.name == name)
        given = {entry.key: entry.value for entry in tensor.external_data}
        begin = int(given["offset"])
        assert values.tobytes() == OWN[begin : begin + int(given["length"])]
        assert len(values) == int(given["length"])
    for name, copy in copies_of_shared(path).items():
        assert set(copy.tobytes()) <= set(OWN), name


@inputs(6)
@given(models(), st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), max_size=3), st.integers(0, 500))
def test_every_location_that_protobuf_finds_is_found(
    folder: Path, model: onnx.ModelProto, changes: list[tuple[int, int]], cut: int
) -> None:
    content = bytearray(model.SerializeToString())
    for place, value in changes:
        if place < len(content):
            content[place] = value
    content = content[: max(cut, 1)] if cut < 50 else content
    try:
        theirs = locations(onnx.ModelProto.FromString(bytes(content)))
    except DecodeError:
        theirs = set()
    (folder / "model.onnx").write_bytes(content)
    try:
        with at_most(4 * MIB):
            ours = external_locations(bytes(content))
            structure_sha256(bytes(content))
    except ValueError:
        with pytest.raises(ArtifactError):
            check_external_data(folder / "model.onnx", [folder / "weights.data"])
        return
    assert theirs <= ours


def locations(message: Any) -> set[str]:
    """The locations of all external tensors anywhere in a message, read by protobuf."""
    found = set()
    if isinstance(message, onnx.TensorProto):
        found |= {entry.value for entry in message.external_data if entry.key == "location"}
    for field, value in message.ListFields():
        if field.message_type is not None:
            for item in value if field.is_repeated else [value]:
                found |= locations(item)
    return found


@inputs(2)
@given(st.binary(max_size=80))
def test_any_bytes(folder: Path, content: bytes) -> None:
    (folder / "model.onnx").write_bytes(content)
    for read in (check_external_data, read_tensors):
        try:
            with at_most(MIB):
                read(folder / "model.onnx", [folder / "weights.data"])
        except ArtifactError as error:
            assert "model.onnx" in str(error)
