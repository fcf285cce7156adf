"""The runner survives parts that fail, hang and crash, keeps to its deadline, and its report says what came of each."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from sana_export.bench.gpu_check import find
from sana_export.bench.gpu_check.__main__ import main
from sana_export.bench.gpu_check.check import PartContext
from sana_export.bench.gpu_check.parts import PARTS, CheckPart
from sana_export.bench.gpu_check.privacy import Redaction
from sana_export.bench.gpu_check.report import Report
from sana_export.bench.gpu_check.runner import RESERVE, Capabilities, Outcome, PartRunner
from tests.support import cuda_driver

ALL_PRESENT = Capabilities("8.9", ("numpy",), {"numpy": "NumPy sees no GPU"})


def part(name: str, most: float = 20, least: float = 1, **more: Any) -> CheckPart:
    more.setdefault("modules", ("numpy",))
    return CheckPart(name, f"tests.support.gpu_check_parts:{name.partition('-')[0]}", most, least, **more)


def run(work: Path, *parts: CheckPart, seconds: float = 60, **more: Any) -> dict[str, Outcome]:
    settings = {"capabilities": ALL_PRESENT, "device": "cuda", **more}
    runner = PartRunner(work, deadline=time.monotonic() + RESERVE + seconds, **settings)
    told: list[str] = []
    outcomes = runner.run(parts, lambda part, outcome: told.append(part.name))
    assert told == [one.name for one in parts] == list(outcomes)
    return outcomes


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_every_way_to_end(tmp_path: Path) -> None:
    names = ("passes", "misses", "lacks", "raises", "crashes", "ends", "leaves_loudly")
    found = run(tmp_path, *map(part, names), part("hangs", most=3), part("passes-again", arguments={"value": 2}))
    assert {name: outcome.status for name, outcome in found.items()} == {
        "passes": "passed",
        "misses": "failed",
        "lacks": "skipped",
        "raises": "failed",
        "crashes": "failed",
        "ends": "failed",
        "leaves_loudly": "passed",
        "hangs": "failed",
        "passes-again": "passed",
    }
    assert found["passes"].found == {"value": 1, "device": "cuda"}
    assert found["passes-again"].found["value"] == 2
    assert (found["misses"].reason, found["misses"].found) == ("cosine 0.5 (limit 0.99)", {"cosine": 0.5})
    assert "install it" in str(found["lacks"].reason)
    assert found["raises"].reason == "ValueError: a bug"
    assert str(found["crashes"].reason) == "its process was killed by SIGSEGV; the last words"
    assert found["crashes"].found == {"half": "done"}
    assert "exit code 7 and no answer" in str(found["ends"].reason)
    assert "still running after its 3 s" in str(found["hangs"].reason)
    assert 3 <= found["hangs"].seconds < 8
    assert not alive(int((tmp_path / "child").read_text())), "a process that a part started must end with it"
    assert found["passes"].log == "parts/passes.log"
    assert (tmp_path / found["passes"].log).read_text() == "a line of output\n"
    assert {outcome.log for outcome in found.values()} == {f"parts/{name}.log" for name in found}


def test_the_deadline(tmp_path: Path) -> None:
    """A part that does not fit is not started, one that is cut short has not failed, and shorter ones after it still run."""
    started = time.monotonic()
    parts = (part("hangs", most=30, least=1), part("passes", least=20), part("passes-quickly", most=5, least=0))
    found = run(tmp_path, *parts, seconds=4)
    assert time.monotonic() - started < 4 + RESERVE
    assert found["hangs"].status == "not run"
    assert "out of time: ended after 4 s, but it may take 30 s" in str(found["hangs"].reason)
    assert set(found["hangs"].found) == {"child"}
    assert found["passes"].status == "not run"
    assert "but it needs at least 20 s" in str(found["passes"].reason)
    assert not (tmp_path / "ran").exists()


LACKING: dict[str, tuple[dict[str, Any], Capabilities, str]] = {
    "gpu": ({}, Capabilities(None, ("numpy",)), "no GPU"),
    "module": ({"modules": ("numpy", "tensorrt")}, ALL_PRESENT, "not installed: tensorrt"),
    "any": ({"one_of": ("tensorrt", "tensorrt_rtx")}, ALL_PRESENT, "none of these is installed: tensorrt, tensorrt_rtx"),
    "backend": (
        {"backend": "tensorrt-rtx"},
        Capabilities("9.0", ("numpy",)),
        "TensorRT-RTX does not support compute capability 9.0",
    ),
    "module's GPU": ({"on_gpu": ("numpy",)}, ALL_PRESENT, "NumPy sees no GPU"),
}


@pytest.mark.parametrize("name", LACKING)
def test_what_cannot_run_is_skipped_with_the_reason(tmp_path: Path, name: str) -> None:
    more, capabilities, reason = LACKING[name]
    found = run(tmp_path, part("passes", **more), capabilities=capabilities)["passes"]
    assert found.status == "skipped"
    assert reason in str(found.reason)
    assert not (tmp_path / "ran").exists()


def test_an_earlier_answer_is_kept_only_if_nothing_changed(tmp_path: Path) -> None:
    parts = (part("passes"), part("misses"))
    first = run(tmp_path, *parts, key="a")
    assert run(tmp_path, *parts, key="a", resume=True) == first
    assert (tmp_path / "ran").read_text() == "1\n"
    for again in ({"key": "b", "resume": True}, {"key": "a", "resume": False}):
        run(tmp_path, part("passes"), **again)
    assert (tmp_path / "ran").read_text() == "1\n" * 3


NOTHING = Redaction({}, {})


def report(**outcomes: Outcome) -> Report:
    machine = {"cpu": "a CPU", "cores": 2, "memory": 2**34, "gpu": [], "os": "Linux", "python": "3.11"}
    return Report("today", machine, {}, "cuda", 480.0, outcomes=dict(outcomes))


MODULES = {"torch": {"version": "2.11", "no_gpu": None}, "tensorrt_rtx": {"version": "1.7", "no_gpu": "it says why"}}
GPU = Outcome("passed", found={"compute_capability": "9.0", "gpus": ["NVIDIA H100, 580.1"], "modules": MODULES})
NO_GPU = Outcome("passed", found={"compute_capability": None, "gpus": [], "modules": {}})


def test_exit_codes() -> None:
    assert report(find=GPU, one=Outcome("skipped"), two=Outcome("not run")).exit_code == 0
    assert report(find=NO_GPU).exit_code == 3
    assert report(find=GPU, one=Outcome("failed")).exit_code == 5
    assert report(find=NO_GPU, one=Outcome("failed")).exit_code == 5
    assert report(find=Outcome("failed")).exit_code == 5


def test_modules_that_hang_are_waited_for_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        find, "QUESTIONS", {"json": "__import__('time').sleep(60)", "csv": "__import__('time').sleep(60)", "io": "{}"}
    )
    monkeypatch.setattr(find, "_TIMEOUT", 8)
    started = time.monotonic()
    found = find.find(PartContext(tmp_path, "cuda", lambda more: None))["modules"]
    assert time.monotonic() - started < 15
    assert found == {"json": {"error": "no answer in 8 s"}, "csv": {"error": "no answer in 8 s"}, "io": {}}


def latency(loop: float, db: float | None) -> Outcome:
    summary = {"n": 8, "median": loop, "p10": loop - 1, "p90": loop + 1}
    stages = {"denoise_loop": summary, "vae_decoder": {**summary, "median": 30.0}, "end_to_end": {**summary, "median": loop + 40}}
    gpu = {"sm_clock_mhz": {"median": 1755.0}, "power_w": {"median": 310.4}, "slowed_by": ["power cap"]}
    row = {"first_ms": 900.0, "psnr_db": db, "peak_device_bytes": 6.5 * 2**30, "gpu": gpu, **stages}
    return Outcome("passed", found={"rows": {"1": row}})


def test_the_page(tmp_path: Path) -> None:
    question = {"built": True, "loaded": False, "ran": False, "said": ["it is not | supported"], "cosine": None}
    document = report(find=GPU)
    document.outcomes |= {
        "latency/1600m/eager": latency(800.0, None),
        "latency/1600m/torch-compile": latency(400.0, 45.25),
        "rtx/current": Outcome("passed", found=question),
        "settings/tensorrt-rtx": Outcome(
            "passed",
            found={
                "rows": {
                    "defaults": {
                        "first_ms": 2000.0,
                        "text_encoder": 4.0,
                        "context": 1.5,
                        "vae_decoder": 9.0,
                        "new_length": 5.0,
                        "longest_new_length": 80.0,
                        "cache_bytes": 3 * 2**20,
                    }
                }
            },
        ),
        "parity/torch": Outcome("failed", "tiny-fp32 context: cosine 0.9\nmore"),
        "parity/onnxruntime": Outcome(
            "passed", found={"cases": {"tiny-fp32": {"least_cosine": 0.99999995, "least_image_psnr_db": 77.0, "passed": True}}}
        ),
    }
    document.outcomes["make/1600m"] = Outcome("not run", "out of time")
    document.write(tmp_path / "deep" / "r.json", NOTHING)
    page = (tmp_path / "deep" / "r.md").read_text("utf-8")
    assert "NVIDIA H100, driver 580.1, compute capability 9.0." in page
    assert "| torch | 2.11 |  |" in page
    assert "| tensorrt_rtx | 1.7 | no_gpu it says why |" in page
    compiled = "ours: torch.compile, one CUDA graph"
    assert (
        f"| 1600m | 1 | {compiled} | 400.0 | 399.0 to 401.0 | 30.0 | 440.0 | 900 | 6.5 | 1755 | 310 | power cap | 2.00 | 45.2 |"
        in page
    )
    assert "| current | yes | no | no | None | it is not / supported |" in page
    assert "| onnxruntime | tiny-fp32 | 0.9999999 | 77.0 | True |" in page or "| onnxruntime | tiny-fp32 | 1.0000000 |" in page
    assert "| parity/torch | failed | 0 | tiny-fp32 context: cosine 0.9 more |" in page
    assert "| tensorrt-rtx | defaults | 2000.0 | 4.0 | 1.5 | 9.0 | 5.0 | 80.0 | 3.0 |" in page
    assert "| make/600m | not reached |" in page
    assert "\n6 passed, 1 failed, 1 not run.\n\n" in page
    document.planned = ("find", "parity/torch")
    others = next(line for line in document.as_text().splitlines() if line.startswith("Not chosen for this run: "))
    assert "rtx/portable" in others
    assert "parity/torch," not in others
    parts = json.loads((tmp_path / "deep" / "r.json").read_text("utf-8"))["parts"]
    assert list(parts) == [part.name for part in PARTS]
    assert parts["make/600m"] is None
    assert parts["parity/torch"]["status"] == "failed"


def test_a_report_has_no_names_of_the_machine(tmp_path: Path) -> None:
    """tests/bench/test_gpu_check_privacy.py has the kinds of names. Here: all that a report says goes that way."""
    redaction = Redaction({"/home/jane": "~"}, {"jane": "user"})
    document = report(find=GPU)
    document.machine = {**document.machine, "gpu": ["jane's GPU"]}
    document.versions = {"torch": "2.11+jane"}
    document.setup = {"installed": {}, "notes": ["could not install from /home/jane/wheels"]}
    # The page cuts long reasons, and what is left of a name could not be found afterwards.
    cut = "x" * (400 - len(" /home/jan")) + " /home/jane/models"
    found = {"tests": {"tests/x.py::test_y": {"reason": "/home/jane/a.py: jane"}}, "said": ["on jane's machine"]}
    document.outcomes["tests/torch"] = Outcome("failed", cut, found=found, log="parts/tests.log")
    document.write(tmp_path / "r.json", redaction)
    for name in ("r.json", "r.md"):
        text = (tmp_path / name).read_text("utf-8")
        assert "~/wheels" in text
        assert "jan" not in text
    outcome = json.loads((tmp_path / "r.json").read_text("utf-8"))["parts"]["tests/torch"]
    assert outcome["found"]["tests"]["tests/x.py::test_y"]["reason"] == "~/a.py: user"
    assert outcome["reason"].endswith("x ~/models")
    assert document.outcomes["tests/torch"].reason == cut, "the run itself goes on with what it knows"


def test_a_run_tells_nobody_where_it_worked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(
        ["--report", str(tmp_path / "r.json"), "--work", str(tmp_path / "work"), "--device", "cpu"], [part("tells", modules=())]
    )
    assert code == 5
    outcome = json.loads((tmp_path / "r.json").read_text("utf-8"))["parts"]["tells"]
    assert outcome["reason"] == "ValueError: $WORK/x is wrong"
    assert f"{tmp_path}/work/x is wrong" in capsys.readouterr().err, "whoever runs it sees the path"


def test_without_a_gpu_the_report_is_written_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code = main(["--report", str(tmp_path / "r.json"), "--work", str(tmp_path / "work"), "--limit", "90"])
    assert code == 3
    document = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert document["exit_code"] == 3
    assert document["parts"]["find"]["found"]["modules"]["torch"]["no_gpu"].endswith("finds no GPU")
    rest = {name: outcome["reason"] for name, outcome in document["parts"].items() if name != "find"}
    assert len(rest) == len(PARTS) - 1
    assert set(rest.values()) == {"no GPU"}
    assert "No GPU" in (tmp_path / "r.md").read_text("utf-8")


def test_on_a_gpu_that_tensorrt_rtx_does_not_support_nothing_fails(driver_library: Path, tmp_path: Path) -> None:
    """On the stand-in for the driver, as an H100: PyTorch finds no GPU there, and nothing else of the parts does either."""
    only = ("rtx/*", "parity/*", "settings/*", "latency/*")
    words = ["--report", str(tmp_path / "r.json"), "--work", str(tmp_path / "work"), "--limit", "90", "--only", *only]
    done = cuda_driver.run(driver_library, ["-m", "sana_export.bench.gpu_check", *words], CUDA_STAND_IN_CAPABILITY="9.0")
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert document["parts"]["find"]["found"]["backends"][0] == "tensorrt"
    skipped = {name: outcome["reason"] for name, outcome in document["parts"].items() if outcome["status"] == "skipped"}
    assert len(skipped) == len(document["parts"]) - 1
    for name in ("parity/tensorrt-rtx", "settings/tensorrt-rtx", "latency/1600m/tensorrt-rtx"):
        assert skipped[name].startswith("TensorRT-RTX does not support compute capability 9.0")
    page = (tmp_path / "r.md").read_text("utf-8")
    assert "Stand-in GPU, compute capability 9.0." in page


def test_the_table_of_parts_names_functions_that_exist() -> None:
    import importlib
    import inspect

    assert len({one.name for one in PARTS}) == len(PARTS)
    for one in PARTS:
        module, _, function = one.target.partition(":")
        inspect.signature(getattr(importlib.import_module(module), function)).bind(None, **one.arguments)
        assert one.least < one.most
