"""tokenizer.json with any change: a tokenizer, or an error that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sana_export.errors import ArtifactError
from sana_export.formats.tokenizer_file import read_tokenizer
from tests.fuzz.support import inputs

SMALL: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {"id": 0, "content": "<bos>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ],
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [0], "tokens": ["<bos>"]}},
    },
    "decoder": {"type": "Fuse"},
    "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unk>",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": {"<bos>": 0, "<unk>": 1, "a": 2, "b": 3, "ab": 4},
        "merges": [["a", "b"]],
    },
}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["BPE", "Unigram", "WordLevel"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def documents(draw: Any) -> str:
    """`SMALL` as text, with one to three values replaced or removed at any depth."""
    document = json.loads(json.dumps(SMALL))
    for _ in range(draw(st.integers(0, 3))):
        place: Any = document
        while True:
            key = draw(st.sampled_from(sorted(place))) if isinstance(place, dict) else draw(st.integers(0, len(place) - 1))
            if not (isinstance(place[key], dict | list) and place[key]) or draw(st.integers(0, 3)) == 0:
                break
            place = place[key]
        if draw(st.booleans()):
            place[key] = draw(VALUES)
        else:
            del place[key]
        if not document:
            break
    return json.dumps(document)


def test_the_tokenizer_of_these_tests_is_right(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(SMALL), "utf-8")
    assert read_tokenizer(path).encode("ab").ids == [0, 4]
    path.write_text("[1]", "utf-8")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is damaged"):
        read_tokenizer(path)


@inputs(6)
@given(documents(), st.text(max_size=5))
def test_changed_tokenizers(tmp_path: Path, document: str, text: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(document, "utf-8")
    try:
        tokenizer = read_tokenizer(path)
    except ArtifactError as error:
        assert str(path) in str(error)
        return
    assert tokenizer.get_vocab_size() >= 0
