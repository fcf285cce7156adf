"""`generate_many`: each request's result is that of a call of its own, whatever it is drawn with."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from sana_export import Request, SanaRuntime
from sana_export.errors import Cancelled, DependencyError, UsageError
from sana_export.runtime.batches import ALONE, EQUAL, JOINED, READ_AHEAD, BatchLimit, RequestJob, batch_key, draw_in_batches, joined
from sana_export.runtime.plan import Plan

SMALL: dict[str, Any] = {"height": 64, "width": 96, "use_resolution_binning": False, "num_inference_steps": 2}
OTHER: dict[str, Any] = {**SMALL, "height": 96}
#: Prompts of different lengths.
PROMPTS = ("a cat", "two very small dogs in a large red house by the sea, at night", "🐼", "x")


def request(prompt: str, seed: int, **words: Any) -> Request:
    return Request(prompt=prompt, seed=seed, **{**SMALL, **words})


def mixed() -> list[Request]:
    """Two sizes, two scales, own negative prompts, two images of one seed's stream, and arrays in place of PIL images."""
    return [
        request(PROMPTS[0], 0),
        request(PROMPTS[1], 1, **OTHER),
        request(PROMPTS[2], 2, negative_prompt="blurry"),
        request(PROMPTS[3], 3, guidance_scale=2.0),
        request(PROMPTS[1], 4, negative_prompt="a much longer negative prompt, with many words"),
        request(PROMPTS[0], 5, num_images_per_prompt=2),
        request(PROMPTS[2], 6, output_type="np"),
        Request(prompt=list(PROMPTS[:2]), seed=[7, 8], **SMALL),
    ]


def alone(runtime: SanaRuntime, one: Request) -> list[np.ndarray]:
    words = {item.name: getattr(one, item.name) for item in fields(one)}
    return [np.asarray(image) for image in runtime(**words).images]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_each_result_is_that_of_a_call_of_its_own(tiny_runtime: SanaRuntime, batch_size: int) -> None:
    requests = mixed()
    results = list(tiny_runtime.generate_many(iter(requests), batch_size=batch_size))
    assert len(results) == len(requests)
    for one, result in zip(requests, results, strict=True):
        wanted = alone(tiny_runtime, one)
        assert len(result.images) == len(wanted) == len(result.metadata)
        for image, expected in zip(result.images, wanted, strict=True):
            np.testing.assert_array_equal(np.asarray(image), expected)
        assert (result.height, result.width) == (one.height, one.width)
        assert [document["request"]["seed"] for document in result.metadata] == list(result.seeds) * (
            len(wanted) // len(result.seeds)
        )


def test_an_image_does_not_depend_on_its_batch(tiny_runtime: SanaRuntime) -> None:
    """On ONNX Runtime on a CPU: the bits, beside any number of other prompts of any length."""
    first = alone(tiny_runtime, request(PROMPTS[2], 9, output_type="np"))[0]
    for count in (2, 3, 4):
        for place in range(count):
            prompts = [PROMPTS[(place + number) % 2] for number in range(count)]
            prompts[place] = PROMPTS[2]
            seeds = [9 if number == place else number for number in range(count)]
            images = tiny_runtime(prompts, seed=seeds, output_type="np", **SMALL).images
            np.testing.assert_array_equal(images[place], first)


def test_given_embeddings_of_different_lengths_are_drawn_together(tiny_runtime: SanaRuntime) -> None:
    encoded = [tiny_runtime.encode_prompt(prompt) for prompt in PROMPTS[:2]]
    requests = [Request(**one.arrays, seed=seed, **SMALL) for seed, one in enumerate(encoded)]
    plans = [tiny_runtime.plan(one) for one in requests]
    assert batch_key(plans[0]) == batch_key(plans[1])
    for seed, result in enumerate(tiny_runtime.generate_many(requests, batch_size=2)):
        np.testing.assert_array_equal(np.asarray(result.images[0]), alone(tiny_runtime, request(PROMPTS[seed], seed))[0])


