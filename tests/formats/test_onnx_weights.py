"""The external weights and the structure of an ONNX file, compared with what the onnx package reads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sana_export.errors import ArtifactError
from sana_export.formats.onnx_weights import (
    check_external_data,
    copies_of_shared,
    external_locations,
    external_tensors,
    read_tensors,
    structure_sha256,
)
from sana_export.manifest import Manifest
from tests.support.small_bundles import slow, vae_decoder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An ONNX file with two weights in one external file and one weight inside."""
    rng = np.random.default_rng(0)
    weights = {"a": rng.standard_normal((8, 16)), "b": rng.standard_normal((16, 4)), "small": rng.standard_normal((4,))}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("MatMul", ["h", "b"], ["z"]),
        helper.make_node("Add", ["z", "small"], ["y"], name="add"),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["n", size]) for name, size in (("x", 8), ("y", 4)))
    initializers = [numpy_helper.from_array(value.astype(np.float16), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], initializers)
    path = tmp_path / "model.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]),
        path,
        save_as_external_data=True,
        location="weights.data",
        size_threshold=100,
    )
    return path


def edit(path: Path, change: Callable[[Any], None]) -> str:
    """The hash of the structure after `change(graph)`."""
    model = onnx.load(path, load_external_data=False)
    change(model.graph)
    path.write_bytes(model.SerializeToString())
    return structure_sha256(path.read_bytes())


def set_external(tensor: Any, **values: object) -> None:
    for entry in tensor.external_data:
        entry.value = str(values.get(entry.key, entry.value))


def test_places_are_those_in_the_file(model: Path) -> None:
    tensors = onnx.load(model, load_external_data=False).graph.initializer
    wanted = [(tensor.name, *(entry.value for entry in tensor.external_data if entry.key != "checksum")) for tensor in tensors][:2]
    found = external_tensors(model.read_bytes())

    assert [(tensor.name, tensor.location, str(tensor.offset), str(tensor.bytes)) for tensor in found] == wanted
    assert [tensor.name for tensor in found] == ["a", "b"]


def test_bytes_are_those_that_onnx_loads(model: Path) -> None:
    tensors = read_tensors(model, [model.with_name("weights.data")])
    loaded = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(model).graph.initializer}

    assert set(tensors) == {"a", "b"}
    for name, values in tensors.items():
        np.testing.assert_array_equal(values.view(np.float16).reshape(loaded[name].shape), loaded[name])


def test_every_graph_of_a_bundle_is_read_as_onnx_reads_it(tiny_bundle: Path) -> None:
    read = 0
    for graph in Manifest.load(tiny_bundle).graphs.values():
        path = tiny_bundle / graph.onnx.path
        tensors = read_tensors(path, [tiny_bundle / file.path for file in graph.data])
        loaded = {t.name: t for t in onnx.load(path).graph.initializer}
        outside = {t.name for t in onnx.load(path, load_external_data=False).graph.initializer if t.external_data}
        assert set(tensors) == outside
        for name in outside:
            assert tensors[name].tobytes() == numpy_helper.to_array(loaded[name]).tobytes()
        read += len(outside)
    assert read > 50


@pytest.mark.parametrize("make", [vae_decoder, slow])
def test_external_weights_are_not_part_of_the_structure_and_internal_ones_are(make: Any, tmp_path: Path) -> None:
    hashes = []
    for seed in range(2):
        make(tmp_path / "model.onnx", seed)
        hashes.append(structure_sha256((tmp_path / "model.onnx").read_bytes()))
    assert (hashes[0] == hashes[1]) is (make is vae_decoder)  # `slow` keeps its weights inside


