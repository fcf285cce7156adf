"""diffusers' five Sana pipelines, unchanged, with a bundle behind them: the images of the same pipelines without."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, SanaPAGPipeline, SanaPipeline, UniPCMultistepScheduler

from sana_export.commands import export_command
from sana_export.errors import ArtifactError, UsageError
from sana_export.integrations.diffusers import SanaExportPipeline, restore, use_bundle
from sana_export.integrations.diffusers.belonging import ComponentPair, check_controlnet
from sana_export.integrations.diffusers.tensors import TorchExchange
from sana_export.manifest import Manifest
from sana_export.runtime import SanaRuntime
from tests.integrations.conftest import Case

WORDS = ("red", "a fox", "oil painting", "mountains", "with snow", "🐼", "very", "tall", "house", "of glass", "in ink", "café")
SMALL: dict[str, Any] = {"height": 96, "width": 160, "use_resolution_binning": False, "num_inference_steps": 3}
NAMES = ("SanaPipeline", "SanaPAGPipeline", "SanaSprintPipeline", "SanaSprintImg2ImgPipeline", "SanaControlNetPipeline")
#: Share of values that have to be identical.
IDENTICAL = 0.999


def some_prompt() -> str:
    return " ".join(np.random.default_rng().choice(WORDS, 7))


def draw(pipe: Any, prompt: Any, seed: int = 3, **words: Any) -> np.ndarray:
    generator = torch.Generator("cpu").manual_seed(seed)
    return np.stack([np.asarray(image) for image in pipe(prompt, generator=generator, **{**SMALL, **words}).images])


def assert_same(found: np.ndarray, wanted: np.ndarray, what: object) -> None:
    assert wanted.std() > 20, "the reference is not a flat image"
    difference = np.abs(found.astype(int) - wanted)
    assert (difference == 0).mean() >= IDENTICAL, what
    assert difference.max() <= 1, what


@pytest.mark.parametrize("name", NAMES)
def test_same_image_and_the_same_pipeline_again_after_restore(cases: dict[str, Case], name: str) -> None:
    case, prompt, seed = cases[name], some_prompt(), int(np.random.default_rng().integers(1000))
    before = dict(case.pipe.components)
    config = dict(case.pipe.config)
    wanted = draw(case.pipe, prompt, seed, **case.words)
    with use_bundle(case.pipe, case.runtime):
        assert case.pipe.transformer is not before["transformer"]
        assert dict(case.pipe.config) == config
        assert_same(draw(case.pipe, prompt, seed, **case.words), wanted, (prompt, seed))
    assert dict(case.pipe.components) == before
    assert dict(case.pipe.config) == config
    assert not {"enable_model_cpu_offload", "enable_sequential_cpu_offload"} & vars(case.pipe).keys()
    np.testing.assert_array_equal(draw(case.pipe, prompt, seed, **case.words), wanted)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SanaPipeline", {"guidance_scale": 1.0}),
        ("SanaPipeline", {"negative_prompt": "blurry, dark", "num_images_per_prompt": 2}),
        ("SanaPipeline", {"complex_human_instruction": None}),
        ("SanaPipeline", {"complex_human_instruction": ["Given a user prompt, draw it in other words.", "Prompt: "]}),
        ("SanaPipeline", {"max_sequence_length": 5}),
        ("SanaPipeline", {"use_resolution_binning": True, "height": 500, "width": 300, "num_inference_steps": 1}),
        ("SanaPAGPipeline", {"guidance_scale": 1.0, "pag_scale": 2.0}),
        ("SanaPAGPipeline", {"pag_scale": 0.0}),
        ("SanaPAGPipeline", {"pag_adaptive_scale": 0.01, "num_images_per_prompt": 2}),
        ("SanaSprintPipeline", {"num_images_per_prompt": 2, "guidance_scale": 7.0}),
        ("SanaControlNetPipeline", {"guidance_scale": 1.0, "controlnet_conditioning_scale": 0.4}),
    ],
    ids=str,
)
def test_words_of_a_call(cases: dict[str, Case], name: str, words: dict[str, Any]) -> None:
    case, prompt = cases[name], some_prompt()
    wanted = draw(case.pipe, prompt, **{**case.words, **words})
    with use_bundle(case.pipe, case.runtime):
        assert_same(draw(case.pipe, prompt, **{**case.words, **words}), wanted, prompt)


def test_another_backend_and_precisions(cases: dict[str, Case], tiny_bundle: Path) -> None:
    """Graphs in PyTorch exchange its own tensors. A pipeline in bfloat16 has the bundle's weights, but for rounding."""
    case, prompt = cases["SanaPipeline"], some_prompt()
    wanted = draw(case.pipe, prompt)
    parts = {
        name: copy.deepcopy(part).bfloat16() for name, part in case.pipe.components.items() if isinstance(part, torch.nn.Module)
    }
    rounded = SanaPipeline(**{**case.pipe.components, **parts})
    rounded.set_progress_bar_config(disable=True)
    with use_bundle(rounded, tiny_bundle, "torch", threads=1) as use:
        assert type(rounded.vae.exchange) is TorchExchange
        assert use.runtime.backend.name == "torch"
        assert_same(draw(rounded, prompt), wanted, prompt)
    assert rounded.dtype == torch.bfloat16