def batches_of(runtime: SanaRuntime, requests: Sequence[Any], batch_size: int) -> list[list[Any]]:
    """The batches in which requests are drawn, as their seeds."""
    drawn: list[list[Any]] = []

    def draw(jobs: Sequence[RequestJob]) -> list[Any]:
        drawn.append([job.request.seed for job in jobs])
        assert joined([job.plan for job in jobs]).latents_shape[0] == sum(job.images for job in jobs)
        return [job.request.seed for job in jobs]

    outcomes = list(draw_in_batches(requests, runtime.plan, draw, BatchLimit(batch_size)))
    assert outcomes == [one.seed for one in requests], "in the order of the requests"
    return drawn


def test_requests_of_the_same_shape_are_drawn_together(tiny_runtime: SanaRuntime) -> None:
    assert batches_of(tiny_runtime, mixed(), 3) == [[0, 2, 4], [1], [3], [5], [6], [[7, 8]]]
    assert batches_of(tiny_runtime, mixed(), 16) == [[0, 2, 4, [7, 8]], [1], [3], [5], [6]]
    assert batches_of(tiny_runtime, mixed(), 1) == [[0], [1], [2], [3], [4], [5], [6], [[7, 8]]]


@pytest.mark.parametrize(
    "words",
    [
        {"height": 96},
        {"num_inference_steps": 3},
        {"guidance_scale": 2.0},
        {"guidance_scale": 1.0},
        {"pag_scale": 1.0},
        {"output_type": "latent"},
        {"complex_human_instruction": None},
        {"max_sequence_length": 20},
        {"decoder_tile": 64},
        {"num_images_per_prompt": 2, "seed": [1, 2]},
        {"latents": np.zeros((1, 32, 2, 3), np.float32)},
    ],
    ids=str,
)
def test_requests_that_need_other_work_are_not(tiny_runtime: SanaRuntime, words: dict[str, Any]) -> None:
    first, other = tiny_runtime.plan(request("a", 1)), tiny_runtime.plan(Request(**{**SMALL, "prompt": "a", "seed": 1, **words}))
    assert batch_key(first) is not None
    assert batch_key(first) != batch_key(other)
    assert batch_key(first) == batch_key(tiny_runtime.plan(request("b", 2, negative_prompt="c")))


def test_every_field_of_a_plan_is_joined_or_equal() -> None:
    assert sorted((*JOINED, *EQUAL, *ALONE)) == sorted(item.name for item in fields(Plan))


def test_requests_are_read_as_they_are_needed(tiny_runtime: SanaRuntime) -> None:
    read = 0

    def endless() -> Any:
        nonlocal read
        while True:
            read += 1
            yield request("a", read)

    with contextlib.closing(tiny_runtime.generate_many(endless(), batch_size=2)) as results:
        for number in range(1, 4):
            assert next(results).seeds == (number,)
            assert read < number + READ_AHEAD * 2


def bad() -> list[Any]:
    return [
        request("a", 0),
        request("a", 1, height=100),
        "a cat",
        request("b", 2),
        Request(prompt="x", seed=3, max_sequence_length=2047),
    ]


def test_an_error_is_raised_in_its_turn(tiny_runtime: SanaRuntime) -> None:
    results = tiny_runtime.generate_many(bad(), batch_size=4)
    assert next(results).seeds == (0,)
    with pytest.raises(UsageError, match="multiples of 32"):
        next(results)
    assert list(results) == []


def test_errors_take_the_place_of_results(tiny_runtime: SanaRuntime) -> None:
    first, size, kind, second, length = tiny_runtime.generate_many(bad(), batch_size=4, return_errors=True)
    assert (first.seeds, second.seeds) == ((0,), (2,))
    assert [type(error) for error in (size, kind, length)] == [UsageError] * 3
    assert "takes requests" in kind.message
    assert "max_sequence_length" in length.message, "an error that only the text encoder's tokens show"


