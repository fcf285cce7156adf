"""safetensors files of any content: this reader and the safetensors library accept the same files, with the same tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st

from sana_export.checkpoint.weights import read_headers
from sana_export.errors import ArtifactError
from sana_export.formats.dtypes import BY_SAFETENSORS
from sana_export.formats.safetensors_file import TensorFile
from sana_export.formats.safetensors_header import BITS, MOST_DIMENSIONS, read_header
from tests.fuzz.support import MIB, at_most, inputs

#: What the library takes and this reader refuses, by a part of our error (safetensors_header.py says why).
STRICTER = ("occurs twice", "has no dtype, shape and data_offsets", "unknown dtype", f"more than {MOST_DIMENSIONS}", "is too large")

NAMES = st.text(max_size=6) | st.sampled_from(["a", "b", "__metadata__", "\x00", "é", "a.b", "\ud800", "\ud83d\ude00"])
NUMBERS = st.integers(-2, 40) | st.sampled_from([2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**70])
SCALARS = st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=4)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6
)
DTYPES = st.sampled_from([*BITS, "F32", "F16", "U8", "C128", "f32", ""])


@st.composite
def whole_files(draw: Any) -> tuple[list[tuple[str, Any]], bytes]:
    """The entries of a right header, with names that may occur twice, and the values."""
    entries, end = [], 0
    for name in draw(st.lists(NAMES.filter(lambda text: text != "__metadata__"), max_size=4)):
        dtype = draw(st.sampled_from([*BITS]))
        shape = draw(st.lists(st.integers(0, 4), max_size=4))
        bits = BITS[dtype]
        for size in shape:
            bits *= size
        bits = bits // 8 * 8 if draw(st.booleans()) else bits
        entries.append((name, {"dtype": dtype, "shape": shape, "data_offsets": [end, end + bits // 8]}))
        end += bits // 8
    if draw(st.booleans()):
        entries.insert(0, ("__metadata__", draw(st.dictionaries(NAMES, st.text(max_size=4), max_size=3))))
    return draw(st.permutations(entries)), draw(st.binary(min_size=end, max_size=end))


@st.composite
def changed(draw: Any, entry: Any) -> Any:
    """`entry` of a header with one thing changed."""
    key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "shifted", "more", "all"]))
    if key == "all" or not isinstance(entry, dict):
        return draw(ANYTHING)
    offsets = entry.get("data_offsets")
    if key == "shifted" and isinstance(offsets, list) and all(isinstance(offset, int) for offset in offsets):
        step = draw(st.sampled_from([-4, -1, 1, 4]))
        return {**entry, "data_offsets": [offset + step for offset in offsets]}
    values = {
        "shifted": ANYTHING,
        "dtype": DTYPES | ANYTHING,
        "shape": st.lists(NUMBERS, max_size=4) | st.just([1] * 40) | ANYTHING,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | ANYTHING,
        "more": ANYTHING,
    }
    return {**entry, key: draw(values[key])}


@st.composite
def files(draw: Any) -> bytes:
    """The bytes of a file that is right, or wrong in one to three places."""
    entries, values = draw(whole_files())
    for _ in range(draw(st.integers(0, 2))):
        if entries:
            index = draw(st.integers(0, len(entries) - 1))
            entries[index] = entries[index][0], draw(changed(entries[index][1]))
    escape = draw(st.booleans())
    parts = (f"{json.dumps(name, ensure_ascii=escape)}:{json.dumps(entry, ensure_ascii=escape)}" for name, entry in entries)
    header = ("{" + ",".join(parts) + "}").encode("utf-8", "surrogatepass")
    header += draw(st.sampled_from([b"", b"", b"   ", b"\n", b"\0", b"}", b"\xff"]))
    length = draw(st.sampled_from([len(header)] * 8 + [0, 1, len(header) + 1, 100_000_001, 2**63, 2**64 - 1]))
    content = length.to_bytes(8, "little") + header + values
    cut = draw(st.sampled_from([0, 0, 0, 0, 0, 1, 9]))
    content = content[: len(content) - cut] + draw(st.sampled_from([b"", b"", b"", b"x", b"xxxx"]))
    if draw(st.integers(0, 5)) == 5 and content:
        place = draw(st.integers(0, len(content) - 1))
        content = content[:place] + bytes([draw(st.integers(0, 255))]) + content[place + 1 :]
    return content


def compare(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        wanted = {name: (one["dtype"], one["shape"], bytes(one["data"])) for name, one in safetensors.deserialize(content)}
    except safetensors.SafetensorError:
        wanted = None
    try:
        with at_most(MIB):
            entries = read_header(path).entries
    except ArtifactError as error:
        assert wanted is None or any(words in str(error) for words in STRICTER), str(error)
        return
    assert wanted is not None, "the library refuses this file"
    found = {name: (one.dtype, list(one.shape), content[one.begin : one.end]) for name, one in entries.items()}
    assert found == wanted
    file, stored = TensorFile(path), read_headers([path])
    for name, (dtype, shape, values) in wanted.items():
        if dtype in BY_SAFETENSORS:
            assert file[name].stored.tobytes() == values
            assert list(file[name].shape) == shape
            tensor = stored[name].read()
            assert (tensor.view(torch.int16) if dtype == "BF16" else tensor).numpy().tobytes() == values


@inputs(12)
@given(files())
def test_generated_files(tmp_path: Path, content: bytes) -> None:
    compare(tmp_path / "a.safetensors", content)


@inputs(3)
@given(st.binary(max_size=64), st.booleans())
def test_any_bytes(tmp_path: Path, content: bytes, framed: bool) -> None:
    compare(tmp_path / "a.safetensors", len(content).to_bytes(8, "little") + content if framed else content)
