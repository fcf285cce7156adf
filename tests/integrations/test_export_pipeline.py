"""`SanaExportPipeline` against the pipelines of diffusers whose words it takes."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SanaPipeline, SanaSprintPipeline, UniPCMultistepScheduler
from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput

from sana_export.integrations.diffusers import SanaExportPipeline, SanaExportSprintPipeline
from sana_export.runtime import SanaRuntime
from tests.integrations.conftest import Case
from tests.integrations.test_use_bundle import SMALL, assert_same, draw, some_prompt


@pytest.fixture(scope="module")
def pipe(tiny_runtime: SanaRuntime) -> SanaExportPipeline:
    made = SanaExportPipeline(tiny_runtime)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def sprint(sprint_bundle: Path) -> Any:
    made = SanaExportPipeline.from_pretrained(sprint_bundle, backend="onnxruntime", threads=1, torch_dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    yield made.to("cpu", torch.float32)
    made.close()


@pytest.mark.parametrize(("own", "theirs"), [(SanaExportPipeline, SanaPipeline), (SanaExportSprintPipeline, SanaSprintPipeline)])
def test_the_words_their_order_and_their_defaults_are_those_of_diffusers(own: type, theirs: type) -> None:
    found, wanted = (
        {name: item.default for name, item in inspect.signature(kind.__call__).parameters.items() if name != "others"}
        for kind in (own, theirs)
    )
    assert list(found) == list(wanted)
    assert found.pop("complex_human_instruction") is True, "the bundle has diffusers' text"
    assert tuple(wanted.pop("callback_on_step_end_tensor_inputs")) == found.pop("callback_on_step_end_tensor_inputs")
    del wanted["complex_human_instruction"]
    assert found == wanted


@pytest.mark.parametrize(
    "words",
    [
        {"negative_prompt": "blurry", "num_images_per_prompt": 2},
        {"guidance_scale": 1.0, "max_sequence_length": 5},
        {"use_resolution_binning": True, "height": 500, "width": 300, "num_inference_steps": 1},
        {"complex_human_instruction": None},
    ],
    ids=str,
)
def test_same_images_as_diffusers(cases: dict[str, Case], pipe: SanaExportPipeline, words: dict[str, Any]) -> None:
    prompt, theirs = some_prompt(), cases["SanaPipeline"].pipe
    assert_same(draw(pipe, prompt, **words), draw(theirs, prompt, **words), prompt)


def test_pag_control_and_start_images_are_more_words(
    cases: dict[str, Case], pipe: SanaExportPipeline, controlnet_runtime: SanaRuntime
) -> None:
    assert_same(draw(pipe, "a fox", pag_scale=3.0), draw(cases["SanaPAGPipeline"].pipe, "a fox"), "PAG")
    case = cases["SanaControlNetPipeline"]
    own = SanaExportPipeline(controlnet_runtime)
    own.set_progress_bar_config(disable=True)
    assert_same(draw(own, "a fox", **case.words), draw(case.pipe, "a fox", **case.words), "ControlNet")


def test_sprint(cases: dict[str, Case], sprint: Any, sprint_img2img_runtime: SanaRuntime) -> None:
    assert type(sprint) is SanaExportSprintPipeline
    words = {"num_inference_steps": 2, "num_images_per_prompt": 2, "guidance_scale": 6.0}
    assert_same(draw(sprint, "a fox", **words), draw(cases["SanaSprintPipeline"].pipe, "a fox", **words), "SANA-Sprint")
    words = {"num_inference_steps": 4, "intermediate_timesteps": None, "max_timesteps": 1.5}
    assert_same(draw(sprint, "a fox", **words), draw(cases["SanaSprintPipeline"].pipe, "a fox", **words), "SANA-Sprint")
    case = cases["SanaSprintImg2ImgPipeline"]
    from_image = SanaExportSprintPipeline(sprint_img2img_runtime)
    from_image.set_progress_bar_config(disable=True)
    assert_same(draw(from_image, "a fox", **case.words), draw(case.pipe, "a fox", **case.words), "img2img")


@pytest.mark.parametrize("name", ["SanaPipeline", "SanaSprintPipeline"])
def test_generators_are_used_as_diffusers_uses_them(
    cases: dict[str, Case], pipe: SanaExportPipeline, sprint: Any, name: str
) -> None:
    """One generator goes on from call to call, and a list has one for each image. Without one, PyTorch's own is drawn from."""
    own, theirs = {"SanaPipeline": pipe, "SanaSprintPipeline": sprint}[name], cases[name].pipe
    words = {**SMALL, "num_inference_steps": 2, "num_images_per_prompt": 2, "output_type": "np"}

    def images(drawing: Any) -> list[np.ndarray]:
        generator = torch.Generator().manual_seed(7)
        several = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        found = [drawing("a fox", generator=given, **words).images for given in (generator, generator, several, several)]
        torch.manual_seed(5)
        found.append(drawing("a fox", **words).images)
        return [*found, generator.get_state().numpy() / 255]

    for found, wanted in zip(images(own), images(theirs), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-3)
    first, second, *_ = images(own)
    assert np.abs(first - second).mean() > 0.01


