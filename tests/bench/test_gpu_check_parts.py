"""The parts on the CPU with `tiny`: parity and latency of the backends that are installed, and that they can fail."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sana_export.bench.gpu_check import judge, latency, parity, rtx, settings, suite
from sana_export.bench.gpu_check.bundles import MODELS, checkpoint_of, without_onnx
from sana_export.bench.gpu_check.check import CheckFailed, PartContext
from sana_export.bench.gpu_check.parts import PARTS
from sana_export.contract import GRAPH_GROUPS
from sana_export.errors import ArtifactError
from sana_export.manifest import Manifest
from sana_export.runtime import SanaRuntime
from sana_export.runtime.backends import BACKENDS, torch_weights
from sana_export.runtime.backends.tensorrt_options import EngineOptions
from sana_export.variants import VARIANTS


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> PartContext:
    """A context that discards what parts keep."""

    def keep(more: Mapping[str, Any]) -> None:
        assert more

    return PartContext(tmp_path_factory.mktemp("work"), "cpu", keep)


TINY = (("tiny-random", "float32", "fp32", (1,)),)


def test_parity_of_the_torch_backend_needs_no_export(context: PartContext) -> None:
    found = parity.check(context, backend="torch", cases=TINY, size=96)["cases"]["tiny-random-fp32"]
    assert found["passed"]
    assert found["least_cosine"] >= 0.999999
    assert found["least_image_psnr_db"] >= 60
    assert not list(context.work.glob("bundles/*/onnx"))


def test_parity_finds_a_wrong_graph(context: PartContext, monkeypatch: pytest.MonkeyPatch) -> None:
    build = torch_weights.build_graph

    def build_wrong(name: str, *rest: Any) -> Any:
        graph = build(name, *rest)
        if name == "context":
            next(graph.parameters()).data.mul_(1.02)
        return graph

    monkeypatch.setattr(torch_weights, "build_graph", build_wrong)
    with pytest.raises(CheckFailed, match="tiny-random-fp32 context: cosine 0"):
        parity.check(context, backend="torch", cases=TINY, size=96)


def test_polygraphy_judges_what_runs_a_graph(context: PartContext, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime in place of engines. A wrong result of our runtime is told from one of Polygraphy's."""
    monkeypatch.setattr(judge, "exported", lambda *_: tiny_bundle)
    found = judge.check(context, backend="onnxruntime", cases=TINY, size=64)["cases"]["tiny-random-fp32"]
    assert set(found) == set(GRAPH_GROUPS["default"])
    assert min(row["polygraphy_db"] for row in found.values()) > 90
    assert min(row["runtime_db"] for row in found.values()) > 90

    run = SanaRuntime.run
    monkeypatch.setattr(judge, "_judged", lambda *_: {"sampler": tiny_bundle / "onnx/sampler/model.onnx"})
    wrong = lambda *given: {name: 1.01 * value.numpy() for name, value in run(*given).items()}  # noqa: E731
    monkeypatch.setattr(SanaRuntime, "run", wrong)
    monkeypatch.setattr(SanaRuntime, "to_host", lambda self, value: value)
    with pytest.raises(CheckFailed, match=r"^tiny-random-fp32 sampler: runtime_db 40\.\d dB$"):
        judge.check(context, backend="onnxruntime", cases=TINY, size=64)


SHORT: dict[str, Any] = {"model": "tiny-random", "exported": False, "batches": (1, 2), "size": 64, "steps": 2}


def test_latency_is_measured_and_images_are_compared(context: PartContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "WARM_UP", 1)
    monkeypatch.setattr(latency, "COUNTED", {1: 2, 2: 1})
    eager = latency.measure(context, backend="eager", **SHORT)
    assert eager["rows"]["1"]["psnr_db"] is None
    found = latency.measure(context, backend="torch", **SHORT)
    assert set(found["rows"]) == {"1", "2"}
    for row in found["rows"].values():
        assert row["psnr_db"] >= 40
        assert 0 < row["denoise_loop"]["median"] < row["end_to_end"]["median"]
    assert found["rows"]["1"]["denoise_loop"]["n"] == 2
    for path in context.work.glob("images/*.npy"):
        np.save(path, 255 - np.load(path))
    monkeypatch.setattr(latency, "COUNTED", {1: 1})
    with pytest.raises(CheckFailed, match=r"the images differ from eager's: batch 1: .* dB"):
        latency.measure(context, backend="torch", **{**SHORT, "batches": (1,)})


