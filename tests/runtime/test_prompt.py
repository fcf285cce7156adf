"""Tokens and prompt embeddings, with a small text encoder for every boundary case and against diffusers."""

from __future__ import annotations

import logging
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer, models, processors

from sana_export.errors import ArtifactError, UsageError
from sana_export.formats.safetensors_file import StoredTensor
from sana_export.manifest import Manifest
from sana_export.runtime import SanaRuntime
from sana_export.runtime.embedding_table import EmbeddingTable
from sana_export.runtime.prompt import MAX_TOKENS, Instruction, PromptEncoder
from sana_export.runtime.request import Request

Float32 = npt.NDArray[np.float32]

BOS = "<bos>"
CHANNELS = 8
INSTRUCTION = "ab cd"
#: The end of the instruction may merge with the start of a prompt. With each of these merges a prompt shares another number of the
#: instruction's tokens <bos> a b _ c d.
MERGES: dict[str, list[tuple[str, str]]] = {
    "none": [],
    "last": [("d", "x")],
    "two": [("d", "x"), ("c", "dx")],
    "all": [("d", "x"), ("c", "dx"), (" ", "cdx"), ("b", " cdx"), ("a", "b cdx")],
}


def make_tokenizer(merges: list[tuple[str, str]], *, bos: bool = True) -> Tokenizer:
    tokens = [BOS, *map(chr, range(32, 127)), *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges, unk_token=BOS))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer


