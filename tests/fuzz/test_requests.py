"""Requests of any values: a plan within the limits, or an error of ours; and prompts of any text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sana_export.architectures import SCHEDULER_DEFAULTS
from sana_export.cli.main import parse
from sana_export.errors import Cancelled, SanaExportError, UsageError
from sana_export.numeric import MAX_IMAGES, MAX_SIDE, MAX_STEPS
from sana_export.runtime import Request, SanaRuntime
from sana_export.runtime.inputs import MAX_PIXELS
from sana_export.runtime.pipeline import CALL_PARAMETERS
from sana_export.runtime.scheduler_choice import NAMES as SCHEDULER_NAMES
from sana_export.runtime.words import CALL_WORDS
from sana_export.supported import SCHEDULERS
from tests.fuzz.support import MIB, at_most

SETTINGS = ["_class_name", *sorted({key for defaults in SCHEDULER_DEFAULTS.values() for key in defaults})]
NAMES = [item.name for item in fields(Request)]
SMALL: dict[str, Any] = {"height": 64, "width": 64, "use_resolution_binning": False, "num_inference_steps": 1}


class Rude:
    """An object whose every use raises an error."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __len__(self) -> int:
        raise OverflowError

    def __getitem__(self, index: object) -> Any:
        raise KeyError(index)

    def __repr__(self) -> str:
        raise ValueError


#: Any text, with lone surrogates and NULs, and long ones.
TEXTS = st.text(st.characters(), max_size=60) | st.sampled_from(
    ["\0", "\ud800", "a" * 99_999, "é" * 100_001, "\u202e🐼", "\n", "-x"]
)
NUMBERS = (
    st.integers()
    | st.integers(-5, 5000)
    | st.floats()
    | st.just(5000).map(lambda digits: -(10**digits))  # hypothesis cannot print it
    | st.sampled_from([10**9, 10**400, 2**63, 2**64, 1e30, -1e30, 1e-300, 16384, 16385, 1024, 1.57080])
)
SCALARS = NUMBERS.filter(lambda value: not isinstance(value, int) or abs(value) < 2**63).map(np.array) | st.sampled_from(
    [
        np.bool_(True),
        np.int8(3),
        np.uint64(2**64 - 1),
        np.float16(2),
        np.float32("nan"),
        np.array([1, 2]),
        np.array(["x"]),
        np.array(None),
    ]
)
THINGS = st.sampled_from([None, True, False, b"x", object(), {}, {"a": 1}, set(), range(3), range(10**30), 1j, float, "pil", "np"])
THINGS |= st.builds(Rude)
VALUES = st.recursive(NUMBERS | SCALARS | THINGS | TEXTS, lambda inner: st.lists(inner, max_size=4), max_leaves=6)
#: What a request mostly looks like, so that some are valid, with any values in between.
USUAL = st.fixed_dictionaries(
    {},
    optional={
        "prompt": TEXTS | st.lists(TEXTS, min_size=1, max_size=3),
        "num_inference_steps": st.integers(0, 2000),
        "guidance_scale": st.floats(-2000, 2000),
        "pag_scale": st.floats(-1, 2000),
        "height": st.integers(-1, 20000) | st.integers(0, 40).map(lambda side: 32 * side),
        "width": st.integers(-1, 20000) | st.integers(0, 40).map(lambda side: 32 * side),
        "num_images_per_prompt": st.integers(0, 2000),
        "max_sequence_length": st.integers(0, 3000),
        "decoder_tile": st.integers(-8, 20000),
        "seed": st.integers(-(2**65), 2**65) | st.lists(st.integers(), max_size=3),
        "use_resolution_binning": st.booleans(),
        "scheduler": st.sampled_from([*SCHEDULER_NAMES, *SCHEDULERS])
        | st.dictionaries(
            st.sampled_from(SETTINGS), NUMBERS | st.booleans() | st.sampled_from(["zero", "sigma_min", "bh1"]), max_size=3
        ),
        "sigmas": st.lists(st.floats(0, 1.1), max_size=4).map(lambda values: sorted(values, reverse=True)),
        "complex_human_instruction": st.booleans() | st.lists(TEXTS, max_size=3),
    },
)
REQUESTS = st.builds(
    lambda usual, other: {"prompt": "x", **usual, **other}, USUAL, st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=2)
)


@given(REQUESTS)
def test_a_request_has_a_plan_within_the_limits_or_an_error(tiny_runtime: SanaRuntime, values: dict[str, Any]) -> None:
    with at_most(96 * MIB):
        try:
            plan = tiny_runtime.plan(Request(**values))
        except UsageError:
            return
    images, _, height, width = plan.latents_shape
    assert 1 <= images <= MAX_IMAGES
    assert images * plan.output_height * plan.output_width <= MAX_PIXELS
    assert max(plan.output_height, plan.output_width, 32 * height, 32 * width) <= MAX_SIDE
    assert 1 <= len(plan.schedule.timesteps) < 2 * MAX_STEPS
    assert np.isfinite(plan.schedule.coefficients).all()
    assert np.isfinite(plan.guidance_weights).all()
    assert len(plan.seeds) in (1, images)
    assert all(type(side) is int for side in (plan.output_height, plan.output_width, plan.decoder_tile, plan.max_sequence_length))


