"""A parameter of diffusers' name means what it means there, or an error says what to write instead."""

from __future__ import annotations

import contextlib
import copy
import inspect
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SanaPAGPipeline, SanaPipeline, SanaSprintPipeline
from diffusers.callbacks import SDCFGCutoffCallback

from sana_export.errors import Cancelled, UsageError
from sana_export.runtime import Request, SanaRuntime
from sana_export.runtime.pipeline import CALL_PARAMETERS
from sana_export.runtime.words import CALL_WORDS

SMALL: dict[str, Any] = {"height": 96, "width": 160, "use_resolution_binning": False, "num_inference_steps": 3}
SPRINT: dict[str, Any] = {**SMALL, "num_inference_steps": 2}
#: The rounding difference between two orders of float32 summation, in latents that reach about 10.
TOLERANCE = 2e-4
PIPELINES = (SanaPipeline, SanaPAGPipeline, SanaSprintPipeline)


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def both(runtime: SanaRuntime, pipeline: Any, prompt: Any = "a red fox", ours: Any = None, **options: Any) -> tuple[Any, Any]:
    """The latents of the runtime and of diffusers for the same words. `ours` replaces some for the runtime."""
    found = runtime(prompt, seed=7, output_type="latent", **{**options, **(ours or {})}).images
    return found, pipeline(prompt, generator=generator(7), output_type="latent", **options).images.numpy()


def same(runtime: SanaRuntime, pipeline: Any, prompt: Any = "a red fox", ours: Any = None, **options: Any) -> np.ndarray:
    found, wanted = both(runtime, pipeline, prompt, ours, **options)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < TOLERANCE
    return wanted


@pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda kind: kind.__name__)
def test_every_word_of_diffusers_is_taken_or_has_an_advice(pipeline: Any) -> None:
    words = set(inspect.signature(pipeline.__call__).parameters) - {"self"}
    assert words - set(CALL_PARAMETERS) - set(CALL_WORDS) == set()


@pytest.mark.parametrize(
    "instruction",
    [["Draw an emoji of: "], ["Several lines,", "of which the last one ends in a letter"], [], None],
    ids=["one line", "two lines", "empty", "None"],
)
def test_an_instruction_of_the_callers_own(tiny_runtime: SanaRuntime, tiny_pipeline: Any, instruction: Any) -> None:
    default = tiny_runtime("a red fox", seed=7, output_type="latent", **SMALL).images
    wanted = same(tiny_runtime, tiny_pipeline, complex_human_instruction=instruction, **SMALL)
    assert np.abs(wanted - default).max() > 0.1


def test_the_checkpoints_instruction_as_a_list(tiny_runtime: SanaRuntime) -> None:
    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    plan = tiny_runtime.plan(Request("a fox", complex_human_instruction=lines))
    assert plan.texts == tiny_runtime.plan(Request("a fox")).texts
    assert tiny_runtime.tokenize(plan) == tiny_runtime.tokenize(tiny_runtime.plan(Request("a fox")))


def test_an_own_instruction_with_long_prompts_and_several_images(tiny_runtime: SanaRuntime, tiny_pipeline: Any) -> None:
    words = {"complex_human_instruction": ["Draw: "], "max_sequence_length": 12, "num_images_per_prompt": 2}
    same(tiny_runtime, tiny_pipeline, "a very long prompt, " * 20, **words, **SMALL)


def embeddings(pipeline: Any, prompts: list[str], **options: Any) -> dict[str, Any]:
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    return dict(zip(names, pipeline.encode_prompt(prompts, device="cpu", **options), strict=True))


@pytest.mark.parametrize("guidance_scale", [4.5, 1.0])
@pytest.mark.parametrize("images", [1, 2])
def test_embeddings_from_the_caller(tiny_runtime: SanaRuntime, tiny_pipeline: Any, guidance_scale: float, images: int) -> None:
    given = embeddings(tiny_pipeline, ["a red fox"], negative_prompt="blue", max_sequence_length=40)
    given["prompt_embeds"] = given["prompt_embeds"] * 1.3  # what prompt weighting does
    options = {**SMALL, **given, "negative_prompt": None, "guidance_scale": guidance_scale, "num_images_per_prompt": images}
    same(tiny_runtime, tiny_pipeline, None, **options)


