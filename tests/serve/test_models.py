"""Models by name: what is loaded, what is closed for it, and which LoRAs it has."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from sana_export.adapters import Lora
from sana_export.errors import ArtifactError, UsageError
from sana_export.manifest import Manifest
from sana_export.serve.config import ModelConfig
from sana_export.serve.errors import Refusal
from sana_export.serve.models import ModelStore
from tests.support.serving import StandInRuntime


class Opened(list[StandInRuntime]):
    """The runtimes that were opened, in order."""

    def __call__(self, config: ModelConfig, folder: Path) -> Any:
        self.append(StandInRuntime(config, folder))
        return self[-1]


@pytest.fixture
def opened() -> Opened:
    return Opened()


@pytest.fixture
def loras(tmp_path: Path) -> list[Lora]:
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    return [Lora(tmp_path / f"{name}.safetensors", scale) for name, scale in (("a", 0.5), ("b", 2.0))]


def models(bundle: Path, *names: str, **others: Any) -> list[ModelConfig]:
    """Models over one bundle that share no runtime."""
    return [ModelConfig(name, bundle, device=index, **others) for index, name in enumerate(names)]


def test_nothing_is_loaded_before_it_is_used(tiny_bundle: Path, opened: Opened) -> None:
    store = ModelStore(models(tiny_bundle, "x", "y"), opener=opened)
    assert [(card.name, card.loaded) for card in store.cards()] == [("x", False), ("y", False)]
    assert store.use("y") is store.use("y")
    assert ([card.loaded for card in store.cards()], len(opened)) == ([False, True], 1)


def test_the_budget_closes_what_was_not_used_for_the_longest(tiny_bundle: Path, opened: Opened) -> None:
    store = ModelStore(models(tiny_bundle, "x", "y", "z", memory_bytes=40), budget=100, opener=opened)
    for name in ("x", "y", "x", "z"):
        store.use(name)
    assert [(runtime.name, runtime.closed) for runtime in opened] == [("x", False), ("y", True), ("z", False)]
    store.use("y")
    assert [runtime.closed for runtime in opened] == [True, True, False, False]
    store.close()
    assert all(runtime.closed for runtime in opened)


def test_a_model_counts_each_of_its_files_once(tiny_bundle: Path, opened: Opened) -> None:
    graphs = Manifest.load(tiny_bundle).graphs.values()
    files = {entry.path for graph in graphs for entry in graph.files}
    most = sum((tiny_bundle / path).stat().st_size for path in files)
    ModelStore(models(tiny_bundle, "x"), budget=most, opener=opened)
    with pytest.raises(UsageError, match="larger than the memory budget") as caught:
        ModelStore(models(tiny_bundle, "x"), budget=most - 1, opener=opened)
    assert caught.value.fix == f"--memory-budget {-(-most // 2**20)}M"


def test_models_over_one_bundle_share_a_runtime_and_change_its_loras(tiny_bundle: Path, opened: Opened, loras: list[Lora]) -> None:
    a, b = loras
    configs = [
        ModelConfig("plain", tiny_bundle),
        ModelConfig("one", tiny_bundle, (a,)),
        ModelConfig("both", tiny_bundle, (a, b)),
    ]
    store = ModelStore(configs, opener=opened)
    seen = []
    for name in ("plain", "one", "one", "both", "plain"):
        store.use(name)
        seen.append(list(opened[0].loras))
    assert seen == [[], ["a.safetensors:0.5"], ["a.safetensors:0.5"], ["a.safetensors:0.5", "b.safetensors:2"], []]
    assert len(opened) == 1
    assert [card.loaded for card in store.cards()] == [True] * 3


def test_a_lora_that_does_not_fit_leaves_the_others_usable(tiny_bundle: Path, opened: Opened, loras: list[Lora]) -> None:
    store = ModelStore([ModelConfig("plain", tiny_bundle), ModelConfig("bad", tiny_bundle, tuple(loras))], opener=opened)
    load = store.use("plain").load_lora

    def refuse(path: Path, scale: float) -> None:
        if path == loras[1].path:
            raise ArtifactError("it does not fit")
        load(path, scale)

    opened[0].load_lora = refuse  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(ArtifactError, match="does not fit"):
            store.use("bad")
    store.use("plain")
    assert opened[0].loras == []


def test_a_discarded_model_is_opened_again(tiny_bundle: Path, opened: Opened) -> None:
    store = ModelStore(models(tiny_bundle, "x"), opener=opened)
    store.use("x")
    store.discard("x")
    store.discard("x")
    assert store.use("x") is opened[1]
    assert opened[0].closed


def test_a_bundle_that_is_replaced_is_read_again(tiny_bundle: Path, img2img_bundle: Path, tmp_path: Path, opened: Opened) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    store = ModelStore(models(folder, "x"), opener=opened)
    assert store.use("x") is store.use("x")
    folder.rename(tmp_path / "old")
    assert store.use("x") is opened[0], "what is deleted stays loaded"
    shutil.copytree(img2img_bundle, folder)
    assert [card.edits for card in store.cards()] == [True]
    assert store["x"].manifest == Manifest.load(img2img_bundle)
    assert store.use("x") is store.use("x") is opened[1]
    assert opened[0].closed
    (folder / "manifest.json").write_text("{")
    assert store["x"].manifest == Manifest.load(img2img_bundle)
    assert store.use("x") is opened[2], "a damaged manifest is the error of loading it"


def test_unknown_and_wrong_models(tiny_bundle: Path, tmp_path: Path) -> None:
    store = ModelStore(models(tiny_bundle, "x"))
    with pytest.raises(Refusal) as caught:
        store.use("y")
    assert caught.value.code == "model_not_found"
    with pytest.raises(UsageError, match="same name"):
        ModelStore([ModelConfig("x", tiny_bundle), ModelConfig("x", tiny_bundle)])
    with pytest.raises(UsageError, match="no models"):
        ModelStore([])
    with pytest.raises(ArtifactError, match="missing"):
        ModelStore([ModelConfig("x", tmp_path / "missing")])
    with pytest.raises(UsageError, match="there is no LoRA"):
        ModelStore([ModelConfig("x", tiny_bundle, (Lora(tmp_path / "none.safetensors"),))])
