"""What a bundle cannot do for diffusers' pipelines raises an error that says what to do instead, and changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import SanaPipeline
from diffusers.models.attention_processor import AttnProcessor2_0

from sana_export.errors import UsageError
from sana_export.integrations.diffusers import SanaExportPipeline, use_bundle
from sana_export.integrations.diffusers.module import REFUSED, REFUSED_BY_PIPELINES
from sana_export.integrations.diffusers.transformer import BundleTransformer
from tests.integrations.conftest import Case

SMALL: dict[str, Any] = {"height": 64, "width": 64, "use_resolution_binning": False, "num_inference_steps": 1}


@pytest.fixture(scope="module")
def pipe(cases: dict[str, Case]) -> Iterator[Any]:
    """A SanaPipeline with a bundle."""
    case = cases["SanaPipeline"]
    made = SanaPipeline(**case.pipe.components)
    made.set_progress_bar_config(disable=True)
    with use_bundle(made, case.runtime):
        yield made


@pytest.mark.parametrize("name", REFUSED)
def test_methods(pipe: Any, name: str) -> None:
    owners = [part for part in (pipe.transformer, pipe.text_encoder, pipe.vae) if hasattr(type(part).__mro__[2], name)]
    assert owners, f"no component of diffusers or transformers has {name}"
    for owner in owners:
        with pytest.raises(UsageError, match=rf"{name}\(\) has no effect") as refused:
            getattr(owner, name)()
        assert REFUSED[name] in str(refused.value)


@pytest.mark.parametrize("name", REFUSED_BY_PIPELINES)
def test_methods_of_the_pipeline(pipe: Any, name: str) -> None:
    with pytest.raises(UsageError, match=rf"{name}\(\) has no effect"):
        getattr(pipe, name)("cuda")


def hooked_part(name: str) -> Callable[[Any], None]:
    """Puts a hook into a part of a component after a call, so that the prompt is known already."""
    component, _, part = name.partition(".")

    def use(pipe: Any) -> None:
        pipe("a fox", **SMALL)
        handle = getattr(pipe, component).get_submodule(part).register_forward_hook(lambda *_: None)
        try:
            pipe("a fox", **SMALL)
        finally:
            handle.remove()

    return use


def replaced_forward(pipe: Any) -> None:
    block = pipe.transformer.transformer_blocks[1]
    block.forward = lambda *_, **__: None
    try:
        pipe("a fox", **SMALL)
    finally:
        del block.forward


def other_processor(pipe: Any) -> None:
    attention = pipe.transformer.transformer_blocks[0].attn2
    before, attention.processor = attention.processor, AttnProcessor2_0()
    try:
        pipe("a fox", **SMALL)
    finally:
        attention.processor = before


def step(pipe: Any, **words: Any) -> Any:
    given = {
        "hidden_states": torch.zeros(1, 32, 2, 2),
        "encoder_hidden_states": torch.ones(1, 3, pipe.transformer.config.caption_channels),
    }
    return pipe.transformer(**{**given, "timestep": torch.ones(1), **words})


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda pipe: step(pipe, hidden_states=torch.zeros(1, 32, 2, 2, requires_grad=True)), "a gradient has no effect"),
        (lambda pipe: step(pipe, attention_mask=torch.ones(1, 4)), "attention_mask= of transformer has no effect"),
        (lambda pipe: step(pipe, attention_kwargs={"scale": 0.5}), "attention_kwargs has no effect"),
        (lambda pipe: step(pipe, timestep=torch.tensor([1.0, 2.0])), "timestep differs within a batch"),
        (lambda pipe: step(pipe, encoder_attention_mask=torch.ones(1, 1, 3)), "encoder_attention_mask has the wrong shape"),
        (lambda pipe: step(pipe, encoder_hidden_states=torch.full((1, 3, 64), torch.nan)), "the prompt embeddings are not finite"),
        (lambda pipe: pipe.unload_lora_weights(), r"unload_lora\(\) has no effect"),
        (lambda pipe: pipe("a fox", attention_kwargs={"scale": 0.5}, **SMALL), "attention_kwargs has no effect"),
        (
            lambda pipe: pipe.transformer.set_attn_processor(AttnProcessor2_0()),
            "the attention processor AttnProcessor2_0 in block 0",
        ),
        (other_processor, "the attention processor AttnProcessor2_0 in block 0"),
        *(
            (hooked_part(name), f"a hook in {name} has no effect")
            for name in ("transformer.transformer_blocks.0", "text_encoder.layers.1", "vae.decoder.conv_in")
        ),
        (replaced_forward, r"a hook in transformer.transformer_blocks.1 has no effect"),
        (lambda pipe: setattr(pipe.vae, "_hf_hook", object()), "an offloading hook has no effect"),
        (lambda pipe: pipe.transformer.train(), r"train\(\) has no effect"),
        (lambda pipe: pipe.text_encoder.requires_grad_(), r"requires_grad_\(\) has no effect"),
        (lambda pipe: pipe.text_encoder(torch.tensor([[2]]), output_hidden_states=True), "output_hidden_states= of text_encoder"),
        (lambda pipe: pipe.text_encoder(torch.tensor([[5, 6]])), "does not start with BOS"),
        (lambda pipe: pipe.text_encoder(torch.tensor([[0, 2]]), torch.tensor([[0, 1]])), "padding on the right"),
        (lambda pipe: pipe.text_encoder.set_attn_implementation("sdpa"), r"set_attn_implementation\(\) has no effect"),
        (lambda pipe: pipe.to(torch.float16), "cannot change its precision"),
        (lambda pipe: pipe.vae.bfloat16(), "cannot change its precision"),
        (lambda pipe: pipe.transformer.half(), "cannot change its precision"),
        (lambda pipe: pipe.to("cuda"), "cannot be moved: it runs on the cpu with the backend onnxruntime"),
        (lambda pipe: pipe.vae.cuda(1), "cannot be moved"),
        (lambda pipe: copy.deepcopy(pipe.vae), "cannot be copied or handed to another process"),
        (lambda pipe: pipe.save_pretrained("never-written"), r"save_pretrained\(\) has no effect"),
    ],
)
def test_uses(pipe: Any, use: Callable[[Any], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    processors = pipe.transformer.attn_processors
    with pytest.raises(UsageError, match=message):
        use(pipe)
    assert pipe.transformer.attn_processors == processors
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_compiled_stand_in_is_refused_and_restored(cases: dict[str, Case], tiny_bundle: Path) -> None:
    case = cases["SanaPipeline"]
    pipe = SanaPipeline(**case.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    config = dict(pipe.config)
    with use_bundle(pipe, case.runtime):
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        with pytest.raises(UsageError, match=r"torch.compile\(\) has no effect"):
            pipe("a fox", **SMALL)
        use_bundle(pipe, case.runtime)  # again
        assert type(pipe.transformer) is BundleTransformer
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert pipe.transformer is case.pipe.transformer
    assert dict(pipe.config) == config


def test_neutral_uses_are_kept(pipe: Any) -> None:
    assert pipe.to("cpu") is pipe
    assert pipe.to("cpu", torch.float32).device == torch.device("cpu")
    assert pipe.dtype == torch.float32
    part = pipe.transformer
    assert part.to(torch.zeros(1)) is part.float() is part.cpu() is part.eval() is part.requires_grad_(False)
    pipe.text_encoder.set_attn_implementation("eager")
    part.set_attn_processor(part.attn_processors)
    assert part.num_parameters() > 0
    assert step(pipe, attention_kwargs={"scale": 1.0}, return_dict=False)[0].shape == (1, 32, 2, 2)


def test_a_pipeline_that_was_changed_before_is_refused(cases: dict[str, Case]) -> None:
    from peft import LoraConfig

    case = cases["SanaPipeline"]
    pipe = SanaPipeline(**{**case.pipe.components, "transformer": copy.deepcopy(case.pipe.transformer)})
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(UsageError, match="it has a LoRA") as refused:
        use_bundle(pipe, case.runtime)
    assert "pipe.unload_lora_weights()" in str(refused.value)
    pipe.transformer = case.pipe.transformer
    pipe.vae = copy.deepcopy(case.pipe.vae).to("meta")
    with pytest.raises(UsageError, match="it has no weights"):
        use_bundle(pipe, case.runtime)
    pipe.vae = case.pipe.transformer
    with pytest.raises(UsageError, match="it is a SanaTransformer2DModel"):
        use_bundle(pipe, case.runtime)


def change_nothing(*_: Any, **__: Any) -> None: ...


@pytest.mark.parametrize(
    ("component", "change", "message"),
    [
        (
            "transformer",
            lambda part: setattr(part.transformer_blocks[1].attn2, "processor", AttnProcessor2_0()),
            "AttnProcessor2_0 in block 1",
        ),
        ("transformer", lambda part: part.register_forward_hook(change_nothing), "it has a hook"),
        ("transformer", lambda part: setattr(part.proj_out, "forward", change_nothing), "proj_out has a hook"),
        ("text_encoder", lambda part: part.layers[0].register_forward_pre_hook(change_nothing), r"layers\.0 has a hook"),
        ("vae", lambda part: setattr(part, "decode", change_nothing), "it has a hook or a replaced method"),
    ],
)
def test_a_component_that_does_more_is_refused(
    cases: dict[str, Case], component: str, change: Callable[[Any], Any], message: str
) -> None:
    case = cases["SanaPipeline"]
    part = copy.deepcopy(case.pipe.components[component])
    change(part)
    pipe = SanaPipeline(**{**case.pipe.components, component: part})
    with pytest.raises(UsageError, match=rf"the place of the pipeline's {component}: .*{message}"):
        use_bundle(pipe, case.runtime)
    assert getattr(pipe, component) is part


def test_the_pipeline_of_a_bundle(cases: dict[str, Case], tiny_bundle: Path) -> None:
    pipe = SanaExportPipeline(cases["SanaPipeline"].runtime)
    for name, hint in (
        ("vae", "enable_vae_tiling"),
        ("enable_model_cpu_offload", 'memory="staged"'),
        ("encode_prompt", "pipe.runtime"),
    ):
        with pytest.raises(AttributeError, match=name) as missing:
            getattr(pipe, name)
        assert hint in str(missing.value)
    for words, message in (
        ({"clean_caption": True}, "does not take clean_caption"),
        ({"attention_kwargs": {"scale": 0.5}}, "does not take attention_kwargs"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "has tensors that a bundle does not have"),
        ({"guidence_scale": 3}, "no parameter 'guidence_scale'"),
        ({"output_type": "jpg"}, "unknown output_type"),
        ({"generator": [torch.Generator()] * 3, "num_images_per_prompt": 2}, "a list of another length"),
        ({"generator": []}, "a list of another length"),
        ({"generator": SimpleNamespace(device=torch.device("cuda:0"))}, "cannot be drawn with this generator"),
    ):
        with pytest.raises(UsageError, match=message):
            pipe("a fox", **{**SMALL, **words})
    with pytest.raises(UsageError, match="cannot change its precision") as refused:
        SanaExportPipeline.from_pretrained(tiny_bundle, backend="onnxruntime", torch_dtype=torch.bfloat16)
    assert "leave out torch_dtype=torch.bfloat16, or sana-export export" in str(refused.value)
    assert "--dtype bf16" in str(refused.value)
    with pytest.raises(UsageError, match="cannot be moved") as refused:
        pipe.to("cuda:1")
    assert f"SanaExportPipeline.from_pretrained({str(tiny_bundle)!r}, device=1)" in str(refused.value)