def test_an_error_of_the_machine_ends_the_run(tiny_runtime: SanaRuntime) -> None:
    def draw(jobs: Sequence[RequestJob]) -> list[Any]:
        raise DependencyError("no more memory")

    with pytest.raises(DependencyError):
        list(draw_in_batches([request("a", 0)], tiny_runtime.plan, draw, BatchLimit(1)))


def test_cancelling_from_another_thread_leaves_the_runtime_usable(tiny_runtime: SanaRuntime) -> None:
    started, stop = threading.Event(), threading.Event()

    def on_step(*_: Any) -> None:
        started.set()

    threading.Thread(target=lambda: (started.wait(60), stop.set())).start()
    results = tiny_runtime.generate_many(
        (request("a", seed, num_inference_steps=200) for seed in range(50)), callback_on_step_end=on_step, cancelled=stop.is_set
    )
    with pytest.raises(Cancelled):
        list(results)
    assert list(results) == []
    np.testing.assert_array_equal(alone(tiny_runtime, request("a", 1)), alone(tiny_runtime, request("a", 1)))


def test_a_callbacks_error_reaches_the_caller_and_closing_frees_the_runtime(tiny_runtime: SanaRuntime) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        next(tiny_runtime.generate_many([request("a", 1)], callback_on_step_end=fail))
    with contextlib.closing(tiny_runtime.generate_many([request("a", 1)] * 3)) as results:
        next(results)
        # Between two results the runtime is free, also for another thread.
        other = threading.Thread(target=lambda: tiny_runtime("b", **SMALL), daemon=True)
        other.start()
        other.join(60)
        assert not other.is_alive()


def test_a_callback_can_interrupt_one_batch(tiny_runtime: SanaRuntime) -> None:
    steps: list[int] = []

    def on_step(runtime: Any, index: int, *_: Any) -> None:
        steps.append(index)
        runtime._interrupt = True

    assert len(list(tiny_runtime.generate_many([request("a", 1), request("b", 2)], callback_on_step_end=on_step))) == 2
    assert steps == [0, 0]


def test_a_batch_is_as_large_as_the_engines_take(
    tiny_runtime: SanaRuntime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def check(graphs: Any, axes: Any) -> None:
        if axes["batch"] > 2:
            raise UsageError("no engine", found=f"{axes['batch']} images", fix="sana-export build")

    monkeypatch.setattr(tiny_runtime.backend, "check_supported", check)
    drawn = []
    results = tiny_runtime.generate_many(
        [request(prompt, 1) for prompt in "abcde"],
        batch_size=4,
        callback_on_step_end=lambda _, index, __, tensors: drawn.append(tensors["latents"].shape[0]) if index == 0 else None,
    )
    assert len(list(results)) == 5
    assert drawn == [2, 2, 1]
    (message,) = [record.getMessage() for record in caplog.records if "batch size" in record.getMessage()]
    assert "no engine takes 3 images" in message


@pytest.mark.parametrize("batch_size", [0, "2", 1.5, True])
def test_a_batch_size_that_is_none(tiny_runtime: SanaRuntime, batch_size: Any) -> None:
    with pytest.raises(UsageError, match="batch_size"):
        tiny_runtime.generate_many([], batch_size=batch_size)


def test_sprint_draws_a_batch_with_the_noise_of_each_seed(sprint_runtime: SanaRuntime) -> None:
    requests = [
        Request(prompt=prompt, seed=seed, height=64, width=64, use_resolution_binning=False) for seed, prompt in enumerate("ab")
    ]
    for one, result in zip(requests, sprint_runtime.generate_many(requests, batch_size=2), strict=True):
        np.testing.assert_array_equal(np.asarray(result.images[0]), alone(sprint_runtime, one)[0])