def test_several_prompts(cases: dict[str, Case]) -> None:
    case, prompts = cases["SanaPipeline"], ["a fox", some_prompt() + " and " + some_prompt()]
    wanted = draw(case.pipe, prompts, negative_prompt="blurry")
    with use_bundle(case.pipe, case.runtime):
        assert_same(draw(case.pipe, prompts, negative_prompt="blurry"), wanted, prompts)


def test_several_prompts_with_several_images_get_their_own_masks(cases: dict[str, Case]) -> None:
    """diffusers repeats masks in another order than embeddings. With a bundle, each prompt has its own."""
    case, prompts = cases["SanaPipeline"], ["a fox", some_prompt() + " and " + some_prompt()]
    latents = torch.randn(4, 32, 3, 5, generator=torch.Generator().manual_seed(1))
    wanted = np.concatenate(
        [
            draw(case.pipe, prompt, latents=own, num_images_per_prompt=2)
            for prompt, own in zip(prompts, latents.split(2), strict=True)
        ]
    )
    with use_bundle(case.pipe, case.runtime):
        assert_same(draw(case.pipe, prompts, latents=latents, num_images_per_prompt=2), wanted, prompts)


def test_embeddings_callbacks_and_schedulers_of_the_caller(cases: dict[str, Case]) -> None:
    case, prompt = cases["SanaPipeline"], some_prompt()
    own = case.pipe.scheduler
    embeds, mask, negative, negative_mask = case.pipe.encode_prompt(prompt)
    given = {
        "prompt_embeds": embeds,
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": negative,
        "negative_prompt_attention_mask": negative_mask,
        "negative_prompt": None,
    }

    def change(pipe: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        tensors["prompt_embeds"][1] *= 0.9  # in place
        return {"latents": tensors["latents"] * 1.1}

    words = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    try:
        for kind in (UniPCMultistepScheduler, DPMSolverMultistepScheduler):
            case.pipe.scheduler = kind.from_config(own.config)
            wanted = draw(case.pipe, None, **given, **words)
            assert np.abs(wanted.astype(int) - draw(case.pipe, None, **given)).mean() > 1
            with use_bundle(case.pipe, case.runtime):
                assert_same(draw(case.pipe, None, **given, **words), wanted, kind)
    finally:
        case.pipe.scheduler = own


def test_latents_and_tensors(cases: dict[str, Case]) -> None:
    case = cases["SanaPipeline"]
    wanted = [
        case.pipe("a fox", generator=torch.Generator().manual_seed(1), output_type=kind, **SMALL).images
        for kind in ("latent", "pt")
    ]
    with use_bundle(case.pipe, case.runtime):
        for kind, reference in zip(("latent", "pt"), wanted, strict=True):
            found = case.pipe("a fox", generator=torch.Generator().manual_seed(1), output_type=kind, **SMALL).images
            assert isinstance(found, torch.Tensor)
            torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-4)


