"""The synthetic tokenizer: reproducible, lossless, and the same in `tokenizers`, transformers and a SanaPipeline."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from sana_export.synth.tokenizer import build_gemma_tokenizer, build_tokenizer, instruction

TEXTS = (
    "",
    "a cat",
    "a cute 🐼 eating 🎋, ink drawing style",
    "一只可爱的熊猫在竹林里吃竹子",
    "熊猫 and 👩🏽‍🚀 on the moon,  two blanks\nand a line",
    "ѭ ꙮ ☃\ufe0f \U0001f9ec <start_of_turn> <0x41> ｆｕｌｌ　ｗｉｄｔｈ",
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    build_gemma_tokenizer().save_pretrained(path)
    return path


def random_text(rng: random.Random) -> str:
    """Code points of all planes, without surrogates and without "▁", which means a space."""
    ranges = ((0x20, 0x7F), (0xA0, 0x250), (0x3040, 0x3100), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0x20, 0x10FFFF))
    points = (rng.randint(*rng.choice(ranges)) for _ in range(rng.randint(1, 60)))
    return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000 and p != 0x2581).lower()


def test_another_process_builds_the_same_bytes(tokenizer: Tokenizer, folder: Path) -> None:
    code = (
        "import sys, hashlib; from sana_export.synth.tokenizer import build_gemma_tokenizer;"
        "build_gemma_tokenizer().save_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(folder / "again")], check=True, capture_output=True)

    def digests(path: Path) -> dict[str, str]:
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir() if file.is_file()}

    assert digests(folder / "again") == digests(folder)
    assert "tokenizer.json" in digests(folder)
    assert build_tokenizer().to_str() == tokenizer.to_str()


def test_special_and_byte_tokens_have_gemmas_ids(tokenizer: Tokenizer) -> None:
    assert [tokenizer.id_to_token(i) for i in range(5)] == ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    assert [tokenizer.id_to_token(5 + byte) for byte in (0, 0x41, 255)] == ["<0x00>", "<0x41>", "<0xFF>"]
    assert 2000 <= tokenizer.get_vocab_size() <= 4096
    assert tokenizer.encode("").ids == [2]
    assert tokenizer.encode("a cat<eos>").ids[-1] == 1


def test_random_text_is_restored(tokenizer: Tokenizer) -> None:
    rng = random.Random(7)
    texts = [*TEXTS, *(random_text(rng) for _ in range(500))]
    assert [tokenizer.decode(tokenizer.encode(text).ids) for text in texts] == texts
    unknown = tokenizer.token_to_id("<unk>")
    assert not any(unknown in tokenizer.encode(text).ids for text in texts)


def test_characters_without_a_token_become_utf8_bytes(tokenizer: Tokenizer) -> None:
    expected = [f"<0x{byte:02X}>" for byte in "ꙮ".encode()]
    assert tokenizer.encode("ꙮ").tokens == ["<bos>", *expected]
    # Text that looks like a byte token stays text.
    assert "<0x41>" not in tokenizer.encode("<0x41>").tokens


def test_three_scripts_have_tokens_of_their_own(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a cute 🐼 eating 🎋").tokens == ["<bos>", "a", "▁cute", "▁", "🐼", "▁eating", "▁", "🎋"]
    assert tokenizer.encode("熊猫在竹林里").tokens == ["<bos>", "熊猫", "在", "竹林", "里"]
    text = "\n".join(instruction())
    assert len(text) / len(tokenizer.encode(text).ids) > 4


@pytest.mark.parametrize(
    ("prompt", "boundary"), [("a cat", ["▁a", "▁cat"]), ("熊猫", ["▁", "熊猫"]), ("🐼", ["▁", "🐼"]), ("", ["▁"])]
)
def test_the_instructions_last_space_merges_with_a_latin_word(tokenizer: Tokenizer, prompt: str, boundary: list[str]) -> None:
    text = "\n".join(instruction())
    alone, joined = tokenizer.encode(text).tokens, tokenizer.encode(text + prompt).tokens
    assert alone[-3:] == ["▁Prompt", ":", "▁"]
    assert joined == alone[:-1] + boundary


@pytest.mark.parametrize("class_name", ["GemmaTokenizer", "GemmaTokenizerFast"])
def test_transformers_gives_the_ids_of_the_raw_file(tokenizer: Tokenizer, folder: Path, tmp_path: Path, class_name: str) -> None:
    """Published checkpoints name `GemmaTokenizerFast`."""
    from transformers import AutoTokenizer, GemmaTokenizer

    copy = tmp_path / "tokenizer"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": class_name}))
    raw = Tokenizer.from_file(str(copy / "tokenizer.json"))
    loaded: Any = AutoTokenizer.from_pretrained(copy)
    assert isinstance(loaded, GemmaTokenizer)
    rng = random.Random(8)
    texts = [*TEXTS, *("\n".join(instruction()) + text for text in TEXTS), *(random_text(rng) for _ in range(50))]
    for text in texts:
        ids = tokenizer.encode(text).ids
        assert raw.encode(text).ids == ids
        assert loaded.encode(text) == ids
        assert loaded.decode(ids, skip_special_tokens=True) == text
    padded = loaded(list(TEXTS), padding="max_length", max_length=12, truncation=True, padding_side="right")
    for text, ids, mask in zip(TEXTS, padded["input_ids"], padded["attention_mask"], strict=True):
        kept = tokenizer.encode(text).ids[:12]
        assert ids == kept + [0] * (12 - len(kept))
        assert mask == [1] * len(kept) + [0] * (12 - len(kept))
