"""optimum's layout: its files and tensors, what diffusers' own pipelines draw with it, and what an export replaces."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderDC

from sana_export.checkpoint.checkpoint import open_checkpoint
from sana_export.errors import ParityError, UsageError
from sana_export.export import component_layout as module
from sana_export.export.component_layout import RECORD, component_specs, export_component, export_components
from sana_export.export.parity import psnr
from sana_export.manifest import Options
from tests.support.component_layout import OnnxComponent, Transformer, load_pipeline
from tests.support.vae import build_vae

#: Inputs and outputs of optimum-onnx 0.1.0's exports of Sana: `Gemma2TextEncoderOnnxConfig`, `SanaTransformerOnnxConfig`,
#: `DcaeEncoderOnnxConfig` and `DcaeDecoderOnnxConfig` in optimum/exporters/onnx/model_configs.py. Axes without a name are numbers.
REFERENCE: dict[str, tuple[dict[str, dict[int, str]], dict[str, dict[int, str]]]] = {
    "text_encoder": (
        {name: {0: "batch_size", 1: "sequence_length"} for name in ("input_ids", "attention_mask")},
        {"last_hidden_state": {0: "batch_size", 1: "sequence_length"}},
    ),
    "transformer": (
        {
            "hidden_states": {0: "batch_size", 2: "height", 3: "width"},
            "encoder_hidden_states": {0: "batch_size", 1: "sequence_length"},
            "encoder_attention_mask": {0: "batch_size", 1: "sequence_length"},
            "timestep": {0: "batch_size"},
        },
        {"out_hidden_states": {0: "batch_size", 2: "height", 3: "width"}},
    ),
    "vae_encoder": (
        {"sample": {0: "batch_size", 2: "height", 3: "width"}},
        {"latent_sample": {0: "batch_size", 2: "height / 32", 3: "width / 32"}},
    ),
    "vae_decoder": (
        {"latent_sample": {0: "batch_size", 2: "latent_height", 3: "latent_width"}},
        {"sample": {0: "batch_size", 2: "latent_height * 32", 3: "latent_width * 32"}},
    ),
}
CALL = {"num_inference_steps": 2, "height": 64, "width": 96, "use_resolution_binning": False, "output_type": "np"}


def pixels(images: Any) -> Any:
    return np.round(images * 255).astype(np.uint8)


def identical(found: Any, wanted: Any) -> float:
    return float((pixels(found) == pixels(wanted)).mean())


def named_axes(values: Any) -> dict[str, dict[int, str]]:
    return {value.name: {index: axis for index, axis in enumerate(value.shape) if isinstance(axis, str)} for value in values}


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that exports a component."""

    def fail(*arguments: Any) -> None:
        raise AssertionError("exported again")

    monkeypatch.setattr(module, "export_component", fail)


@pytest.fixture
def copy(component_layout: Path, tmp_path: Path) -> Path:
    return shutil.copytree(component_layout, tmp_path / "layout")


def test_files_and_tensors_have_the_names_of_optimum(component_layout: Path, tiny_checkpoint: Any) -> None:
    weights = {f"{name}/{file}" for name in REFERENCE for file in ("config.json", "model.onnx", "model.onnx_data")}
    own = {f"tokenizer/{path.name}" for path in tiny_checkpoint.folder.glob("tokenizer/*")}
    assert files_in(component_layout) == weights | own | {"model_index.json", "scheduler/scheduler_config.json", RECORD}
    for name, (inputs, outputs) in REFERENCE.items():
        session = onnxruntime.InferenceSession(component_layout / name / "model.onnx")
        assert named_axes(session.get_inputs()) == inputs
        assert named_axes(session.get_outputs()) == outputs


def test_configs_are_complete(component_layout: Path, tiny_pipeline: Any) -> None:
    """Programs that load a layout do not know the defaults of diffusers' classes."""
    for name, part in (("transformer", "transformer"), ("vae_encoder", "vae"), ("vae_decoder", "vae")):
        config = json.loads((component_layout / name / "config.json").read_text("utf-8"))
        wanted = {key: value for key, value in getattr(tiny_pipeline, part).config.items() if key != "_name_or_path"}
        assert config.keys() >= {key for key in wanted if not key.startswith("_")}
        assert config["_class_name"] == type(getattr(tiny_pipeline, part)).__name__
    text = json.loads((component_layout / "text_encoder" / "config.json").read_text("utf-8"))
    assert text["num_hidden_layers"] == tiny_pipeline.text_encoder.config.num_hidden_layers


def test_the_pipeline_of_diffusers_draws_the_same_images(component_layout: Path, tiny_pipeline: Any) -> None:
    call = {**CALL, "prompt": ["a red apple", "a house by the sea at night"], "negative_prompt": "blurry", "guidance_scale": 4.5}
    pipelines = (load_pipeline(component_layout), tiny_pipeline)
    found, wanted = (pipeline(**call, generator=torch.Generator().manual_seed(3)).images for pipeline in pipelines)
    assert type(pipelines[0]) is type(tiny_pipeline)
    assert found.shape == (2, 64, 96, 3)
    assert identical(found, wanted) >= 0.999


