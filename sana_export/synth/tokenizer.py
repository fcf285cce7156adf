"""A tokenizer like Gemma's: byte-pair merges over the whole text, "▁" for spaces, and bytes for characters without a token.

It never splits a text before merging. So the end of an instruction may merge with the first word of the prompt that follows:
"User Prompt: " ends with "▁", but "User Prompt: a cat" has "▁a" at that place.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

from sana_export.synth import corpus

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
#: Largest vocabulary. Training ends before that, when no pair occurs twice.
VOCABULARY_LIMIT = 4096
_ASCII = "".join(map(chr, range(32, 127))) + "\n\t"


def _corpus() -> list[str]:
    """Every line that the vocabulary is trained on. Lines that are in it twice become whole-word tokens."""
    english = [*instruction(), *corpus.ENGLISH.strip().split("\n"), " " + " ".join(corpus.ENGLISH_WORDS.split())]
    chinese = corpus.CHINESE_WORDS.split()
    return [*2 * english, *2 * chinese, *corpus.CHINESE.strip().split("\n"), *corpus.EMOJI.split(), *corpus.EMOJI_MODIFIERS]


def instruction() -> list[str]:
    """The lines of the complex human instruction, the default of `SanaPipeline.__call__`."""
    import inspect

    from diffusers import SanaPipeline

    lines: list[str] = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return lines


@cache
def _model() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The id of every token, and the merges in the order of their rank. Training is deterministic: it breaks ties by id."""
    import json

    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    # A token is at most one word with the space before it, or one run of Chinese characters.
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("▁"), "merged_with_next"),
            pre_tokenizers.Split(Regex(r"[^\p{L}\p{N}▁]"), "isolated"),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_LIMIT - len(SPECIAL_TOKENS) - len(BYTE_TOKENS),
        min_frequency=2,
        initial_alphabet=sorted(_ASCII.replace(" ", "▁")),
        max_token_length=16,
        show_progress=False,
    )
    learner.train_from_iterator(_corpus(), trainer)
    learned = json.loads(learner.to_str())["model"]
    tokens = (*SPECIAL_TOKENS, *BYTE_TOKENS, *sorted(learned["vocab"], key=learned["vocab"].__getitem__))
    return {token: index for index, token in enumerate(tokens)}, [(left, right) for left, right in learned["merges"]]


def build_tokenizer() -> Any:
    """The `tokenizers.Tokenizer`. It is the same every time, down to its bytes.

    Ids 0 to 4 are <pad>, <eos>, <bos>, <unk>, <mask>; 5 to 260 are the bytes. Encoding puts <bos> first.
    Decoding restores every text except "▁", which becomes a space, as with Gemma's tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocabulary, merges = _model()
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # This never splits, because the normalizer leaves no space. Gemma's file has this entry too.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def build_gemma_tokenizer() -> Any:
    """`build_tokenizer` as transformers' `GemmaTokenizer`, ready for `save_pretrained`."""
    from transformers import GemmaTokenizer

    vocabulary, merges = _model()
    # The class accepts more types of `merges` than its annotation says.
    return GemmaTokenizer(vocab=dict(vocabulary), merges=cast("Any", list(merges)), add_bos_token=True, add_eos_token=False)
