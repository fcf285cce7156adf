"""The nodes for ComfyUI: images equal to the runtime's, progress, interrupt, memory, errors. On a stand-in, or a real ComfyUI.

With $SANA_EXPORT_COMFYUI, the folder of a ComfyUI whose requirements are installed, its own engine runs the same tests
(`make test-comfyui`).
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sana_export.errors import UsageError
from sana_export.integrations.comfyui import __file__ as package
from sana_export.integrations.comfyui.__main__ import install, main
from sana_export.resolutions import BINS
from sana_export.runtime import Request, SanaRuntime
from tests.support.comfyui.real import RealEngine
from tests.support.comfyui.run import Workflow
from tests.support.comfyui.stand_in import StandIn, installed

PACK = Path(package).parent / "pack"
WORKFLOWS = sorted(path.stem for path in (PACK / "api_workflows").iterdir())
#: What the tests draw, in the words of a request.
DRAWN: dict[str, Any] = {
    "height": 64,
    "width": 96,
    "num_inference_steps": 3,
    "guidance_scale": 4.5,
    "seed": 5,
    "use_resolution_binning": False,
}


@pytest.fixture(scope="module")
def bundle(request: pytest.FixtureRequest, build_cache: Path) -> Path:
    """The bundle of `tiny-random` with all graphs. In ComfyUI's Python, which need not have diffusers, it was exported before."""
    exported = build_cache / "tiny-fp32-img2img-controlnet"
    return exported if exported.is_dir() else request.getfixturevalue("controlnet_bundle")


@pytest.fixture(scope="module")
def engine(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    root = tmp_path_factory.mktemp("comfyui")
    (root / "models/sana").mkdir(parents=True)
    (root / "models/sana/tiny").symlink_to(bundle)
    (root / "input").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 120, 3), np.uint8)).save(root / "input/example.png")
    ours = "sana_export.integrations.comfyui."
    if checkout := os.environ.get("SANA_EXPORT_COMFYUI"):
        yield RealEngine(Path(checkout), root, PACK)
        return
    stand_in = StandIn(root)
    with installed(stand_in):
        from sana_export.integrations.comfyui import nodes

        stand_in.nodes |= nodes.NODE_CLASS_MAPPINGS
        yield stand_in
        stand_in.unload_models()
    for name in [name for name in sys.modules if name.startswith(ours)]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def runtime(bundle: Path) -> Iterator[SanaRuntime]:
    with SanaRuntime.from_pretrained(bundle, backend="onnxruntime") as opened:
        yield opened


def workflow(name: str = "text_to_image", kind: str = "SanaExportSampler", **inputs: Any) -> Workflow:
    """An example with a small size and few steps, and with these inputs of its node of this kind."""
    nodes: Workflow = json.loads((PACK / "api_workflows" / f"{name}.json").read_text())
    words = {"height": DRAWN["height"], "width": DRAWN["width"], "steps": DRAWN["num_inference_steps"], "seed": DRAWN["seed"]}
    nodes[node_of(nodes, "SanaExportSampler")]["inputs"] |= words | {"resolution_binning": False}
    nodes[node_of(nodes, kind)]["inputs"] |= inputs
    return nodes


def node_of(nodes: Workflow, kind: str) -> str:
    return next(name for name, node in nodes.items() if node["class_type"] == kind)


def expected(runtime: SanaRuntime, **words: Any) -> list[Any]:
    return [np.asarray(image) for image in runtime("a cute panda", **DRAWN | words).images]


def equal(found: list[Any], wanted: list[Any]) -> bool:
    return len(found) == len(wanted) > 0 and all(np.array_equal(*images) for images in zip(found, wanted, strict=True))