@given(TEXTS | st.text(st.characters(), max_size=2000), TEXTS, st.sampled_from([True, None, ["Draw: "], ["\n", "x"]]))
def test_any_text_is_tokenized_or_refused(tiny_runtime: SanaRuntime, prompt: str, negative: str, instruction: Any) -> None:
    try:
        request = Request(prompt, negative_prompt=negative, complex_human_instruction=instruction, max_sequence_length=20, **SMALL)
        branches = tiny_runtime.tokenize(tiny_runtime.plan(request))
    except UsageError:
        return
    for tokens in [tokens for branch in branches for tokens in branch]:
        assert 1 <= tokens.shared <= tokens.first_kept < len(tokens.ids) + 1
        assert len(tokens.ids) <= tokens.limit
        assert tokens.kept_rows <= 20


@given(st.dictionaries(st.sampled_from([*CALL_PARAMETERS, *CALL_WORDS, "x", "promt"]), VALUES, max_size=3))
def test_a_call_of_any_words_ends_with_an_error_of_ours(tiny_runtime: SanaRuntime, words: dict[str, Any]) -> None:
    """A call that would be valid is cancelled at its start."""
    with pytest.raises(SanaExportError) as caught:
        tiny_runtime(**{"prompt": "x", **SMALL, **words, "cancelled": lambda: True})
    assert isinstance(caught.value, UsageError | Cancelled)


LATENTS = st.sampled_from([(1, 32, 2, 2), (1, 32, 2, 3), (2, 32, 2, 2), (32, 2, 2), ()])


@given(LATENTS, st.sampled_from(["f2", "f4", "f8", "i4", "u1", "?", "c8", "U3", "O"]), st.floats())
def test_latents_of_any_shape_and_dtype(tiny_runtime: SanaRuntime, shape: tuple[int, ...], dtype: str, value: float) -> None:
    with np.errstate(all="ignore"):
        try:
            latents = np.full(shape, value).astype(dtype)
        except (ValueError, OverflowError):
            return
    try:
        plan = tiny_runtime.plan(Request("x", latents=latents, seed=1, **SMALL))
    except UsageError:
        return
    assert plan.latents is not None
    assert plan.latents.shape == (1, 32, 2, 2)
    assert plan.latents.dtype == np.float32
    assert np.isfinite(plan.latents).all()


@given(
    st.sampled_from([(1, 3), (2, 3), (1, 2049), (3,), (1, 3, 1)]),
    st.floats(),
    st.lists(st.sampled_from([0.0, 1.0, 0.5]), max_size=6),
)
def test_embeddings_of_any_shape(tiny_runtime: SanaRuntime, shape: tuple[int, ...], value: float, mask: list[float]) -> None:
    channels = tiny_runtime.manifest.model.text_channels
    rows = np.full((*shape, channels), value, np.float32)
    hidden = np.resize(np.array(mask or [1.0]), shape)
    try:
        plan = tiny_runtime.plan(Request(prompt_embeds=rows, prompt_attention_mask=hidden, seed=1, **SMALL))
    except UsageError:
        return
    assert plan.embeddings[1].embeds.shape[2] == channels
    assert plan.latents_shape[0] == shape[0]


WORDS = st.sampled_from(
    [
        "generate",
        "b",
        "-o",
        "a.png",
        "--seed",
        "--lora",
        "--negative-prompt",
        "--",
        "-ugly",
        "--steps",
        "=",
        "-",
        "--json",
        "-q",
        "-o-",
        "é",
    ]
)


@given(st.lists(WORDS | TEXTS | NUMBERS.map(lambda value: f"{value}" if abs(value) < 1e300 else "9" * 400), max_size=10))
def test_a_command_line_of_any_words(words: list[str]) -> None:
    try:
        options = parse(["generate", *words])
    except (UsageError, SystemExit):  # --help ends it
        return
    assert isinstance(options.prompts, list)
    assert isinstance(options.output, Path)


def test_the_values_include_valid_requests(tiny_runtime: SanaRuntime) -> None:
    seen: Mapping[str, int] = {"plan": 0, "error": 0}
    counts = dict(seen)

    @given(REQUESTS)
    def count(values: dict[str, Any]) -> None:
        try:
            tiny_runtime.plan(Request(**values))
            counts["plan"] += 1
        except SanaExportError:
            counts["error"] += 1

    count()
    assert counts["plan"] > 2
    assert counts["error"] > 2