@pytest.mark.parametrize(("batch", "tokens", "height", "width"), [(1, 1, 1, 1), (1, 300, 2, 9), (5, 17, 8, 3)])
@torch.no_grad()
def test_axes_take_any_length(batch: int, tokens: int, height: int, width: int, component_layout: Path, tiny_pipeline: Any) -> None:
    generator = torch.Generator().manual_seed(batch)
    latents = torch.randn(batch, tiny_pipeline.transformer.config.in_channels, height, width, generator=generator)
    image = torch.rand(batch, 3, 32 * height, 32 * width, generator=generator) * 2 - 1
    ids = torch.randint(0, tiny_pipeline.text_encoder.config.vocab_size, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    hidden = tiny_pipeline.text_encoder(ids, attention_mask=mask)[0]
    step = {"encoder_hidden_states": hidden, "encoder_attention_mask": mask, "timestep": torch.linspace(1, 999, batch)}
    vae = tiny_pipeline.vae
    for name, inputs, wanted in (
        ("text_encoder", {"input_ids": ids, "attention_mask": mask}, hidden),
        ("transformer", {"hidden_states": latents, **step}, tiny_pipeline.transformer(latents, return_dict=False, **step)[0]),
        ("vae_encoder", {"sample": image}, vae.encode(image).latent),
        ("vae_decoder", {"latent_sample": latents}, vae.decode(latents).sample),
    ):
        found = OnnxComponent(component_layout / name).run(**inputs)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
def test_sprint_takes_a_guidance_that_is_already_scaled(sprint_checkpoint: Any, sprint_pipeline: Any, tmp_path: Path) -> None:
    spec = component_specs(sprint_checkpoint)["transformer"]
    assert [tensor.name for tensor in spec.inputs] == [*REFERENCE["transformer"][0], "guidance"]
    export_component("transformer", spec, sprint_checkpoint, Options("fp32", clamp=False), tmp_path / "transformer")
    other = type(sprint_pipeline)(**{**sprint_pipeline.components, "transformer": Transformer(tmp_path / "transformer")})
    other.set_progress_bar_config(disable=True)
    call = {**CALL, "prompt": "a red apple", "guidance_scale": 6.0}
    found, wanted = (each(**call, generator=torch.Generator().manual_seed(3)).images for each in (other, sprint_pipeline))
    assert identical(found, wanted) >= 0.999


@pytest.mark.slow
def test_half_precision(tiny_pipeline: Any, tmp_path: Path) -> None:
    layout = export_components(open_checkpoint("tiny-random"), tmp_path / "half", precision="fp16")
    session = onnxruntime.InferenceSession(tmp_path / "half" / "transformer" / "model.onnx")
    assert {value.type for value in (*session.get_inputs(), *session.get_outputs())} == {"tensor(float)", "tensor(int64)"}
    call = {**CALL, "prompt": "a red apple", "guidance_scale": 4.5}
    pipelines = (load_pipeline(tmp_path / "half"), tiny_pipeline)
    found, wanted = (pipeline(**call, generator=torch.Generator().manual_seed(3)).images for pipeline in pipelines)
    assert psnr(pixels(found), pixels(wanted), peak=255.0) >= 40.0
    assert layout.options.precision == "fp16"


def test_a_layout_that_is_up_to_date_is_kept(component_layout: Path, no_export: None, tiny_checkpoint: Any) -> None:
    before = (component_layout / RECORD).read_bytes()
    layout = export_components(tiny_checkpoint, component_layout, precision="fp32")
    assert {file.path for file in layout.files} | {RECORD} == files_in(component_layout)
    assert layout.bytes == sum((component_layout / file.path).stat().st_size for file in layout.files)
    assert (component_layout / RECORD).read_bytes() == before


@pytest.mark.parametrize("damage", ["a file", "the record"])
def test_a_damaged_layout_is_exported_again(damage: str, copy: Path, no_export: None, tiny_checkpoint: Any) -> None:
    (copy / {"a file": "vae_decoder/model.onnx", "the record": RECORD}[damage]).write_bytes(b"{}")
    with pytest.raises(AssertionError, match="exported again"):
        export_components(tiny_checkpoint, copy, precision="fp32")


@pytest.mark.parametrize("error", [ParityError("differs"), KeyboardInterrupt()], ids=["parity", "Ctrl-C"])
def test_a_failed_export_leaves_everything_as_it_was(
    error: BaseException, copy: Path, tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export_one(name: str, spec: Any, checkpoint: Any, options: Any, folder: Path) -> None:
        if name == "vae_decoder":
            raise error
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(b"half")

    monkeypatch.setattr(module, "export_component", export_one)
    before = {name: (copy / name).read_bytes() for name in files_in(copy)}
    for output in (copy, copy.with_name("new")):
        with pytest.raises(type(error)):
            export_components(tiny_checkpoint, output, precision="bf16")
    assert {name: (copy / name).read_bytes() for name in files_in(copy)} == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


@pytest.mark.parametrize("content", ["a checkpoint", "a bundle"])
def test_nothing_but_a_layout_is_replaced(content: str, tiny_bundle: Path, tiny_checkpoint: Any, no_export: None) -> None:
    folder = tiny_bundle if content == "a bundle" else tiny_checkpoint.folder
    before = files_in(folder)
    with pytest.raises(UsageError, match="holds something that is not an exported layout"):
        export_components(tiny_checkpoint, folder)
    assert files_in(folder) == before


def test_a_controlnet_is_refused(controlnet_checkpoint: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no place for a ControlNet"):
        export_components(controlnet_checkpoint, tmp_path / "layout")
    assert not any(tmp_path.iterdir())


def test_an_unsupported_encoder_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = {**build_vae({}).config, "encoder_layers_per_block": [1, 1, 0, 1, 1, 1]}
    AutoencoderDC.from_config(config).save_pretrained(tmp_path / "vae")
    with caplog.at_level(logging.WARNING):
        specs = component_specs(open_checkpoint("tiny-random", vae=str(tmp_path / "vae")))
    assert list(specs) == ["text_encoder", "transformer", "vae_decoder"]
    assert "no vae_encoder" in caplog.text