def test_a_bundle_without_onnx_files_is_for_the_torch_backend_only(context: PartContext) -> None:
    bundle = without_onnx(context, checkpoint_of(context, "tiny-random"), "tiny-random")
    assert set(Manifest.load(bundle).graphs) == set(GRAPH_GROUPS["default"])
    with pytest.raises(ArtifactError, match="not-exported is missing"):
        SanaRuntime.from_pretrained(bundle, backend="onnxruntime")


def test_models_are_the_published_ones_except_for_the_text_encoder() -> None:
    for name, alias, layers in (
        ("600m", "sana-600m-1024px", 28),
        ("1600m", "sana-1600m-1024px", 20),
        ("slice", "sana-1600m-1024px", 2),
    ):
        published = VARIANTS[alias].transformer
        assert MODELS[name].transformer == {**published, "num_layers": layers}
        assert MODELS[name].text_encoder["hidden_size"] == 2304
        assert MODELS[name].name not in VARIANTS, "the clamp must follow from the stored dtype, and with fp16 it is on"


def test_the_question_to_tensorrt_rtx_builds_without_a_gpu(context: PartContext) -> None:
    """Loading and running need one."""
    pytest.importorskip("tensorrt_rtx")
    for question in ("portable", "sm80-ampere-plus"):
        found = rtx.ask(context, question=question)
        assert found["built"]
        assert found["bytes"] > 100_000
        assert not found["loaded"]


def test_settings_are_measured_one_by_one(context: PartContext, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With settings of ONNX Runtime: engines need a GPU."""
    monkeypatch.setattr(settings, "exported", lambda *_: tiny_bundle)
    threads = {"session_options": {"intra_op_num_threads": 1}}
    settings_of = {"defaults": {}, "one thread": threads}
    found = settings.measure(context, backend="onnxruntime", settings=settings_of, model="tiny-random", size=64)["rows"]
    assert set(found) == set(settings_of)
    for row in found.values():
        assert 0 < row["text_encoder"] < row["first_ms"]
        assert 0 < row["new_length"] <= row["longest_new_length"] < row["first_ms"]
        assert row["cache_bytes"] == 0


def test_settings_are_options_of_the_backends() -> None:
    for options in settings.SETTINGS.values():
        EngineOptions.parse(options, "tensorrt-rtx")
    for part in PARTS:
        for options in part.arguments.get("settings", {}).values():
            EngineOptions.parse(options, part.arguments["backend"])


def test_the_suite_counts_outcomes_and_fails_with_a_test(context: PartContext, tmp_path: Path) -> None:
    """In a child process, like any part."""
    from sana_export.bench.gpu_check.parts import CheckPart
    from sana_export.bench.gpu_check.runner import Capabilities, Outcome, PartRunner

    mark = "import pytest\npytestmark = pytest.mark.gpu\n"
    (tmp_path / "test_others.py").write_text("import a_package_that_is_not_installed\n")

    def run(tests: str, most: float = 60) -> Outcome:
        (tmp_path / "test_some.py").write_text(mark + tests)
        part = CheckPart(
            "suite", f"{suite.__name__}:run", most, 1, {"where": str(tmp_path), "file": "test_some.py", "backend": "torch"}, ()
        )
        runner = PartRunner(tmp_path / "work", Capabilities("8.9", ()), "cpu", deadline=1e12)
        return runner.run([part], lambda part, outcome: None)["suite"]

    failed = run("def test_a(): pass\ndef test_b(): assert 0\n")
    assert failed.status == "failed"
    assert failed.found["outcomes"] == {"passed": 1, "failed": 1}
    assert "test_b" in str(failed.reason)
    (reason,) = (test["reason"] for test in failed.found["tests"].values() if test["outcome"] == "failed")
    assert reason.startswith("E   ")
    assert reason.endswith("AssertionError")
    assert "def test_b" not in reason
    backend = f"import os\ndef test_a(): assert os.environ[{suite.BACKEND_VARIABLE!r}] == 'torch'\n"
    assert run(backend).found["outcomes"] == {"passed": 1}
    assert run("").status == "failed", "a run without tests has not passed"
    ended = run("import time\ndef test_a(): pass\ndef test_b(): time.sleep(60)\n", most=15)
    assert ended.status == "failed"
    assert ended.found["outcomes"] == {"passed": 1}, "what was known when it was ended"


def test_every_test_of_a_gpu_is_in_a_part() -> None:
    files = {path: path.read_text("utf-8").splitlines() for path in Path("tests").rglob("test_*.py")}
    marked = {path.name for path, lines in files.items() if "pytestmark = pytest.mark.gpu" in lines}
    assert marked == {part.arguments["file"] for part in PARTS if "file" in part.arguments}
    assert {part.arguments.get("backend") for part in PARTS if part.name.startswith("tests/")} == {None, *BACKENDS}
