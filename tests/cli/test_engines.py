"""A whole recipe on the bundle of `tiny-random`, and a second run that skips everything."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sana_export.bench.candidates.worker import Worker
from sana_export.cli.stage_cache import StageCache, stage_key
from sana_export.cli.terminal.console import Console
from sana_export.cli.verb import Answer
from sana_export.cli.verbs import bench, engines, verify
from sana_export.manifest import Manifest
from tests.support.command_line import Cli
from tests.support.engine_entries import ENGINE, THERE

STAGES = ["export", "build tensorrt-rtx portable", "build tensorrt-rtx 8.9", "verify", "sample", "bench"]


@pytest.fixture
def recipe(bundle_copy: Path, tiny_checkpoint: Any, tmp_path: Path) -> Path:
    """A recipe whose export is up to date and whose other stages are small."""
    path = tmp_path / "recipe.toml"
    path.write_text(
        f"""
        model = "tiny-random"
        output = "{bundle_copy}"
        precision = "fp32"
        pag_layers = ["transformer_blocks.1"]
        [[build]]
        graphs = ["sampler"]
        [[build]]
        graphs = ["sampler"]
        compute_capabilities = ["8.9"]
        [verify]
        prompts = ["a cat"]
        height = 64
        width = 64
        steps = 1
        [sample]
        prompt = "a 🐼"
        output = "{tmp_path}/x.png"
        height = 64
        width = 64
        resolution_binning = false
        steps = 2
        seed = 5
        [bench]
        workload = "smoke"
        output = "{tmp_path}/report"
        """,
        "utf-8",
    )
    return path


def test_a_whole_recipe_and_again(
    recipe: Path, bundle_copy: Path, tiny_runtime: Any, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(Worker, "rates", lambda worker, precision: None)  # tests/bench/test_ceiling.py measures the ceiling
    ran = cli("engines", recipe, "--json")
    assert ran.code == 0, ran.err
    stages = {stage["name"]: stage for stage in ran.json["stages"]}
    assert list(stages) == STAGES
    assert {name for name, stage in stages.items() if stage["up_to_date"]} == {"export"}
    assert stages["verify"]["result"]["passed"] is True
    assert stages["bench"]["result"]["backends"]["onnxruntime"]["stages"]["end_to_end"]["ratio_to_eager"]["median"] > 0
    image = tiny_runtime("a 🐼", height=64, width=64, use_resolution_binning=False, num_inference_steps=2, seed=5).images[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), np.asarray(image))
    assert json.loads((tmp_path / "report/bench.json").read_text())["agrees"] is True
    built = Manifest.load(bundle_copy).engines
    assert [(engine.graph, engine.compute_capabilities) for engine in built] == [("sampler", ()), ("sampler", ("8.9",))]
    assert len(ran.json["bundle"]["engines"]) == 2

    def never(*_: object, **__: object) -> None:
        raise AssertionError("this stage is up to date")

    for module, name in ((verify, "compare"), (engines, "compare"), (engines, "sample"), (bench, "measure"), (engines, "measure")):
        monkeypatch.setattr(module, name, never)
    again = cli("engines", recipe)
    assert again.code == 0, again.err
    assert again.out.count("up to date") == len(STAGES)
    for word in (str(bundle_copy), "portable", "verify:", "sample:", str(tmp_path / "x.png"), "bench:", "end_to_end", "total"):
        assert word in again.out
    assert Manifest.load(bundle_copy).engines == built


def test_a_missed_limit_is_reported_at_the_end_and_not_cached(
    recipe: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = recipe.read_text("utf-8")
    recipe.write_text(text[: text.index("[[build]]")] + text[text.index("[verify]") : text.index("[bench]")], "utf-8")
    asked: list[int] = []

    def missed(*_: object, **__: object) -> Answer:
        asked.append(1)
        return Answer({"passed": False}, "NOT passed", 5)

    monkeypatch.setattr(engines, "compare", missed)
    for count in (1, 2):
        ran = cli("engines", recipe)
        assert ran.code == 5
        assert "NOT passed" in ran.out
        assert len(asked) == count
    assert (tmp_path / "x.png").is_file()


def test_an_output_that_is_not_writable_is_found_first(recipe: Path, tmp_path: Path, cli: Cli) -> None:
    recipe.write_text(recipe.read_text("utf-8").replace(f"{tmp_path}/x.png", f"{recipe}/x.png"), "utf-8")
    assert cli("engines", recipe).code == 3


def test_engines_that_cannot_run_are_listed_by_reason(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(ENGINE, graph="context")
    manifest = Manifest.load(tiny_bundle).with_engine(ENGINE).with_engine(other)
    monkeypatch.setattr(engines, "detect_host", lambda: dataclasses.replace(THERE, gpus=()))
    assert engines.unusable_engines(manifest) == {"no NVIDIA GPU and driver here": "2 engines of tensorrt-rtx"}
    monkeypatch.setattr(engines, "detect_host", lambda: THERE)
    assert engines.unusable_engines(manifest) == {}


def test_stage_cache(tmp_path: Path) -> None:
    written = tmp_path / "x.png"
    written.write_bytes(b"image")
    stage_cache = StageCache(tmp_path / "bundle")
    stage_cache.record("sample", "key", Answer({"a": 1}, "text"), (written,))
    again = StageCache(tmp_path / "bundle")
    found = again.find("sample", "key")
    assert found is not None
    assert found[0] == Answer({"a": 1}, "text")
    assert again.find("sample", "other key") is None
    assert again.find("bench", "key") is None
    written.write_bytes(b"another image")
    assert again.find("sample", "key") is None
    written.unlink()
    assert again.find("sample", "key") is None
    (tmp_path / "bundle.stages.json").write_text("{")
    assert StageCache(tmp_path / "bundle").find("sample", "key") is None


def test_a_stage_key_depends_on_the_bundle_and_the_settings() -> None:
    keys = {stage_key(bundle, settings) for bundle in ("a", "b") for settings in ({"steps": 1}, {"steps": 2})}
    assert len(keys) == 4
    assert stage_key("a", {"steps": 1, "seed": 2}) == stage_key("a", {"seed": 2, "steps": 1})


def test_progress_of_a_stage_starts_with_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(level=20)
    console.prefix = "export "
    console.step("context", 1, 3)
    assert capsys.readouterr().err == "export [2/3] context\n"