def test_embeddings_of_several_prompts_with_text_as_negative_prompt(tiny_runtime: SanaRuntime, tiny_pipeline: Any) -> None:
    given = embeddings(tiny_pipeline, ["a red fox", "an apple and a pear on a table"], do_classifier_free_guidance=False)
    given = {name: value for name, value in given.items() if value is not None}
    same(tiny_runtime, tiny_pipeline, None, **given, negative_prompt="blue", **SMALL)


def test_embeddings_under_perturbed_attention(tiny_runtime: SanaRuntime, tiny_pipeline: Any) -> None:
    given = embeddings(tiny_pipeline, ["a red fox"], negative_prompt="blue")
    options = {**SMALL, "pag_scale": 2.0, "seed": 3, "output_type": "latent"}
    found = tiny_runtime(**given, **options).images
    wanted = tiny_runtime("a red fox", negative_prompt="blue", complex_human_instruction=None, **options).images
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)


def test_embeddings_for_sprint(sprint_runtime: SanaRuntime, sprint_pipeline: Any) -> None:
    rows, mask = sprint_pipeline.encode_prompt(["a red fox"], device="cpu")
    same(sprint_runtime, sprint_pipeline, None, prompt_embeds=rows, prompt_attention_mask=mask, **SPRINT)


@pytest.mark.parametrize("angles", [(1.5, 1.1), (1.2, None), (1.57080, None)])
def test_timesteps_of_sprint(sprint_runtime: SanaRuntime, sprint_pipeline: Any, angles: tuple[float, float | None]) -> None:
    default = sprint_runtime("a red fox", seed=7, output_type="latent", **SPRINT).images
    words = {"max_timesteps": angles[0], "intermediate_timesteps": angles[1]}
    assert np.abs(same(sprint_runtime, sprint_pipeline, **words, **SPRINT) - default).max() > 0.01


def test_the_first_timestep_of_sprint_with_four_steps(sprint_runtime: SanaRuntime, sprint_pipeline: Any) -> None:
    same(sprint_runtime, sprint_pipeline, max_timesteps=1.4, intermediate_timesteps=None, **{**SPRINT, "num_inference_steps": 4})