@pytest.mark.parametrize("values", [{"offset": 8192}, {"length": 1}, {"location": "elsewhere.data"}])
def test_the_place_of_weights_is_not_part_of_the_structure(values: dict[str, object], model: Path) -> None:
    before = structure_sha256(model.read_bytes())
    assert edit(model, lambda graph: set_external(graph.initializer[1], **values)) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda graph: setattr(graph.initializer[0], "name", "c"),
        lambda graph: setattr(graph.initializer[0], "data_type", TensorProto.BFLOAT16),
        lambda graph: graph.initializer[0].dims.__setitem__(0, 16),
        lambda graph: setattr(graph.initializer[2], "raw_data", bytes(8)),
        lambda graph: setattr(graph.node[2], "op_type", "Sub"),
        lambda graph: graph.node[2].input.__setitem__(1, "b"),
        lambda graph: setattr(graph.input[0].type.tensor_type.shape.dim[0], "dim_param", "m"),
        lambda graph: graph.initializer.pop(),
    ],
)
def test_everything_else_is_part_of_the_structure(change: Any, model: Path) -> None:
    before = structure_sha256(model.read_bytes())
    assert edit(model, lambda graph: None) == before
    assert edit(model, change) != before


@pytest.mark.parametrize(("values", "words"), [({"offset": 1 << 20}, "b at 1048576"), ({"location": "other.data"}, "other.data")])
def test_a_model_that_reads_elsewhere_is_refused(values: dict[str, object], words: str, model: Path) -> None:
    model.with_name("other.data").write_bytes(bytes(1 << 21))
    edit(model, lambda graph: set_external(graph.initializer[1], **values))
    with pytest.raises(ArtifactError, match=r"does not (match its weight files|belong to the bundle)") as caught:
        read_tensors(model, [model.with_name("weights.data")], fix="the command that fixes it")
    assert caught.value.fix == "the command that fixes it"
    assert words in str(caught.value)


def test_weights_that_share_their_bytes_are_copied(model: Path) -> None:
    assert copies_of_shared(model) == {}
    edit(model, lambda graph: set_external(graph.initializer[1], offset=0, length=128))

    copies = copies_of_shared(model)

    assert set(copies) == {"b"}
    assert copies["b"].tobytes() == model.with_name("weights.data").read_bytes()[:128]


@pytest.mark.parametrize("damage", [b"not an ONNX file", b"\x3a\x7f"])
def test_a_damaged_model_is_a_value_error(damage: bytes) -> None:
    for read in (external_tensors, structure_sha256):
        with pytest.raises(ValueError, match=r"field|number"):
            read(damage)


def varint(value: int, length: int) -> bytes:
    """`value` in `length` bytes, with more than it needs if `length` says so."""
    return bytes([(value >> 7 * index & 0x7F) | (0x80 if index + 1 < length else 0) for index in range(length)])


@pytest.mark.parametrize(
    "tag",
    [varint(0x3A | 1 << 32, 5), varint(0x3A | 1 << 40, 6), varint(0x02, 1), varint(0x3A | 1 << 34, 5)],
)
def test_a_field_that_protobuf_could_read_as_another_one_is_refused(tag: bytes, model: Path) -> None:
    """C++ drops the upper bits of a tag, and would find a graph where a reader with longer numbers finds an unknown field."""
    graph = onnx.load(model, load_external_data=False).graph.SerializeToString()
    hidden = tag + varint(len(graph), 3) + graph
    for read in (external_tensors, external_locations, structure_sha256):
        with pytest.raises(ValueError, match="a field of number"):
            read(hidden)
    with pytest.raises(ValueError, match=r"a field of \d+ bytes"):
        external_locations(b"\x3a" + varint(2**31, 5) + graph)


@pytest.mark.parametrize("key", ["offset", "length"])
@pytest.mark.parametrize("number", ["-1", "1.0", " 8", "1_0", "٣", "9" * 19, "9" * 5000, ""])
def test_a_place_that_is_not_a_number_is_refused(key: str, number: str, model: Path) -> None:
    changed = onnx.load(model, load_external_data=False)
    set_external(changed.graph.initializer[1], **{key: number})
    model.write_bytes(changed.SerializeToString())
    for read in (check_external_data, read_tensors):
        with pytest.raises(ArtifactError, match=rf"b has the {key} '|is not an ONNX model|is damaged"):
            read(model, [model.with_name("weights.data")])


def test_two_values_of_one_entry_are_refused(model: Path) -> None:
    changed = onnx.load(model, load_external_data=False)
    changed.graph.initializer[0].external_data.add(key="location", value="other.data")
    with pytest.raises(ValueError, match="two values of 'location'"):
        external_locations(changed.SerializeToString())