def test_the_example_draws_the_runtimes_image_with_progress_and_previews(engine: Any, runtime: SanaRuntime) -> None:
    engine.show_previews(True)
    run = engine.run(workflow())
    engine.show_previews(False)
    assert run.status == "success", run.message
    assert equal(run.images, expected(runtime))
    assert run.progress == [("2", 1, 3), ("2", 2, 3), ("2", 3, 3), ("3", 1, 1)]
    small: list[Any] = []
    runtime("a cute panda", **DRAWN, callback_on_step_end=lambda drawing, *_: small.append(np.asarray(drawing.preview()[0])))
    assert equal([np.asarray(image) for _, image, _ in run.previews], small)
    assert [(kind, side) for kind, _, side in run.previews] == [("JPEG", 512)] * 3


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"negative": "blue", "batch_size": 2}, {"negative_prompt": "blue", "num_images_per_prompt": 2}),
        ({"pag_scale": 2.0, "guidance_scale": 1.0}, {"pag_scale": 2.0, "guidance_scale": 1.0}),
        ({"scheduler": "unipc", "steps": 4}, {"scheduler": "unipc", "num_inference_steps": 4}),
        ({"seed": 2**64 - 1}, {"seed": 2**64 - 1}),
    ],
)
def test_every_widget_means_its_word_of_a_call(
    engine: Any, runtime: SanaRuntime, inputs: dict[str, Any], words: dict[str, Any]
) -> None:
    run = engine.run(workflow(**inputs))
    assert run.status == "success", run.message
    assert equal(run.images, expected(runtime, **words))
    assert run.previews == []


def test_a_node_runs_again_only_if_what_it_depends_on_changes(engine: Any) -> None:
    engine.run(workflow(seed=20))
    assert engine.run(workflow(seed=20)).executed == []
    assert engine.run(workflow(seed=21)).executed == ["2", "3", "4"]


def test_a_bundle_that_is_exported_again_is_loaded_again(engine: Any, bundle: Path) -> None:
    copied = shutil.copytree(bundle, engine.root / "models/sana/copied")
    nodes = workflow(seed=22)
    nodes["1"]["inputs"]["bundle"] = "copied"
    engine.run(nodes)
    os.utime(copied / "manifest.json", ns=(1, 1))
    assert engine.run(nodes).executed == ["1", "2", "3", "4"]
    shutil.rmtree(copied)


def test_an_image_and_a_mask(engine: Any, runtime: SanaRuntime) -> None:
    nodes = workflow("inpaint")
    run = engine.run(nodes)
    assert run.status == "success", run.message
    mask = np.zeros((128, 128), np.uint8)
    mask[:, :64] = 255  # the example's
    image = engine.root / "input/example.png"
    assert equal(run.images, expected(runtime, image=image, mask=Image.fromarray(mask), strength=0.9))
    del nodes["6"]["inputs"]["mask"]
    assert equal(engine.run(nodes).images, expected(runtime, image=image, strength=0.9))


def test_each_image_of_a_batch_is_started_from(engine: Any, runtime: SanaRuntime) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2, 64, 96, 3), np.uint8)
    batch = torch.from_numpy(pixels.astype(np.float32) / 255)
    sampler, decoder = (engine.nodes[f"SanaExport{kind}"]() for kind in ("Sampler", "Decode"))
    (loaded,) = engine.nodes["SanaExportBundle"]().load("tiny", "onnxruntime", "auto")
    words = workflow(scheduler="checkpoint")["2"]["inputs"] | {"bundle": loaded, "image": batch}
    (latent,) = sampler.sample(**words)
    wanted = runtime("a cute panda", **DRAWN, image=list(pixels), num_images_per_prompt=2, output_type="latent").images
    assert latent["samples"].dtype == torch.float32
    assert np.array_equal(latent["samples"].numpy(), wanted)
    (image,) = decoder.decode(loaded, latent)
    wanted = expected(runtime, image=list(pixels), num_images_per_prompt=2)
    assert image.shape == (2, 64, 96, 3)
    assert equal(list(np.round(image.numpy() * 255).astype(np.uint8)), wanted)


def test_a_control_image(engine: Any, runtime: SanaRuntime) -> None:
    nodes = workflow("inpaint", control_scale=0.5, control_image=["2", 0])
    for name in ("image", "mask"):
        del nodes["6"]["inputs"][name]
    run = engine.run(nodes)
    assert run.status == "success", run.message
    control = engine.root / "input/example.png"
    assert equal(run.images, expected(runtime, control_image=control, controlnet_conditioning_scale=0.5))


def lora_file(engine: Any, name: str, seed: int) -> Path:
    torch.manual_seed(seed)
    path: Path = engine.root / "models/loras" / name
    layer = "transformer.transformer_blocks.0.attn1.to_q"
    save_file({f"{layer}.lora_{name}.weight": 0.3 * torch.randn(shape) for name, shape in (("A", (4, 128)), ("B", (128, 4)))}, path)
    return path


