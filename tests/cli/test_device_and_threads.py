"""--device and --threads reach the runtime, and ONNX Runtime's sessions get the threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sana_export.bench import rounds as bench_rounds
from sana_export.bench import run as bench_run
from sana_export.bench.candidates.runtime import load as load_candidate
from sana_export.bench.candidates.table import Job
from sana_export.bench.candidates.worker import WorkerFailed
from sana_export.bench.workload import Workload, load_workload
from sana_export.errors import UsageError
from sana_export.runtime.backends.base import BackendSettings
from sana_export.verify.bundle import Sampling, verify_bundle
from tests.support.command_line import Cli

GENERATE = ("--height", 64, "--width", 64, "--no-resolution-binning", "--steps", 1)
QUICK = ("--prompt", "a cat", "--height", 64, "--width", 64, "--steps", 1)
MODEL = ("--reference", "tiny-random")


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[BackendSettings]:
    """The settings that runtimes open their backends with. No backend is opened."""
    found: list[BackendSettings] = []

    def refuse(backend: Any, bundle: Path, manifest: Any, settings: BackendSettings) -> None:
        found.append(settings)
        raise UsageError("no backend in this test")

    monkeypatch.setattr("sana_export.runtime.pipeline.open_backend", refuse)
    return found


@pytest.mark.parametrize(
    ("options", "device", "threads"),
    [((), None, None), (("--device", 3), 3, None), (("--threads", 2), None, 2), (("--device", 0, "--threads", 1), 0, 1)],
)
@pytest.mark.parametrize("verb", ["generate", "verify"])
def test_the_runtime_gets_both(
    verb: str,
    options: tuple[object, ...],
    device: int | None,
    threads: int | None,
    settings: list[BackendSettings],
    tiny_bundle: Path,
    tiny_checkpoint: Any,
    tmp_path: Path,
    cli: Cli,
) -> None:
    rest = ("a cat", "-o", tmp_path / "x.png") if verb == "generate" else MODEL
    ran = cli(verb, tiny_bundle, *rest, *options)
    assert (ran.code, "no backend in this test" in ran.err) == (2, True), ran.err
    assert settings == [BackendSettings(device, threads)]


@pytest.mark.parametrize("section", ["sample", "verify"])
def test_a_recipe_gives_both_to_the_runtime(
    section: str, settings: list[BackendSettings], bundle_copy: Path, tiny_checkpoint: Any, tmp_path: Path, cli: Cli
) -> None:
    recipe = tmp_path / "recipe.toml"
    sample = f'prompt = "a cat"\noutput = "{tmp_path}/x.png"\n' if section == "sample" else ""
    recipe.write_text(
        f'model = "tiny-random"\noutput = "{bundle_copy}"\nprecision = "fp32"\npag_layers = ["transformer_blocks.1"]\n'
        f"[{section}]\n{sample}device = 1\nthreads = 2\n"
    )
    ran = cli("engines", recipe)
    assert "no backend in this test" in ran.err
    assert settings == [BackendSettings(1, 2)]


@pytest.mark.parametrize(("options", "threads"), [((), 0), (("--threads", 2), 2)])
def test_generate_with_threads(
    options: tuple[object, ...], threads: int, session_threads: list[int], tiny_bundle: Path, tmp_path: Path, cli: Cli
) -> None:
    ran = cli("generate", tiny_bundle, "a cat", "-o", tmp_path / "x.png", *GENERATE, "--backend", "onnxruntime", *options)
    assert ran.code == 0, ran.err
    assert len(session_threads) >= 6
    assert set(session_threads) == {threads}


def test_verify_with_threads(session_threads: list[int], bundle_copy: Path, tiny_checkpoint: Any) -> None:
    sampling = Sampling(prompts=["a cat"], height=64, width=64, steps=1)
    report = verify_bundle(bundle_copy, tiny_checkpoint, sampling, backend="onnxruntime", threads=2)
    assert report.passed
    assert set(session_threads) == {2}


def test_a_candidate_of_bench_with_threads(session_threads: list[int], tiny_bundle: Path, tiny_checkpoint: Any) -> None:
    job = Job("onnxruntime", str(tiny_bundle), str(tiny_checkpoint.folder), None, "fp32", False, (), 2, load_workload("smoke"))
    load_candidate(job)
    assert set(session_threads) == {2}


def test_bench_gives_both_to_every_process(tiny_bundle: Path, tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Job] = []

    def refuse(job: Job) -> None:
        jobs.append(Job.from_json(job.as_json()))
        raise WorkerFailed("no process in this test")

    monkeypatch.setattr(bench_run, "Worker", refuse)
    monkeypatch.setattr(bench_rounds, "Worker", refuse)
    work = Workload("own", 64, 64, 1, 4.5, ("x",), device="cuda", sweep=({"images_per_prompt": 2},))
    report = bench_run.run_bench(
        tiny_bundle, tiny_checkpoint, backends=("eager", "onnxruntime"), workload=work, device=1, threads=3
    )
    assert report.threads == 3
    assert {(job.device, job.threads) for job in jobs} == {(1, 3)}
    assert {job.backend for job in jobs} == {"eager", "onnxruntime"}


def test_a_workload_on_the_cpu_has_no_device(tiny_bundle: Path, tiny_checkpoint: Any, cli: Cli) -> None:
    ran = cli("bench", tiny_bundle, *MODEL, "--workload", "smoke", "--device", 0)
    assert ran.code == 2
    assert "the workload smoke runs on the CPU" in ran.err
    assert "leave out --device" in ran.err


@pytest.mark.parametrize("mode", [("verify", "--ranges"), ("bench", *MODEL, "--profile")])
def test_modes_without_a_device_refuse_it(mode: tuple[str, ...], tiny_bundle: Path, cli: Cli) -> None:
    ran = cli(mode[0], tiny_bundle, *mode[1:], "--device", 0)
    assert ran.code == 2
    assert mode[-1] in ran.err
    assert "leave out --device" in ran.err


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [
        *(("--device", value, 0) for value in (-1, "1.5", "gpu", "")),
        *(("--threads", value, 1) for value in (-2, 0, "2.0", "all", "")),
    ],
)
@pytest.mark.parametrize(
    "command", [("generate", "bundle", "a cat", "-o", "x.png"), ("verify", "bundle", *MODEL), ("bench", "bundle", *MODEL)]
)
def test_other_values_are_usage_errors(command: tuple[str, ...], option: str, value: object, least: int, cli: Cli) -> None:
    ran = cli(*command, option, value)
    assert ran.code == 2
    assert f"argument {option}: {str(value)!r} is not a whole number from {least} to {1023 + least}" in ran.err
    assert f"sana-export {command[0]} --help" in ran.err