@pytest.mark.parametrize("name", ["tiny", "sprint"])
def test_a_callback_sees_and_changes_the_latents_of_diffusers(name: str, request: pytest.FixtureRequest) -> None:
    runtime, pipeline = request.getfixturevalue(f"{name}_runtime"), request.getfixturevalue(f"{name}_pipeline")
    seen: list[list[Any]] = [[], []]

    def callback(index: int) -> Callable[..., Any]:
        def on_step(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            seen[index].append((step, float(timestep), np.array(tensors["latents"])))
            return {"latents": tensors["latents"] * 0.9}

        return on_step

    options = SPRINT if name == "sprint" else SMALL
    same(runtime, pipeline, ours={"callback_on_step_end": callback(0)}, callback_on_step_end=callback(1), **options)
    for ours, theirs in zip(*seen, strict=True):
        assert ours[0] == theirs[0]
        if name == "tiny":  # SanaSprintPipeline passes angles, the runtime what the denoiser is fed
            assert ours[1] == pytest.approx(theirs[1])
        np.testing.assert_allclose(ours[2], theirs[2], atol=TOLERANCE)


@pytest.mark.parametrize("name", ["tiny", "sprint"])
@pytest.mark.parametrize("last", [0, 1])
def test_a_callback_stops_a_call_as_in_diffusers(name: str, last: int, request: pytest.FixtureRequest) -> None:
    runtime, pipeline = request.getfixturevalue(f"{name}_runtime"), request.getfixturevalue(f"{name}_pipeline")
    calls = []

    def on_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        calls.append(step)
        if step == last:
            pipe._interrupt = True
        assert pipe.interrupt == (step == last)
        return tensors

    options = {**SPRINT, "num_inference_steps": 4} if name == "sprint" else SMALL
    more = {"intermediate_timesteps": None} if name == "sprint" else {}
    same(runtime, pipeline, callback_on_step_end=on_step, **options, **more)
    assert calls == [*range(last + 1)] * 2
    assert len(runtime("a red fox", **options).timings.denoise) == options["num_inference_steps"]  # the next call is not stopped


def test_the_forms_of_a_result(tiny_runtime: SanaRuntime) -> None:
    result = tiny_runtime("a red fox", seed=7, output_type="np", **SMALL)
    assert result[0] is result["images"] is result.images
    (images,) = result
    assert images is result.images
    assert len(result) == 1
    with pytest.raises(IndexError):
        result[1]
    plain: Any = tiny_runtime("a red fox", seed=7, output_type="np", return_dict=False, **SMALL)
    assert type(plain) is tuple
    np.testing.assert_array_equal(plain[0], result.images)


@pytest.mark.parametrize(
    "words",
    [
        {"eta": 0.5, "clean_caption": False, "attention_kwargs": None, "timesteps": None, "sigmas": None, "generator": None},
        {"callback_on_step_end_tensor_inputs": ["latents"], "attention_kwargs": {}, "negative_prompt": None},
        {"num_images_per_prompt": np.int64(1), "guidance_scale": np.float32(4.5), "height": np.int32(96), "seed": np.uint8(7)},
    ],
)
def test_words_that_change_nothing(tiny_runtime: SanaRuntime, words: dict[str, Any]) -> None:
    wanted = tiny_runtime("a red fox", seed=7, output_type="latent", **SMALL).images
    found = tiny_runtime("a red fox", **{"seed": 7, "output_type": "latent", **SMALL, **words}).images
    np.testing.assert_array_equal(found, wanted)


def test_latents_of_torch_in_any_dtype(tiny_runtime: SanaRuntime) -> None:
    latents = torch.randn(1, 32, 3, 5, dtype=torch.bfloat16, generator=generator(2)).requires_grad_()
    options = {**SMALL, "output_type": "latent", "seed": 7}
    wanted = tiny_runtime("a red fox", latents=latents.detach().float().numpy(), **options).images
    np.testing.assert_array_equal(tiny_runtime("a red fox", latents=latents, **options).images, wanted)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ({"generator": generator(42)}, ["does not take generator", "seed=42"]),
        ({"generator": [generator(1), generator(2)]}, ["seed=[1, 2]"]),
        ({"generator": "x"}, ["seed=42"]),
        ({"timesteps": [900, 500]}, ["DPMSolverMultistepScheduler takes no custom timesteps", "FlowMatchEulerDiscreteScheduler"]),
        ({"sigmas": [0.5]}, ["DPMSolverMultistepScheduler takes no custom sigmas", "UniPCMultistepScheduler"]),
        ({"timesteps": "900,500"}, ["timesteps is not a list of numbers", "'900,500'"]),
        ({"sigmas": []}, ["sigmas is not a list of numbers", "0 numbers"]),
        ({"sigmas": [0.9, float("nan")]}, ["an item of sigmas is out of range"]),
        ({"scheduler": 3}, ["scheduler is not a name or a config"]),
        ({"scheduler": "unipcc"}, ["unknown scheduler 'unipcc'", "dpm++2m", "--scheduler unipc"]),
        ({"scheduler": "DDIMScheduler"}, ["DDIMScheduler is not supported", "UniPCMultistepScheduler"]),
        ({"scheduler": {"solver_ordr": 3}}, ["no scheduler has a setting 'solver_ordr'", "solver_order?"]),
        ({"scheduler": {"solver_order": "high"}}, ["solver_order = 'high'", "1 or 2 or 3"]),
        ({"scheduler": "scm"}, ["SCMScheduler cannot sample this checkpoint", "unipc"]),
        ({"clean_caption": True}, ["does not take clean_caption"]),
        ({"attention_kwargs": {"scale": 0.5}}, ["runtime.load_lora(path, scale)"]),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, ['["latents"]']),
        ({"output_type": "pt"}, ["unknown output_type 'pt'", "pil, np, latent"]),
        ({"guidance_scael": 3}, ["no parameter 'guidance_scael'", "guidance_scale?"]),
        ({"steps": 3}, ["does not take steps", "num_inference_steps"]),
        ({"complex_human_instruction": "Draw: "}, ["not a list", "complex_human_instruction=['Draw: ']"]),
        ({"complex_human_instruction": [""]}, ["has no text"]),
        ({"complex_human_instruction": ["word " * 3000]}, ["complex_human_instruction is too long", "at most 2048"]),
        ({"complex_human_instruction": 3}, ["not a list of texts"]),
        ({"max_timesteps": 1.2}, ["SANA-Sprint"]),
        ({"prompt_embeds": np.zeros((1, 3, 8))}, ["prompt_embeds and prompt_attention_mask belong together"]),
        ({"prompt": None}, ["prompt is not text"]),
        ({"callback_on_step_end": 3}, ["callback_on_step_end is not a function"]),
        ({"cancelled": True}, ["cancelled is not a function"]),
        ({"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.4)}, ["prompt_embeds", "latents"]),
        ({"num_images_per_prompt": 600, "height": 4096}, ["that many images", "make several calls"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_other_words_say_what_to_write(tiny_runtime: SanaRuntime, words: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        tiny_runtime(**{"prompt": "a fox", "num_inference_steps": 1, **words})
    for part in parts:
        assert part in str(caught.value)


def test_only_the_prompt_has_no_name(tiny_runtime: SanaRuntime) -> None:
    with pytest.raises(UsageError, match="only the prompt") as caught:
        tiny_runtime("a fox", "blue", 3)  # type: ignore[arg-type]
    assert caught.value.found == "'blue', 3"


@pytest.mark.parametrize("steps", [1, 3])
def test_an_intermediate_timestep_belongs_to_two_steps(sprint_runtime: SanaRuntime, steps: int) -> None:
    with pytest.raises(UsageError, match="the second of two"):
        sprint_runtime("a fox", num_inference_steps=steps, intermediate_timesteps=1.1)


@pytest.mark.parametrize(
    ("mask", "part"),
    [([[2.0] * 3], "not a mask"), ([[0.0] * 3], "not a mask"), ([[1.0] * 4], "wrong shapes"), ("x", "not an array")],
)
def test_a_mask_that_does_not_fit(tiny_runtime: SanaRuntime, mask: Any, part: str) -> None:
    rows = np.zeros((1, 3, tiny_runtime.manifest.model.text_channels))
    with pytest.raises(UsageError, match=part):
        tiny_runtime(prompt_embeds=rows, prompt_attention_mask=mask)


@pytest.mark.parametrize(("word", "part"), [("torch_dtype", "--dtype"), ("variant", "--variant"), ("memry", "memory")])
def test_other_words_of_from_pretrained(word: str, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        SanaRuntime.from_pretrained("bundle", **{word: "x"})  # type: ignore[arg-type]


def test_methods_of_diffusers_say_what_to_write(tiny_runtime: SanaRuntime) -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'to': write SanaRuntime.from_pretrained\(bundle, device=0\)"):
        tiny_runtime.to("cuda")  # type: ignore[attr-defined]
    assert not hasattr(tiny_runtime, "nothing")


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 5])
def test_a_call_is_cancelled_between_its_stages(tiny_runtime: SanaRuntime, after: int) -> None:
    """The call asks at its start, after it waited, after encoding, and after each of three steps."""
    asked = []

    def cancelled() -> bool:
        asked.append(threading.current_thread())
        return len(asked) > after

    wanted = tiny_runtime("a red fox", seed=7, **SMALL).images[0].tobytes()
    with pytest.raises(Cancelled, match="the call was cancelled"):
        tiny_runtime("a red fox", seed=7, cancelled=cancelled, **SMALL)
    assert asked == [threading.current_thread()] * (after + 1)
    assert tiny_runtime("a red fox", seed=7, cancelled=lambda: False, **SMALL).images[0].tobytes() == wanted


def test_another_thread_cancels(tiny_runtime: SanaRuntime) -> None:
    event, outcome = threading.Event(), []

    def work() -> None:
        try:
            tiny_runtime("a red fox", cancelled=event.is_set, **{**SMALL, "num_inference_steps": 1000})
        except Cancelled as error:
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    event.set()
    thread.join(60)
    assert len(outcome) == 1
    assert outcome[0].exit_code == 130


def test_decoding_is_cancelled_between_tiles(tiny_runtime: SanaRuntime) -> None:
    asked = []

    def cancelled() -> bool:
        asked.append(0)
        return len(asked) == 7  # start, turn, encoding, one step; the seventh is before the third tile

    options = {**SMALL, "num_inference_steps": 1, "height": 512, "width": 512}
    with pytest.raises(Cancelled):
        tiny_runtime("x", cancelled=cancelled, decoder_tile=64, **options)
    assert len(asked) == 7


@pytest.mark.parametrize("copying", [pickle.dumps, copy.copy, copy.deepcopy], ids=["pickle", "copy", "deepcopy"])
def test_what_holds_sessions_belongs_to_one_process(tiny_runtime: SanaRuntime, copying: Callable[[Any], Any]) -> None:
    plan = tiny_runtime.plan(Request("a fox", **SMALL))
    conditioning = tiny_runtime.encode(plan)
    with contextlib.closing(tiny_runtime.steps(plan, conditioning)) as steps:
        step = next(steps)
    for thing in (tiny_runtime, tiny_runtime.backend, tiny_runtime.sessions["denoiser"], tiny_runtime.text, conditioning, step):
        with pytest.raises(UsageError, match="cannot be copied or handed to another process") as caught:
            copying(thing)
        assert "SanaRuntime.from_pretrained" in str(caught.value)


def test_a_process_that_gets_a_runtime_does_not_start(tiny_runtime: SanaRuntime) -> None:
    process = multiprocessing.get_context("spawn").Process(target=print, args=(tiny_runtime,))
    with pytest.raises(UsageError, match="another process"):
        process.start()


def test_plans_and_results_travel(tiny_runtime: SanaRuntime) -> None:
    request = Request("a fox", seed=3, **SMALL)
    assert vars(pickle.loads(pickle.dumps(request))) == vars(request)
    plan = pickle.loads(pickle.dumps(tiny_runtime.plan(request)))
    result = pickle.loads(pickle.dumps(tiny_runtime("a fox", seed=3, **SMALL)))
    assert plan.seeds == result.seeds == (3,)


def test_a_call_within_a_callback_has_its_own_interruption(tiny_runtime: SanaRuntime) -> None:
    wanted = tiny_runtime("a fox", seed=7, output_type="latent", **SMALL).images
    steps = []

    def stop(pipe: Any, *_: Any) -> None:
        pipe._interrupt = True

    def call_again(pipe: Any, index: int, *_: Any) -> None:
        steps.append(index)
        if index == 0:
            pipe("a cat", seed=8, output_type="latent", callback_on_step_end=stop, **SMALL)

    def stop_and_call(pipe: Any, index: int, *_: Any) -> None:
        steps.append(index)
        pipe._interrupt = True
        pipe("a cat", seed=8, output_type="latent", **SMALL)

    found = tiny_runtime("a fox", seed=7, output_type="latent", callback_on_step_end=call_again, **SMALL).images
    assert steps == [0, 1, 2]
    np.testing.assert_array_equal(found, wanted)
    tiny_runtime("a fox", seed=7, output_type="latent", callback_on_step_end=stop_and_call, **SMALL)
    assert steps == [0, 1, 2, 0]


def test_negative_prompts_in_an_array(tiny_runtime: SanaRuntime) -> None:
    texts = ["blurry", "dark"]
    plans = [tiny_runtime.plan(Request(["a", "b"], negative_prompt=given)) for given in (texts, np.array(texts))]
    assert plans[0].texts == plans[1].texts


@pytest.mark.parametrize(
    "options",
    [
        {"backend": None},
        {"backend": 5},
        {"backend_options": 5},
        {"backend_options": [("session_options", {})]},
        {"backend_options": {1: 2}},
        {"backend": "onnxruntime", "backend_options": {"session_options": 5}},
        {"backend": "onnxruntime", "backend_options": {"provider_options": [1]}},
    ],
    ids=str,
)
def test_options_of_another_type(tiny_bundle: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"not a name|not named options"):
        SanaRuntime.from_pretrained(tiny_bundle, **options)