class ToyEncoder:
    """A causal text encoder. A token's keys are its embedding; its output is a nonlinear function of all tokens up to it."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    @staticmethod
    def outputs(embeds: Float32, first: int) -> Float32:
        """The output for the embeddings [S, C] of a whole text, from row `first` on."""
        position = np.arange(1, len(embeds) + 1, dtype=np.float32)[:, None]
        return np.tanh(np.cumsum(embeds * np.cos(position), axis=0))[first:].astype(np.float32)

    def run(self, inputs_embeds: Float32, prefix: Float32) -> Float32:
        shared = prefix.shape[3]
        self.batches.append((*inputs_embeds.shape[:2], shared))
        past = prefix[0, 0, 0]
        return np.stack([self.outputs(np.concatenate([past, own]), shared) for own in inputs_embeds])


def make_encoder(merges: str = "none", instruction: str = INSTRUCTION, **changes: Any) -> PromptEncoder:
    tokenizer = make_tokenizer(MERGES[merges])
    table = np.random.default_rng(3).normal(size=(tokenizer.get_vocab_size(), CHANNELS)).astype(np.float32)
    ids = tuple(tokenizer.encode(instruction).ids)
    prefix = np.broadcast_to(table[list(ids[:-1])], (1, 2, 1, len(ids) - 1, CHANNELS)).copy()
    parts = {"token_ids": ids, "prefix": prefix, "bos_row": ToyEncoder.outputs(table[:1], 0)[0], **changes}
    return PromptEncoder(
        parts.pop("tokenizer", tokenizer),
        Instruction(instruction, parts["token_ids"], parts["prefix"], parts["bos_row"]),
        EmbeddingTable(StoredTensor("F32", parts.get("table", table))),
        fix="sana-export export tiny -o bundle",
    )


def reference(encoder: PromptEncoder, text: str, instruct: bool, length: int) -> tuple[Float32, Float32]:
    """As diffusers: pad to the full length, encode, keep row 0 and the last `length` - 1. Rows [L, C] and mask [L]."""
    text = text.lower().strip()
    full = length
    if instruct:
        text = encoder.instruction.text + text
        full = len(encoder.tokenizer.encode(encoder.instruction.text).ids) + length - 2
    ids = encoder.tokenizer.encode(text).ids[:full]
    mask = np.array([1.0] * len(ids) + [0.0] * (full - len(ids)), dtype=np.float32)
    rows = ToyEncoder.outputs(encoder.embeddings.values.read()[ids + [0] * (full - len(ids))], 0)
    select = [0, *range(-length + 1, 0)]
    return rows[select], mask[select]


def assert_equals_reference(encoder: PromptEncoder, branches: list[list[tuple[str, bool]]], length: int) -> ToyEncoder:
    toy = ToyEncoder()
    tokens = [
        [encoder.tokenize(text, max_sequence_length=length, instruction=INSTRUCTION * instruct) for text, instruct in branch]
        for branch in branches
    ]
    result = encoder.encode(tokens, toy.run)
    embeds = result.gather()
    longest = 0
    for index, branch in enumerate(branches):
        for number, (text, instruct) in enumerate(branch):
            rows, mask = reference(encoder, text, instruct, length)
            kept = int(mask.sum())
            longest = max(longest, kept)
            assert mask[:kept].all(), "the reference keeps rows without gaps"
            np.testing.assert_array_equal(result.context_mask[index, number].sum(), kept, err_msg=repr(text))
            np.testing.assert_allclose(embeds[index, number, :kept], rows[:kept], atol=1e-6)
            assert result.context_mask[index, number, :kept].all()
            assert not embeds[index, number, kept:].any()
    assert embeds.shape == result.shape == (len(branches), len(branches[0]), longest, CHANNELS)
    assert embeds.dtype == result.context_mask.dtype == np.float32
    return toy


@pytest.mark.parametrize("merges", MERGES)
@pytest.mark.parametrize("length", [1, 2, 3, 12, 40])
def test_every_boundary_gives_the_rows_of_the_reference(merges: str, length: int) -> None:
    generator = random.Random(length)
    encoder = make_encoder(merges)
    texts = ["", "x", "xy", "X marks", "abc", "  Padded x ", *("".join(generator.choices("abcdx ", k=k)) for k in range(1, 30, 3))]
    assert_equals_reference(encoder, [[(text, True) for text in texts], [(text, False) for text in texts]], length)


@pytest.mark.parametrize(("merges", "shared"), [("none", 5), ("last", 5), ("two", 4), ("all", 1)])
def test_the_prefix_ends_where_the_prompt_differs(merges: str, shared: int) -> None:
    encoder = make_encoder(merges)
    assert len(encoder.instruction.token_ids) == 6
    tokens = encoder.tokenize("xyz", max_sequence_length=10, instruction=INSTRUCTION)
    assert tokens.shared == shared
    assert encoder.tokenize("yz", max_sequence_length=10, instruction=INSTRUCTION).shared == 5


def test_one_run_for_each_prompt_and_none_for_repeated_or_empty_prompts() -> None:
    encoder = make_encoder("two")
    positive = [(text, True) for text in ("y", "yy", "xyzyz", "y")]
    toy = assert_equals_reference(encoder, [[("", False)] * 4, positive, positive], 20)
    # "y" and "yy" share five tokens, "xyzyz" four. The empty negative prompt is BOS alone.
    assert sorted(toy.batches) == [(1, 2, 5), (1, 3, 5), (1, 5, 4)]


def test_without_the_instruction_only_bos_is_shared() -> None:
    encoder = make_encoder()
    toy = assert_equals_reference(encoder, [[("ab cd", False), ("", False)], [("ab", False), ("z", False)]], 20)
    assert toy.batches == [(1, 5, 1), (1, 2, 1), (1, 1, 1)]


@pytest.mark.parametrize("multiple", [1, 3, 8, 32])
def test_padded_batches_give_the_same_rows(multiple: int) -> None:
    """The padding is on the right, so it changes no row. It ends where the longest prompt of the request could end."""
    encoder, limit = make_encoder("two"), 20
    texts = [(text, True) for text in ("y", "yy", "xyzyz", "y" * 40)] + [("plain", False), ("", False)]
    tokens = [[encoder.tokenize(text, max_sequence_length=limit, instruction=INSTRUCTION * instruct) for text, instruct in texts]]
    plain, padded = ToyEncoder(), ToyEncoder()
    wanted = encoder.encode(tokens, plain.run)
    found = encoder.encode(tokens, padded.run, multiple)
    np.testing.assert_array_equal(found.context_mask, wanted.context_mask)
    np.testing.assert_array_equal(found.gather(), wanted.gather())
    for (rows, length, shared), (padded_rows, padded_length, padded_shared) in zip(plain.batches, padded.batches, strict=True):
        assert (padded_rows, padded_shared) == (rows, shared)
        most = max(tokens.limit for tokens in tokens[0] if tokens.shared == shared) - shared
        assert padded_length == min(-(-length // multiple) * multiple, most) >= length


def test_a_prompt_over_the_limit_is_truncated_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    encoder = make_encoder()
    text = "Y" * 10 + " the end of a long prompt"
    with caplog.at_level(logging.WARNING):
        tokens = encoder.tokenize(text, max_sequence_length=12, instruction=INSTRUCTION)
    # 12 rows: BOS, the last token of the instruction and 10 tokens of the prompt.
    assert tokens.ids == tuple(encoder.tokenizer.encode(INSTRUCTION + "y" * 10).ids)
    assert tokens.kept_rows == 12
    (record,) = caplog.records
    assert "last 25 tokens are dropped" in record.getMessage()
    assert "n g   p r o m p t'" in record.getMessage()
    caplog.clear()
    encoder.tokenize("y" * 10, max_sequence_length=12, instruction=INSTRUCTION)
    assert not caplog.records


def test_padding_and_truncation_in_the_tokenizer_file_have_no_effect() -> None:
    encoder = make_encoder()
    tokenizer = make_tokenizer([])
    tokenizer.enable_padding(length=40)
    tokenizer.enable_truncation(4)
    other = make_encoder(tokenizer=tokenizer)
    for text in ("y", "y" * 50):
        assert other.tokenize(text, max_sequence_length=60, instruction=INSTRUCTION) == encoder.tokenize(
            text, max_sequence_length=60, instruction=INSTRUCTION
        )


def test_a_limit_beyond_the_attention_window_is_refused() -> None:
    encoder = make_encoder()
    most = MAX_TOKENS - 5 + 1
    assert encoder.tokenize("y", max_sequence_length=most, instruction=INSTRUCTION).kept_rows == 3
    with pytest.raises(UsageError, match=f"1 to {most}"):
        encoder.tokenize("y", max_sequence_length=most + 1, instruction=INSTRUCTION)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": make_tokenizer([], bos=False)}, "does not start a text with the instruction's first token"),
        (
            {"tokenizer": make_tokenizer([("c", "d")]), "table": np.zeros((200, CHANNELS), np.float32)},
            "does not belong to its stored instruction",
        ),
        ({"token_ids": (0, 66, 67)}, "does not match its stored keys and values"),
        ({"prefix": np.zeros((1, 2, 1, 0, CHANNELS), np.float32), "token_ids": (0,)}, "does not match its stored keys"),
        ({"bos_row": np.zeros(3, np.float32)}, "does not match its embedding table"),
        ({"table": np.zeros((50, CHANNELS), np.float32)}, "more tokens than its embedding table"),
    ],
)
def test_files_of_different_bundles_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        make_encoder(**changes)
    assert caught.value.fix == "sana-export export tiny -o bundle"


def test_a_damaged_tokenizer_is_an_artifact_error(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (copy / "tokenizer" / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is damaged"):
        PromptEncoder.load(copy, Manifest.load(copy))


WORDS = ["a red fox", "ink drawing", "4K!", "<eos>", "Ünïcode", "é", " ", "  ", "\n", "."]
ALPHABET = [*WORDS, "熊猫", "吃竹子", "🐼", "👩‍🚀", "▁", "سلام"]


def test_embeddings_equal_those_of_diffusers(tiny_runtime: Any, tiny_pipeline: Any) -> None:
    """Random texts with the real tokenizer and text encoder, all in one batch, against `SanaPipeline.encode_prompt`."""
    generator = random.Random(11)
    prompts = ["".join(generator.choices(ALPHABET, k=generator.randrange(9))) for _ in range(12)]
    negatives = ["".join(generator.choices(ALPHABET, k=generator.randrange(4))) for _ in prompts]
    limit = 24
    instruction = tiny_runtime.manifest.model.instruction.split("\n")
    embeds, mask, negative_embeds, negative_mask = tiny_pipeline.encode_prompt(
        prompts, negative_prompt=negatives, max_sequence_length=limit, complex_human_instruction=instruction
    )
    result = tiny_runtime.embed(tiny_runtime.plan(Request(prompts, negative_prompt=negatives, max_sequence_length=limit)))
    found = result.gather(tiny_runtime.to_host)
    for branch, (wanted, wanted_mask) in enumerate(((negative_embeds, negative_mask), (embeds, mask))):
        length = result.context_mask.shape[-1]
        np.testing.assert_array_equal(result.context_mask[branch], wanted_mask[:, :length].numpy())
        assert not wanted_mask[:, length:].any()
        difference = found[branch] - wanted[:, :length].detach().numpy()
        assert np.abs(difference * result.context_mask[branch][..., None]).max() < 2e-5
    assert np.abs(found).max() > 1


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
@pytest.mark.parametrize(("tokens", "padded"), [(5, 32), (31, 32), (33, 64)])
def test_the_text_encoder_is_causal(tiny_bundle: Path, backend: str, tokens: int, padded: int) -> None:
    """Whatever the padding holds, the rows of the prompt are those without it, up to the order of float32 sums."""
    generator = np.random.default_rng(tokens)
    with SanaRuntime.from_pretrained(tiny_bundle, backend=backend) as runtime:
        sizes = {"batch": 3, "tokens": padded, "prefix_tokens": 40}
        shapes = {
            tensor.name: [axis if isinstance(axis, int) else sizes[axis] for axis in tensor.shape]
            for tensor in runtime.manifest.graphs["text_encoder"].spec.inputs
        }
        feeds = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        feeds["inputs_embeds"][:, tokens:] *= 30
        short = {**feeds, "inputs_embeds": np.ascontiguousarray(feeds["inputs_embeds"][:, :tokens])}
        found, wanted = (runtime.to_host(runtime.run("text_encoder", given)["prompt_embeds"]) for given in (feeds, short))
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(found[:, :tokens], wanted, atol=2e-5)