def test_loras_are_loaded_on_top_of_each_other_and_again_if_saved_again(engine: Any, runtime: SanaRuntime) -> None:
    first, second = lora_file(engine, "style.safetensors", 1), lora_file(engine, "other.safetensors", 2)
    nodes = workflow("lora")
    plain, one = expected(runtime), drawn_with(runtime, (first, 0.8))
    assert not equal(plain, one)
    run = engine.run(nodes)
    assert run.status == "success", run.message
    assert equal(run.images, one)
    nodes |= {"9": {"class_type": "SanaExportLora", "inputs": {"bundle": ["2", 0], "lora": second.name, "strength": -0.5}}}
    nodes["3"]["inputs"]["bundle"] = ["9", 0]
    assert equal(engine.run(nodes).images, drawn_with(runtime, (first, 0.8), (second, -0.5)))
    lora_file(engine, first.name, 3)
    os.utime(first, ns=(1, 1))
    assert equal(engine.run(nodes).images, drawn_with(runtime, (first, 0.8), (second, -0.5)))
    nodes["2"]["inputs"]["strength"] = nodes["9"]["inputs"]["strength"] = 0.0
    assert equal(engine.run(nodes).images, plain)


def drawn_with(runtime: SanaRuntime, *loras: tuple[Path, float], **words: Any) -> list[Any]:
    for path, scale in loras:
        runtime.load_lora(path, scale)
    try:
        return expected(runtime, **words)
    finally:
        runtime.unload_lora()


def test_a_bad_lora_is_an_error_of_the_sampler_and_changes_nothing(engine: Any, runtime: SanaRuntime) -> None:
    good, bad = lora_file(engine, "style.safetensors", 1), engine.root / "models/loras/bad.safetensors"
    bad.write_bytes(b"not safetensors")
    nodes = workflow("lora", seed=30)
    nodes |= {"9": {"class_type": "SanaExportLora", "inputs": {"bundle": ["2", 0], "lora": bad.name, "strength": 1.0}}}
    nodes["3"]["inputs"]["bundle"] = ["9", 0]
    run = engine.run(nodes)
    assert (run.status, run.node) == ("error", "3")
    assert str(bad) in run.message
    del nodes["9"]
    nodes["3"]["inputs"]["bundle"] = nodes["4"]["inputs"]["bundle"] = ["1", 0]
    assert equal(engine.run(nodes).images, expected(runtime, seed=30))
    nodes["3"]["inputs"]["bundle"] = ["2", 0]
    assert equal(engine.run(nodes).images, drawn_with(runtime, (good, 0.8), seed=30))


def test_an_interrupted_run_stops_after_the_step_and_the_next_one_draws(engine: Any, runtime: SanaRuntime) -> None:
    run = engine.run(workflow(steps=500, seed=40), interrupt_at=("2", 2))
    assert (run.status, run.node) == ("interrupted", "2")
    assert run.progress == [("2", 1, 500), ("2", 2, 500)]
    assert equal(engine.run(workflow(seed=40)).images, expected(runtime, seed=40))