def test_tiles_give_the_image_of_one_piece(cases: dict[str, Case], controlnet_runtime: SanaRuntime) -> None:
    case = cases["SanaPipeline"]
    graphs: list[str] = []
    wanted = draw(case.pipe, "a fox")
    with use_bundle(case.pipe, controlnet_runtime) as use:
        image = torch.rand(1, 3, 96, 160) * 2 - 1
        whole = case.pipe.vae.encode(image).latent
        case.pipe.vae.enable_tiling(32, 32)
        graphs.append("vae_decoder_tail" in use.runtime.sessions)
        use.runtime.sessions.pop("vae_decoder_tail", None)
        assert_same(draw(case.pipe, "a fox"), wanted, "tiles")
        assert "vae_decoder_tail" in use.runtime.sessions
        torch.testing.assert_close(case.pipe.vae.encode(image, return_dict=False)[0], whole, rtol=1e-4, atol=1e-4)
        assert "vae_encoder_tail" in use.runtime.sessions
    encoded = case.pipe.vae.encode(image).latent
    torch.testing.assert_close(whole, encoded, rtol=1e-3, atol=1e-4)


def test_the_context_runs_once_per_prompt(cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch) -> None:
    case, runs = cases["SanaControlNetPipeline"], []
    run = SanaRuntime.run
    monkeypatch.setattr(SanaRuntime, "run", lambda self, graph, feeds: (runs.append(graph), run(self, graph, feeds))[1])
    with use_bundle(case.pipe, case.runtime):
        for prompt in ("a fox", "a house"):
            runs.clear()
            draw(case.pipe, prompt, **case.words)
            counts = {graph: runs.count(graph) for graph in runs}
            assert counts == {
                "text_encoder": 1,  # the empty negative prompt needs none
                "vae_encoder": 1,  # the pipeline passes its control image twice
                "controlnet_context": 1,
                "context": 1,
                "controlnet": 3,
                "denoiser": 3,
            }


def test_loras_on_the_runtime(cases: dict[str, Case], tiny_bundle: Path, tiny_checkpoint: Any, tmp_path: Path) -> None:
    from tests.support.lora_files import diffusers_lora, load_transformer

    pipe = SanaPipeline(**cases["SanaPipeline"].pipe.components)
    pipe.set_progress_bar_config(disable=True)
    lora = diffusers_lora(load_transformer(tiny_checkpoint), tmp_path / "style", r=4, lora_alpha=7)
    plain = draw(pipe, "a fox")
    with use_bundle(pipe, tiny_bundle, "onnxruntime") as use:
        with pytest.raises(UsageError, match="load_lora_adapter") as refused:
            pipe.load_lora_weights(lora)
        assert "use.runtime.load_lora(path, scale)" in str(refused.value)
        assert_same(draw(pipe, "a fox"), plain, "no LoRA")
        use.runtime.load_lora(lora, 0.8)
        found = draw(pipe, "a fox")  # the same prompt: its context is made again
    assert np.abs(found.astype(int) - plain).mean() > 5
    with SanaRuntime.from_pretrained(tiny_bundle, backend="onnxruntime") as runtime:
        runtime.load_lora(lora, 0.8)
        own = runtime("a fox", seed=3, **SMALL).images
    assert_same(found, np.stack([np.asarray(image) for image in own]), "LoRA")
    with pytest.raises(UsageError, match="is closed"):
        use.runtime("a fox")


def test_a_quantized_controlnet(quantized_bundle: Path, tiny_pipeline: Any) -> None:
    """Its self-attentions are stored as the transformer's are, so the transformer's stand for them here."""
    manifest = Manifest.load(quantized_bundle)
    stored = replace(manifest, graphs={"controlnet": manifest.graphs["denoiser"]})
    runtime: Any = SimpleNamespace(bundle=quantized_bundle, manifest=stored)
    module = copy.deepcopy(tiny_pipeline.transformer)
    pair = ComponentPair("controlnet", module, tiny_pipeline, runtime)
    check_controlnet(pair)
    module.transformer_blocks[1].attn1.to_v.weight.data *= 1.25
    with pytest.raises(ArtifactError, match="different block 1"):
        check_controlnet(pair)


