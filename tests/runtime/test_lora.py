"""LoRAs loaded at run time: the same images as diffusers, no change if one is refused, and no trace after unloading."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sana_export.adapters import Lora
from sana_export.checkpoint.checkpoint import SanaCheckpoint, open_checkpoint
from sana_export.errors import ArtifactError, DependencyError, SanaExportError, UsageError
from sana_export.export.graph_files import export_graphs
from sana_export.export.parity import compare_images
from sana_export.formats.onnx_weights import read_tensors
from sana_export.manifest import FILE_NAME, Manifest
from sana_export.runtime import SanaRuntime
from sana_export.runtime.lora_values import lora_values, read_adapter
from sana_export.verify.reference import load_reference
from tests.support.lora_files import diffusers_lora, load_transformer, peft_lora, refusals, respelled, write

PROMPT = "A cute 🐼 eating 🎋, 水墨画 style"
SMALL: dict[str, Any] = {"height": 96, "width": 160, "use_resolution_binning": False, "num_inference_steps": 3}
GRAPHS = ("context", "denoiser")


@pytest.fixture
def runtime(tiny_bundle: Path) -> SanaRuntime:
    return SanaRuntime.from_pretrained(tiny_bundle, backend="onnxruntime")


@pytest.fixture(scope="module")
def unchanged(tiny_bundle: Path) -> SanaRuntime:
    """One runtime for the many LoRAs that are refused."""
    return SanaRuntime.from_pretrained(tiny_bundle, backend="onnxruntime")


@pytest.fixture(scope="module")
def lora(tiny_checkpoint: SanaCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return diffusers_lora(load_transformer(tiny_checkpoint), tmp_path_factory.mktemp("lora"), r=4, lora_alpha=7)


@pytest.fixture(scope="module")
def second(tiny_checkpoint: SanaCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"r": 2, "lora_alpha": 3, "use_rslora": True, "rank_pattern": {"to_q": 3}, "alpha_pattern": {"to_v": 5}}
    return peft_lora(load_transformer(tiny_checkpoint), tmp_path_factory.mktemp("second"), **options)


def draw(runtime: SanaRuntime) -> np.ndarray:
    return np.stack([np.asarray(image) for image in runtime(PROMPT, seed=7, **SMALL).images])


def draw_reference(pipeline: Any) -> np.ndarray:
    generator = torch.Generator("cpu").manual_seed(7)
    return np.stack([np.asarray(image) for image in pipeline(PROMPT, generator=generator, **SMALL).images])


def assert_same_image(found: np.ndarray, wanted: np.ndarray, plain: np.ndarray) -> None:
    """Within the limits of float32, and different from the image without the LoRA."""
    assert np.abs(wanted.astype(int) - plain).mean() > 5
    parity = compare_images("image", found, wanted, "fp32")
    assert parity.passed, parity


class Recorder:
    """A session that records its refits. From refit number `fails` on, they fail."""

    def __init__(self, session: Any, fails: int | None = None) -> None:
        self.session, self.fails, self.refits = session, fails, list[dict[str, np.ndarray]]()

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        return self.session.run(feeds)

    def refit(self, weights: Mapping[str, np.ndarray]) -> None:
        if self.fails is not None and len(self.refits) >= self.fails:
            raise DependencyError("out of memory while loading", found="a test")
        self.session.refit(weights)
        self.refits.append({name: np.array(value) for name, value in weights.items()})


def record(runtime: SanaRuntime, **fails: int) -> dict[str, Recorder]:
    recorders = {graph: Recorder(runtime.sessions[graph], fails.get(graph)) for graph in GRAPHS}
    runtime.sessions.update(recorders)
    return recorders


def own_bytes(bundle: Path, graph: str) -> dict[str, np.ndarray]:
    entry = Manifest.load(bundle).graphs[graph]
    return read_tensors(bundle / entry.onnx.path, [bundle / file.path for file in entry.data])


def part_of(lora: Path, words: str, folder: Path) -> Path:
    """A LoRA with only the layers whose names contain `words`."""
    tensors = load_file(lora / "pytorch_lora_weights.safetensors")
    return write(folder / "part", {name: value for name, value in tensors.items() if words in name})


def test_the_image_is_that_of_diffusers_with_the_lora(runtime: SanaRuntime, tiny_checkpoint: SanaCheckpoint, lora: Path) -> None:
    plain = draw(runtime)
    runtime.load_lora(lora, 0.7)
    pipeline = load_reference(tiny_checkpoint, runtime.manifest.options, pag=False)
    pipeline.load_lora_weights(str(lora), adapter_name="style")
    pipeline.set_adapters("style", 0.7)
    assert_same_image(draw(runtime), draw_reference(pipeline), plain)


def test_two_loras_add_up_and_equal_an_export_with_both(
    runtime: SanaRuntime, tiny_bundle: Path, tiny_checkpoint: SanaCheckpoint, lora: Path, second: Path, tmp_path: Path
) -> None:
    loras = (Lora(lora, 0.7), Lora(second, -0.4))
    checkpoint = open_checkpoint(str(tiny_checkpoint.folder), loras=loras)
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    manifest = Manifest.load(bundle)
    folded = {}
    for graph in GRAPHS:
        folded |= export_graphs(graph, [graph], checkpoint, manifest.options, bundle)
    dataclasses.replace(manifest, graphs={**manifest.graphs, **folded}).save(bundle)

    plain = draw(runtime)
    for one in loras:
        runtime.load_lora(one.path, one.scale)
    assert runtime.loras == loras
    assert_same_image(draw(runtime), draw(SanaRuntime.from_pretrained(bundle)), plain)
    assert_same_image(draw(runtime), draw_reference(load_reference(checkpoint, manifest.options, pag=False)), plain)
    # The weights differ only by the order of float32 sums.
    adapters = [read_adapter(one, [t for graph in manifest.graphs.values() for t in graph.lora_targets]) for one in loras]
    for graph in GRAPHS:
        names, wanted = {target.initializer for target in folded[graph].lora_targets}, own_bytes(bundle, graph)
        found = lora_values(own_bytes(tiny_bundle, graph), manifest.graphs[graph].lora_targets, adapters, names)
        for name, value in found.items():
            np.testing.assert_allclose(value.reshape(-1), wanted[name].view(np.float32), rtol=1e-5, atol=1e-6, err_msg=name)


def test_unloading_restores_every_bit(runtime: SanaRuntime, tiny_bundle: Path, lora: Path, tmp_path: Path) -> None:
    """Also in layers that only the first of two LoRAs changed."""
    plain, recorders = draw(runtime), record(runtime)
    runtime.load_lora(lora)
    runtime.load_lora(part_of(lora, ".attn2.to_", tmp_path), 0.3)
    assert not np.array_equal(draw(runtime), plain)
    runtime.unload_lora()
    assert runtime.loras == ()
    np.testing.assert_array_equal(draw(runtime), plain)
    for graph, recorder in recorders.items():
        first, second, last = recorder.refits
        assert set(last) == set(first) | set(second)
        wanted = own_bytes(tiny_bundle, graph)
        for name, value in last.items():
            assert hashlib.sha256(value.tobytes()).digest() == hashlib.sha256(wanted[name].tobytes()).digest(), name
            assert any(refit.get(name, value).tobytes() != value.tobytes() for refit in (first, second)), name


def test_only_the_arrays_that_the_lora_changes_are_refitted(
    runtime: SanaRuntime, tiny_bundle: Path, lora: Path, tmp_path: Path
) -> None:
    """The k of one layer is a third of one array, that of q, k and v, in one graph."""
    path = part_of(lora, ".1.attn1.to_k.", tmp_path)
    recorders = record(runtime)
    runtime.load_lora(path)
    assert recorders["context"].refits == []
    (refit,) = recorders["denoiser"].refits
    assert set(refit) == {"blocks.1.qkv"}
    old = own_bytes(tiny_bundle, "denoiser")["blocks.1.qkv"].view(np.float32).reshape(384, 128)
    changed = refit["blocks.1.qkv"] != old
    assert changed[128:256].mean() > 0.99
    assert not changed[:128].any()
    assert not changed[256:].any()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("spelling", ["kohya", "OneTrainer, dots"])
def test_a_lora_of_another_program_is_the_same(
    runtime: SanaRuntime, lora: Path, tmp_path: Path, spelling: str, shape: tuple[int, ...]
) -> None:
    """With alpha in a tensor of any shape, which the config of the file of diffusers has too."""
    tensors = load_file(lora / "pytorch_lora_weights.safetensors")
    renamed = {
        name: value.reshape(shape) if name.endswith(".alpha") else value
        for name, value in respelled(tensors, spelling, 7.0).items()
    }
    save_file(renamed, tmp_path / "style.safetensors")
    recorders = record(runtime)
    for path in (lora, tmp_path / "style.safetensors"):
        runtime.load_lora(path, 0.7)
        runtime.unload_lora()
    for recorder in recorders.values():
        wanted, _, found, _ = recorder.refits
        assert wanted.keys() == found.keys()
        assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_the_sessions_of_a_staged_runtime_have_the_lora(runtime: SanaRuntime, tiny_bundle: Path, lora: Path, second: Path) -> None:
    plain = draw(runtime)
    runtime.load_lora(lora, 0.7)
    wanted = draw(runtime)
    staged = SanaRuntime.from_pretrained(tiny_bundle, backend="onnxruntime", memory="staged")
    staged.load_lora(lora, 0.7)
    np.testing.assert_array_equal(draw(staged), wanted)
    staged.load_lora(second)
    staged.unload_lora()
    np.testing.assert_array_equal(draw(staged), plain)


def huge(lora: Path, folder: Path) -> Path:
    """A copy of a LoRA whose product leaves the range of float32."""
    tensors = load_file(lora / "pytorch_lora_weights.safetensors")
    path = folder / "huge.safetensors"
    save_file({name: tensor * 3e19 for name, tensor in tensors.items()}, path)
    return path


def test_a_lora_that_a_session_loaded_later_would_refuse_is_refused_at_once(
    tiny_bundle: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged = SanaRuntime.from_pretrained(tiny_bundle, backend="onnxruntime", memory="staged")
    assert not staged.sessions
    with pytest.raises(ArtifactError, match="leaves the range of float32"):
        staged.load_lora(huge(lora, tmp_path), 1000)

    def check_refit(graph: str) -> None:
        raise ArtifactError(f"the engine of {graph} cannot be refitted", found="a test", wanted="--refittable")

    monkeypatch.setattr(staged.backend, "check_refit", check_refit)
    with pytest.raises(ArtifactError, match="engine of context cannot be refitted"):
        staged.load_lora(lora)
    assert staged.loras == ()


@pytest.mark.parametrize("another", [False, True])
def test_a_refit_that_fails_changes_nothing(runtime: SanaRuntime, lora: Path, second: Path, another: bool) -> None:
    if another:
        runtime.load_lora(second)
    before, loras = draw(runtime), runtime.loras
    recorders = record(runtime, denoiser=0)
    with pytest.raises(DependencyError, match="out of memory"):
        runtime.load_lora(lora)
    assert len(recorders["context"].refits) == 2, "changed and restored"
    assert runtime.loras == loras
    np.testing.assert_array_equal(draw(runtime), before)


def test_weights_that_cannot_be_restored_are_reported(runtime: SanaRuntime, lora: Path) -> None:
    record(runtime, context=1, denoiser=0)
    with pytest.raises(ArtifactError, match="previous weights of context could not be restored") as caught:
        runtime.load_lora(lora)
    assert f"SanaRuntime.from_pretrained({str(runtime.bundle)!r})" in str(caught.value.fix)


def refused(runtime: SanaRuntime, path: Path, scale: float = 1.0, kind: type[SanaExportError] = ArtifactError) -> str:
    """The message of the error with which the LoRA is refused. The runtime must not change."""
    sessions, loras = dict(runtime.sessions), runtime.loras
    recorders = record(runtime)
    with pytest.raises(kind) as caught:
        runtime.load_lora(path, scale)
    runtime.sessions.update(sessions)
    assert runtime.loras == loras
    assert not any(recorder.refits for recorder in recorders.values())
    assert caught.value.found is not None
    assert caught.value.wanted is not None
    return str(caught.value)


@pytest.mark.parametrize("case", sorted(refusals(64)))
def test_a_lora_that_does_not_fit_is_named(unchanged: SanaRuntime, tmp_path: Path, case: str) -> None:
    """With the same words as when it is folded in at export."""
    tensors, words = refusals(128)[case]
    if case == "quantized":  # the reader without PyTorch does not support the dtype
        words = ("I8",)
    message = refused(unchanged, write(tmp_path / "lora", tensors))
    assert all(word in message for word in words), message


def test_one_unknown_layer_refuses_the_whole_lora(unchanged: SanaRuntime, lora: Path, tmp_path: Path) -> None:
    tensors = load_file(lora / "pytorch_lora_weights.safetensors")
    extra = "transformer.transformer_blocks.77.attn1.to_k"
    more = {f"{extra}.lora_A.weight": torch.ones(2, 128), f"{extra}.lora_B.weight": torch.ones(128, 2)}
    path = write(tmp_path / "x", {**tensors, **more})
    assert "transformer_blocks.77.attn1.to_k, which this transformer does not have" in refused(unchanged, path)


def test_other_refusals(runtime: SanaRuntime, lora: Path, tmp_path: Path) -> None:
    assert "no such file" in refused(runtime, tmp_path / "nothing", kind=UsageError)
    for scale in (float("nan"), 1e30, "0.5", True):
        assert "a number from -1000 to 1000" in refused(runtime, lora, scale, UsageError)
    path = tmp_path / "cut.safetensors"
    path.write_bytes((lora / "pytorch_lora_weights.safetensors").read_bytes()[:-100])
    assert "download the LoRA again" in refused(runtime, path)
    path = huge(lora, tmp_path)
    message = refused(runtime, path, 1000)
    assert "leaves the range of float32" in message
    assert str(path) in message


def test_a_backend_that_cannot_refit(runtime: SanaRuntime, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = draw(runtime)
    monkeypatch.setattr(runtime.backend, "can_refit", False)
    with pytest.raises(DependencyError, match="cannot change weights") as caught:
        runtime.load_lora(lora)
    assert f"-o {runtime.bundle} --pag-layers transformer_blocks.1 --lora {lora}:1.0" in str(caught.value.fix).replace(
        "--dtype fp32 ", ""
    )
    np.testing.assert_array_equal(draw(runtime), before)


def test_an_older_bundle_loads_but_refuses_loras(tiny_bundle: Path, lora: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    manifest = Manifest.load(bundle)
    graphs = {name: dataclasses.replace(graph, lora_targets=()) for name, graph in manifest.graphs.items()}
    dataclasses.replace(manifest, graphs=graphs).save(bundle)
    document = json.loads((bundle / FILE_NAME).read_text("utf-8"))
    document.pop("sha256")
    for graph in document["graphs"].values():
        del graph["lora_targets"]
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    document["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (bundle / FILE_NAME).write_text(json.dumps(document), "utf-8")

    runtime = SanaRuntime.from_pretrained(bundle)
    message = refused(runtime, lora)
    assert "no lora_targets" in message
    assert "sana-export export tiny-random -o" in message


def test_damaged_weights_are_refused(tiny_bundle: Path, lora: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    runtime = SanaRuntime.from_pretrained(bundle)
    path = bundle / runtime.manifest.graphs["context"].data[0].path
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").replace(path)
    assert "damaged" in refused(runtime, lora)


def test_alpha_tensors_are_read(runtime: SanaRuntime, lora: Path, tmp_path: Path) -> None:
    name = "transformer.transformer_blocks.0.attn1.to_q"
    tensors = load_file(lora / "pytorch_lora_weights.safetensors")
    path = tmp_path / "alpha.safetensors"
    save_file({**{key: value for key, value in tensors.items() if name in key}, f"{name}.alpha": torch.tensor(6.0)}, path)
    targets = runtime.manifest.graphs["denoiser"].lora_targets
    (fold,) = read_adapter(Lora(path, 0.5), targets).folds.values()
    assert fold.delta.factor == 0.5 * 6 / 4


def test_the_torch_backend_loads_and_unloads_a_lora(tiny_bundle: Path, runtime: SanaRuntime, lora: Path) -> None:
    torch_runtime = SanaRuntime.from_pretrained(tiny_bundle, backend="torch")
    plain = draw(torch_runtime)
    for loaded in (torch_runtime, runtime):
        loaded.load_lora(lora, 0.7)
    assert_same_image(draw(torch_runtime), draw(runtime), plain)
    torch_runtime.unload_lora()
    np.testing.assert_array_equal(draw(torch_runtime), plain)