def test_a_run_that_is_interrupted_before_the_first_step_takes_none(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (loaded,) = engine.nodes["SanaExportBundle"]().load("tiny", "onnxruntime", "auto")
    steps: list[int] = []
    bar = SimpleNamespace(update_absolute=lambda value, *_: steps.append(value))
    monkeypatch.setattr("comfy.utils.ProgressBar", lambda total: bar)
    engine.interrupt()
    with pytest.raises(Exception, match=r"^$") as raised:
        engine.nodes["SanaExportSampler"]().sample(**workflow()["2"]["inputs"] | {"bundle": loaded})
    assert (raised.typename, steps) == ("InterruptProcessingException", [])


def test_decoding_is_interrupted_between_images(engine: Any) -> None:
    run = engine.run(workflow(batch_size=3, seed=41), interrupt_at=("3", 1))
    assert (run.status, run.node, run.progress[-1]) == ("interrupted", "3", ("3", 1, 3))


def test_comfyui_unloads_the_bundle_and_it_is_loaded_again(engine: Any, runtime: SanaRuntime) -> None:
    (loaded,) = engine.nodes["SanaExportBundle"]().load("tiny", "onnxruntime", "auto")
    before = loaded.open()
    assert loaded.model.loaded_size() == loaded.model.model_size() > 1_000_000
    engine.unload_models()
    assert loaded.model.loaded_size() == 0
    with pytest.raises(UsageError, match="is closed"):
        before("a cute panda", **DRAWN)
    again = loaded.open()
    assert again is loaded.open()  # a second node finds it loaded
    assert equal([np.asarray(image) for image in again("a cute panda", **DRAWN).images], expected(runtime))
    run = engine.run(workflow(seed=50))  # the runs' own bundle was unloaded too
    assert equal(run.images, expected(runtime, seed=50))


@pytest.mark.parametrize("computes_on", ["cpu", "cuda"])
def test_a_bundle_takes_part_in_the_memory_of_the_device_that_it_computes_on(
    engine: Any, computes_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ComfyUI is on a GPU. Its own model has to go, or is safe, and the bundle too when the next model comes."""
    if engine.real:
        pytest.skip("needs a GPU")
    import comfy.model_patcher

    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(engine, "device", gpu)
    if computes_on == "cuda":  # it says so, and runs here
        monkeypatch.setattr("sana_export.integrations.comfyui.bundle.open_backend", lambda *_: SimpleNamespace(device="cuda"))
    other = comfy.model_patcher.ModelPatcher(torch.nn.Identity(), gpu, cpu)
    engine.loaded.append(other)
    (loaded,) = engine.nodes["SanaExportBundle"]().load("tiny", "onnxruntime", "auto")
    runtime = loaded.open()
    assert (other in engine.loaded) == (computes_on == "cpu")
    engine.free_memory(gpu)
    assert other not in engine.loaded
    assert (loaded.model.loaded_size() > 0) == (computes_on == "cpu")
    assert (loaded.open() is runtime) == (computes_on == "cpu")
    engine.free_memory(gpu)


def test_an_unknown_bundle_is_refused_before_the_run(engine: Any, tmp_path: Path) -> None:
    sana = engine.root / "models/sana"
    run = engine.run(workflow(kind="SanaExportBundle", bundle="sana-600m-512px"))
    assert (run.status, run.node) == ("refused", "1")
    assert "wanted: a bundle's folder, or a name: tiny" in run.message
    assert f"fix:    sana-export export sana-600m-512px -o {sana / 'sana-600m-512px'}" in run.message
    run = engine.run(workflow(kind="SanaExportBundle", bundle=str(tmp_path)))
    assert (run.status, run.node) == ("refused", "1")
    assert f"{tmp_path} is not a bundle" in run.message


@pytest.mark.parametrize(
    ("kind", "inputs", "node", "message"),
    [
        ("SanaExportBundle", {"backend": "tensorrt-rtx"}, "1", "tensorrt-rtx"),
        ("SanaExportSampler", {"width": 100}, "2", "height and width must be multiples of 32"),
        ("SanaExportSampler", {"positive": "a" * 100_001}, "2", "prompt is too long"),
    ],
)
def test_the_runtimes_errors_are_those_of_the_node(engine: Any, kind: str, inputs: dict[str, Any], node: str, message: str) -> None:
    run = engine.run(workflow(kind=kind, **inputs))
    assert (run.status, run.node) == ("error", node)
    assert message in run.message
    assert "\n  found: " in run.message
    assert "\n  wanted: " in run.message


def test_latents_are_decoded_at_the_size_that_was_asked_for_or_at_their_own(
    engine: Any, runtime: SanaRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BINS, runtime.manifest.model.sample_size, {0.5: (64, 128), 1.0: (96, 96)})
    (loaded,) = engine.nodes["SanaExportBundle"]().load("tiny", "onnxruntime", "auto")
    words = workflow(height=90, width=80, resolution_binning=True)["2"]["inputs"] | {"bundle": loaded}
    (latent,) = engine.nodes["SanaExportSampler"]().sample(**words)
    assert latent["samples"].shape[2:] == (3, 3)
    decoder = engine.nodes["SanaExportDecode"]()
    pixels = np.round(decoder.decode(loaded, latent)[0].numpy() * 255).astype(np.uint8)
    assert equal(list(pixels), expected(runtime, height=90, width=80, use_resolution_binning=True))
    smaller = copy.copy(latent) | {"samples": latent["samples"][..., :2]}
    request = Request(prompt="", height=96, width=64, use_resolution_binning=False, seed=0)
    wanted = runtime.decode(runtime.plan(request), smaller["samples"].numpy())
    pixels = np.round(decoder.decode(loaded, smaller)[0].numpy() * 255).astype(np.uint8)
    assert equal(list(pixels), [np.asarray(image) for image in wanted])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(1, 8, 8, 2), "image is not an image"),
        (torch.zeros(8, 8), "image is not an image"),
        (torch.full((1, 8, 8, 3), float("nan")), "image has values that are not finite"),
    ],
)
def test_tensors_that_are_not_images_are_refused(engine: Any, values: torch.Tensor, message: str) -> None:
    from sana_export.integrations.comfyui.tensors import image_from

    with pytest.raises(UsageError, match=message):
        image_from("image", values)


def test_values_out_of_range_are_clipped_and_transparency_is_dropped(engine: Any) -> None:
    from sana_export.integrations.comfyui.tensors import image_from, mask_from

    values = torch.tensor([[[[-1.0, 0.5, 2.0, 0.1]]]])
    assert image_from("image", values).tolist() == [[[[0, 128, 255]]]]
    assert mask_from("mask", values[0, 0]).tolist() == [[[[0], [128], [255], [26]]]]


def test_latents_of_another_model_are_refused(engine: Any) -> None:
    (loaded,) = engine.nodes["SanaExportBundle"]().load("tiny", "onnxruntime", "auto")
    decode = engine.nodes["SanaExportDecode"]().decode
    for shape, message in (((1, 4, 8, 8), "wrong shape"), ((1, 16, 2, 8, 8), "not of an image")):
        with pytest.raises(UsageError, match=message):
            decode(loaded, {"samples": torch.zeros(shape)})


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_example_for_the_page_is_the_one_for_the_api(engine: Any, name: str) -> None:
    """A node's widgets are stored as a list, in the order of its inputs; a seed has a second widget."""
    api = json.loads((PACK / "api_workflows" / f"{name}.json").read_text())
    page = json.loads((PACK / "example_workflows" / f"{name}.json").read_text())
    links = {link[0]: link for link in page["links"]}
    found = {}
    for node in page["nodes"]:
        kinds = engine.nodes[node["type"]].INPUT_TYPES()
        slots = {slot["name"]: links[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
        inputs: dict[str, Any] = {key: [str(link[1]), link[2]] for key, link in slots.items()}
        values = iter(node["widgets_values"])
        for key, (kind, *options) in (kinds["required"] | kinds.get("optional", {})).items():
            if isinstance(kind, list) or kind in ("STRING", "INT", "FLOAT", "BOOLEAN"):
                inputs[key] = next(values)
                if options and options[0].get("control_after_generate"):
                    assert next(values) in ("fixed", "randomize")
        found[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    assert found == api


def test_the_pack_is_copied_into_comfyui(engine: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comfyui = tmp_path / "ComfyUI"
    assert main([str(comfyui)]) == 2
    assert "is not ComfyUI's folder\n  found:  no such folder" in capsys.readouterr().err
    (comfyui / "custom_nodes").mkdir(parents=True)
    (comfyui / "folder_paths.py").touch()
    target = install(comfyui)
    assert target == comfyui / "custom_nodes/sana_export"
    (target / "__init__.py").write_text("old")
    assert main([str(comfyui)]) == 0  # over an older copy
    scope: dict[str, Any] = {}
    exec((target / "__init__.py").read_text(), scope)
    assert set(scope["NODE_CLASS_MAPPINGS"]) == set(scope["NODE_DISPLAY_NAME_MAPPINGS"]) <= set(engine.nodes)
    assert sorted(path.stem for path in (target / "example_workflows").iterdir()) == WORKFLOWS
    other = tmp_path / "Other"
    (other / "custom_nodes/sana_export").mkdir(parents=True)
    (other / "folder_paths.py").touch()
    with pytest.raises(UsageError, match="is not a copy of the node pack"):
        install(other)