def test_output_types(cases: dict[str, Case], pipe: SanaExportPipeline) -> None:
    for kind in ("latent", "pt", "np", "pil"):
        found, wanted = (
            drawing("a fox", generator=torch.Generator().manual_seed(1), output_type=kind, return_dict=False, **SMALL)[0]
            for drawing in (pipe, cases["SanaPipeline"].pipe)
        )
        assert type(found) is type(wanted)
        if kind == "pil":
            assert found[0].size == wanted[0].size
        else:
            assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
            np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=1e-3, atol=1e-3)
    assert isinstance(pipe("a fox", **SMALL), SanaPipelineOutput)


def test_callbacks_embeddings_and_schedulers(cases: dict[str, Case], pipe: SanaExportPipeline) -> None:
    theirs = cases["SanaPipeline"].pipe
    embeds, mask, negative, negative_mask = theirs.encode_prompt("a fox in the snow")
    given = {
        "prompt_embeds": embeds,
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": negative,
        "negative_prompt_attention_mask": negative_mask,
        "negative_prompt": None,
    }
    seen: dict[Any, list[tuple[int, float]]] = {pipe: [], theirs: []}

    def change(drawing: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen[drawing].append((index, float(t)))
        drawing._interrupt = index == 1
        return {"latents": tensors["latents"] * 1.1}

    before = theirs.scheduler
    assert type(pipe.scheduler) is type(before)
    own_config, their_config = (
        {key: value for key, value in it.items() if key[0] != "_"} for it in (pipe.scheduler.config, before.config)
    )
    assert own_config == their_config
    found, wanted = (draw(drawing, None, callback_on_step_end=change, **given) for drawing in (pipe, theirs))
    assert_same(found, wanted, "callback")
    assert seen[pipe] == seen[theirs]
    assert len(seen[pipe]) == 2
    pipe.scheduler = theirs.scheduler = UniPCMultistepScheduler.from_config(before.config)
    try:
        found, wanted = (draw(drawing, None, **given) for drawing in (pipe, theirs))
    finally:
        pipe.scheduler, theirs.scheduler = None, before
    assert_same(found, wanted, "UniPC")
    assert np.abs(draw(pipe, None, **given).astype(int) - wanted).mean() > 0.5


def test_the_progress_bar_counts_the_steps(pipe: SanaExportPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipe.set_progress_bar_config(desc="drawing")
    try:
        pipe("a fox", **{**SMALL, "num_inference_steps": 3})
    finally:
        pipe.set_progress_bar_config(disable=True)
    shown = capsys.readouterr().err
    assert "drawing: 100%" in shown
    assert "3/3" in shown


def test_tiles_and_loras(tiny_bundle: Path, tiny_checkpoint: Any, tiny_runtime: SanaRuntime, tmp_path: Path) -> None:
    from tests.support.lora_files import diffusers_lora, load_transformer

    lora = diffusers_lora(load_transformer(tiny_checkpoint), tmp_path / "style", r=4, lora_alpha=7)
    own = SanaExportPipeline.from_pretrained(tiny_bundle, backend="onnxruntime")
    own.set_progress_bar_config(disable=True)
    plain = draw(own, "a fox")
    own.enable_vae_tiling()
    assert_same(draw(own, "a fox"), plain, "tiles")
    assert "vae_decoder_tail" in own.runtime.sessions
    own.disable_vae_tiling()
    own.load_lora_weights(lora, scale=0.7)
    changed = draw(own, "a fox")
    assert np.abs(changed.astype(int) - plain).mean() > 5
    own.unload_lora_weights()
    np.testing.assert_array_equal(draw(own, "a fox"), plain)
    own.close()