def test_a_lora_that_was_replaced_on_the_disk(
    cases: dict[str, Case], tiny_bundle: Path, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    """Another LoRA of the same path and scale: the context of the same prompt is made again."""
    from tests.support.lora_files import diffusers_lora, load_transformer

    pipe = SanaPipeline(**cases["SanaPipeline"].pipe.components)
    pipe.set_progress_bar_config(disable=True)
    first, second = (
        diffusers_lora(load_transformer(tiny_checkpoint), tmp_path / str(seed), seed=seed, r=4, lora_alpha=7) for seed in (1, 2)
    )
    file = "pytorch_lora_weights.safetensors"
    with use_bundle(pipe, tiny_bundle, "onnxruntime") as use:
        use.runtime.load_lora(second)
        wanted = draw(pipe, "a fox")
        use.runtime.unload_lora()
        use.runtime.load_lora(first)
        other = draw(pipe, "a fox")
        use.runtime.unload_lora()
        shutil.copy(second / file, first / file)
        use.runtime.load_lora(first)
        np.testing.assert_array_equal(draw(pipe, "a fox"), wanted)
    assert np.abs(other.astype(int) - wanted).mean() > 0.5


def test_a_second_use_of_the_same_runtime(cases: dict[str, Case], tiny_bundle: Path) -> None:
    """The runtime that the first use opened stays open, and is closed with the second."""
    case = cases["SanaPipeline"]
    wanted = draw(case.pipe, "a fox")
    first = use_bundle(case.pipe, tiny_bundle, "onnxruntime")
    with use_bundle(case.pipe, first.runtime) as second:
        assert second.runtime is first.runtime
        assert_same(draw(case.pipe, "a fox"), wanted, "the same runtime")
    with pytest.raises(UsageError, match="is closed"):
        second.runtime("a fox")


def test_tiling_that_was_enabled_before(cases: dict[str, Case], controlnet_runtime: SanaRuntime) -> None:
    case = cases["SanaPipeline"]
    vae = copy.deepcopy(case.pipe.vae)
    vae.enable_tiling(64, 32, 48, 16)
    pipe = SanaPipeline(**{**case.pipe.components, "vae": vae})
    with use_bundle(pipe, controlnet_runtime):
        assert pipe.vae is not vae
        names = [name for name in vars(vae) if name.startswith("tile_") or name == "use_tiling"]
        assert {name: getattr(pipe.vae, name) for name in names} == {name: getattr(vae, name) for name in names}


def test_pag_processors_that_were_set_before(cases: dict[str, Case]) -> None:
    """The stand-in has the processors of the transformer, as after an interrupted call of SanaPAGPipeline."""
    case = cases["SanaPAGPipeline"]
    before = case.pipe.transformer.attn_processors
    case.pipe._set_pag_attn_processor(case.pipe.pag_applied_layers, True)
    try:
        with use_bundle(case.pipe, case.runtime):
            assert case.pipe.transformer.perturbed() == (0.0, 0.0, 1.0)
    finally:
        case.pipe.transformer.set_attn_processor(before)


def test_a_second_bundle_replaces_the_first_and_pipelines_share_stand_ins(cases: dict[str, Case], tiny_bundle: Path) -> None:
    case = cases["SanaPipeline"]
    own = case.pipe.transformer
    first = use_bundle(case.pipe, tiny_bundle, "onnxruntime")
    second = use_bundle(case.pipe, case.runtime)
    assert first.runtime.bundle == second.runtime.bundle
    with pytest.raises(UsageError, match="is closed"):
        first.runtime.preview(np.zeros((1, 32, 2, 2), np.float32))
    assert case.pipe.transformer.original is own
    shared = SanaPAGPipeline(**case.pipe.components, pag_applied_layers=r"transformer_blocks\.1\.attn1$")
    shared.set_progress_bar_config(disable=True)
    found = draw(shared, "a fox")
    restore(case.pipe)
    restore(case.pipe)  # nothing more to do
    assert case.pipe.transformer is own
    assert_same(found, draw(cases["SanaPAGPipeline"].pipe, "a fox"), "PAG")


def test_a_quantized_bundle(cases: dict[str, Case], quantized_bundle: Path, tiny_pipeline: Any) -> None:
    """Its weights may differ by half a step of their scales, and no more."""
    prompt, layer = some_prompt(), tiny_pipeline.transformer.transformer_blocks[2].attn1.to_k
    wanted = draw(cases["SanaPipeline"].pipe, prompt)
    with SanaRuntime.from_pretrained(quantized_bundle, backend="onnxruntime", threads=1) as runtime:
        with use_bundle(tiny_pipeline, runtime):
            found = draw(tiny_pipeline, prompt)
        own = SanaExportPipeline(runtime)
        own.set_progress_bar_config(disable=True)
        alone = draw(own, prompt)
        kept = layer.weight.detach().clone()
        layer.weight.data *= 1.25
        try:
            with pytest.raises(ArtifactError, match=r"different transformer_blocks\.2\.attn1\.to_k") as refused:
                use_bundle(tiny_pipeline, runtime)
        finally:
            layer.weight.data.copy_(kept)
    assert_same(found, alone, prompt)
    assert np.abs(found.astype(int) - wanted).mean() > 0.5
    assert f"sana-export export {tiny_pipeline.name_or_path}" in str(refused.value)


@pytest.mark.parametrize("change", ["transformer", "text_encoder", "queries", "vae", "scaling", "controlnet", "sprint"])
def test_another_checkpoint_is_refused(cases: dict[str, Case], change: str) -> None:
    case = cases["SanaControlNetPipeline"]
    pipe = diffusers.SanaControlNetPipeline(**case.pipe.components)
    runtime = case.runtime
    before = dict(pipe.components)

    parameters = {
        "transformer": pipe.transformer.transformer_blocks[2].ff.conv_point.weight,
        "text_encoder": pipe.text_encoder.layers[-1].mlp.down_proj.weight,
        "queries": pipe.text_encoder.layers[-1].self_attn.q_proj.weight,
        "vae": pipe.vae.decoder.conv_out.weight,
        "controlnet": pipe.controlnet.transformer_blocks[1].attn1.to_k.weight,
    }
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    scaling = pipe.vae.config.scaling_factor
    if change == "scaling":
        pipe.vae.register_to_config(scaling_factor=scaling * 1.5)
    elif change == "sprint":
        pipe = cases["SanaSprintPipeline"].pipe
        before = dict(pipe.components)
    else:
        parameters[change].data[::2] *= 1.1  # not all: a norm would undo it
    try:
        with pytest.raises(ArtifactError, match="come from different checkpoints") as refused:
            use_bundle(pipe, runtime)
    finally:
        case.pipe.vae.register_to_config(scaling_factor=scaling)
        for name, parameter in parameters.items():
            parameter.data.copy_(kept[name])
    assert dict(pipe.components) == before
    component = {"scaling": "vae", "sprint": "transformer", "queries": "text_encoder"}.get(change, change)
    assert f"the pipeline's {component} come" in str(refused.value)
    assert "tiny-random" in str(refused.value)


def test_a_bundle_without_what_the_pipeline_needs_is_refused(
    cases: dict[str, Case], tiny_runtime: SanaRuntime, tiny_bundle: Path
) -> None:
    manifest = Manifest.load(tiny_bundle)
    with pytest.raises(ArtifactError, match="without a ControlNet") as refused:
        use_bundle(cases["SanaControlNetPipeline"].pipe, tiny_runtime)
    assert "--controlnet tiny-random-controlnet --" in str(refused.value)
    with pytest.raises(ArtifactError, match="without the graphs of image-to-image"):
        use_bundle(cases["SanaSprintImg2ImgPipeline"].pipe, cases["SanaSprintPipeline"].runtime)
    other = SanaPAGPipeline(**cases["SanaPipeline"].pipe.components, pag_applied_layers=["blocks.0", "blocks.2"])
    with pytest.raises(ArtifactError, match="other PAG layers") as refused:
        use_bundle(other, tiny_runtime)
    assert export_command(tiny_bundle, manifest, pag_layers=(0, 2)) in str(refused.value)
    with use_bundle(cases["SanaPAGPipeline"].pipe, tiny_runtime):
        pipe = cases["SanaPAGPipeline"].pipe
        before = pipe.pag_applied_layers
        pipe.pag_applied_layers = ["blocks.2"]
        with pytest.raises(ArtifactError, match="other PAG layers"):
            draw(pipe, "a fox")
        pipe.pag_applied_layers = before  # what the error says works: no processor is left behind
        draw(pipe, "a fox")
        with pytest.raises(ArtifactError, match="without the graphs of image-to-image"):
            pipe.vae.encode(torch.zeros(1, 3, 64, 64))
        prompt = torch.ones(1, 3, pipe.transformer.config.caption_channels)
        with pytest.raises(ArtifactError, match="without a ControlNet"):
            pipe.transformer(torch.zeros(1, 32, 2, 2), prompt, torch.ones(1), controlnet_block_samples=[torch.zeros(1, 4, 4)])


def test_an_unknown_object_and_a_missing_bundle_are_refused(cases: dict[str, Case], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one of SanaPipeline"):
        use_bundle(object(), tmp_path)
    with pytest.raises(ArtifactError, match="is not a bundle"):
        use_bundle(cases["SanaPipeline"].pipe, tmp_path)
    restore(object())
