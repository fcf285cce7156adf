"""Headers that a file may have, each compared with the safetensors library; and limits before memory is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sana_export.errors import ArtifactError
from sana_export.formats.safetensors_header import MOST_HEADER, MOST_TENSORS, read_header
from tests.support.memory_limit import MIB, at_most

GOOD = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
TEXT = json.dumps(GOOD)
#: The header, the values, and whether the library takes the file. In `STRICTER` are those that only it takes.
CASES: dict[str, tuple[Any, bytes, bool]] = {
    "right": ({"a": GOOD}, b"ab", True),
    "no tensors": ({}, b"", True),
    "no tensors but values": ({}, b"x", False),
    "spaces around": (f'  {{"a":{TEXT}}}  ', b"ab", True),
    "a zero after it": (f'{{"a":{TEXT}}}\0', b"ab", False),
    "a byte order mark": (f'\ufeff{{"a":{TEXT}}}', b"ab", False),
    "half a character": (f'{{"\\ud800":{TEXT}}}', b"ab", False),
    "a character in halves": (f'{{"\\ud83d\\ude00":{TEXT}}}', b"ab", True),
    "a control character": (f'{{"a\x01":{TEXT}}}', b"ab", False),
    "one dtype twice": ('{"a":{"dtype":"U8","dtype":"U8","shape":[2],"data_offsets":[0,2]}}', b"ab", False),
    "metadata twice": (f'{{"__metadata__":{{}},"__metadata__":{{}},"a":{TEXT}}}', b"ab", False),
    "metadata null": ({"__metadata__": None, "a": GOOD}, b"ab", True),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": GOOD}, b"ab", False),
    "metadata as a list": ({"__metadata__": [], "a": GOOD}, b"ab", False),
    "unknown fields": ({"a": {**GOOD, "x": [1, {}]}}, b"ab", True),
    "NaN": (f'{{"a":{TEXT[:-1]}, "x": NaN}}}}', b"ab", False),
    "1e999": (f'{{"a":{TEXT[:-1]}, "x": 1e999}}}}', b"ab", False),
    "a gap first": ({"a": {**GOOD, "data_offsets": [1, 3]}}, b"abc", False),
    "a gap between": ({"a": GOOD, "b": {**GOOD, "data_offsets": [3, 5]}}, b"abcde", False),
    "a gap at the end": ({"a": GOOD}, b"abc", False),
    "an overlap": ({"a": GOOD, "b": {**GOOD, "data_offsets": [1, 3]}}, b"abc", False),
    "one place twice": ({"a": GOOD, "b": GOOD}, b"ab", False),
    "in another order": ({"b": {**GOOD, "data_offsets": [2, 4]}, "a": GOOD}, b"abcd", True),
    "from the end to the beginning": ({"a": {**GOOD, "data_offsets": [2, 0]}}, b"ab", False),
    "no values": ({"a": {**GOOD, "shape": [0, 5], "data_offsets": [0, 0]}}, b"", True),
    "no values in the middle": ({"a": {**GOOD, "shape": [0], "data_offsets": [1, 1]}, "b": GOOD}, b"ab", False),
    "a number": ({"a": {**GOOD, "shape": [], "data_offsets": [0, 1]}}, b"x", True),
    "a size that is a float": ({"a": {**GOOD, "shape": [2.0]}}, b"ab", False),
    "a size that is true": ({"a": {**GOOD, "shape": [True, 2]}}, b"ab", False),
    "a negative size": ({"a": {**GOOD, "shape": [-1, -2]}}, b"ab", False),
    "minus zero": ('{"a":{"dtype":"U8","shape":[2],"data_offsets":[-0,2]}}', b"ab", False),
    "2**64": ({"a": {**GOOD, "shape": [2**64]}}, b"ab", False),
    "a product over 2**64": ({"a": {**GOOD, "shape": [2**63, 2]}}, b"", False),
    "three offsets": ({"a": {**GOOD, "data_offsets": [0, 2, 3]}}, b"ab", False),
    "half bytes": ({"a": {**GOOD, "dtype": "F4", "shape": [4]}}, b"ab", True),
    "half a byte": ({"a": {**GOOD, "dtype": "F4", "shape": [3]}}, b"ab", False),
    "an unknown dtype": ({"a": {**GOOD, "dtype": "C128"}}, b"ab", False),
    "no offsets": ({"a": {"dtype": "U8", "shape": [2]}}, b"ab", False),
    "a list": ([], b"", False),
    "a deep list": ("[" * 100_000, b"", False),
    "a name twice": (f'{{"a":{TEXT},"a":{TEXT}}}', b"ab", True),
    "a list for an entry": ({"a": ["U8", [2], [0, 2]]}, b"ab", True),
    "an object for a dtype": ({"a": {**GOOD, "dtype": {"U8": None}}}, b"ab", True),
    "33 dimensions": ({"a": {**GOOD, "shape": [1] * 32 + [2]}}, b"ab", True),
    "nothing in a huge array": ({"a": {**GOOD, "shape": [0, 2**63, 2**63], "data_offsets": [0, 0]}}, b"", True),
}
STRICTER = {"a name twice", "a list for an entry", "an object for a dtype", "33 dimensions", "nothing in a huge array"}


def content(header: Any, values: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + values


@pytest.mark.parametrize("case", CASES)
def test_the_same_files_are_taken(case: str, tmp_path: Path) -> None:
    header, values, taken = CASES[case]
    (tmp_path / "a.safetensors").write_bytes(content(header, values))
    if not taken or case in STRICTER:
        with pytest.raises(ArtifactError, match=r"a\.safetensors is (damaged|not)"):
            read_header(tmp_path / "a.safetensors")
    else:
        assert read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_the_library_takes_what_the_table_says(case: str) -> None:
    safetensors = pytest.importorskip("safetensors")
    header, values, taken = CASES[case]
    if taken:
        safetensors.deserialize(content(header, values))
    else:
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(content(header, values))


@pytest.mark.parametrize("piece", ['"%d":"",', "0,", "{", "["])
def test_too_many_values_are_refused_before_they_are_parsed(tmp_path: Path, piece: str) -> None:
    """Strings, commas, objects and lists: each is a kind of token that is counted."""
    count = 5 * MIB // len(piece)
    text = ("".join(piece.replace("%d", str(number)) for number in range(count)) if "%d" in piece else piece * count).rstrip(",")
    header = "{" + text + "}" if '":' in piece else '{"a":{"dtype":"U8","shape":[' + text + "]}}"
    path = tmp_path / "a.safetensors"
    path.write_bytes(content(header, b""))
    with at_most(3 * len(header)), pytest.raises(ArtifactError, match=f"more than {MOST_TENSORS} tensors"):
        read_header(path)


def test_a_header_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write((MOST_HEADER + 1).to_bytes(8, "little") + b"{")
        file.truncate(MOST_HEADER + 100)
    with at_most(MIB), pytest.raises(ArtifactError, match=f"a header of {MOST_HEADER + 1} bytes"):
        read_header(path)
