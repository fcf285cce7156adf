"""`build_bundle` with the real TensorRT-RTX compiler, in its child process."""

import dataclasses
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from sana_export import disk
from sana_export.errors import ArtifactError, DependencyError, UsageError
from sana_export.manifest import EngineEntry, Manifest, check_files
from sana_export.profiles import PROFILES, custom_profile
from sana_export.trt import bundle as bundle_module
from sana_export.trt import flavour, worker
from sana_export.trt.build import Cancelled, partial_path
from sana_export.trt.bundle import build_bundle, read_instruction_tokens
from sana_export.trt.flavour import load, target_for
from sana_export.trt.plan import PlannedEngine, plan
from sana_export.trt.progress import Progress
from tests.trt.small_bundles import INSTRUCTION_TOKENS, model_info, write_bundle, write_instruction

DEFAULT = PROFILES["default"]


def build(bundle: Path, **options: Any) -> Manifest:
    return build_bundle(bundle, **{"backend": "tensorrt-rtx", "profile": DEFAULT, **options})


def paths(bundle: Path) -> dict[str, str]:
    """graph to path of the engine that the default build makes."""
    target = target_for("tensorrt-rtx", load("tensorrt-rtx"))
    engines = plan(bundle, Manifest.load(bundle), target, DEFAULT, instruction_tokens=INSTRUCTION_TOKENS)
    return {engine.recipe.graph: engine.recipe.path for engine in engines}


def tree(bundle: Path) -> dict[str, bytes]:
    """Every file of the bundle and its content, the locks apart."""
    files = (path for path in bundle.rglob("*") if path.is_file() and ".locks" not in path.parts)
    return {path.relative_to(bundle).as_posix(): path.read_bytes() for path in files}


def built_graphs(into: list[str]) -> Any:
    """An `on_engine` that notes the graphs that were built, in order."""
    return lambda planned, entry: into.append(planned.recipe.graph) if entry is not None else None


def test_every_engine_is_built_recorded_and_laid_out(bundle: Path) -> None:
    wanted = paths(bundle)
    manifest = build(bundle)

    assert manifest == Manifest.load(bundle)
    assert {entry.graph: entry.file.path for entry in manifest.engines} == wanted
    version = load("tensorrt-rtx").__version__
    for entry in manifest.engines:
        assert check_files(bundle, [entry.file], fix="") == [bundle / wanted[entry.graph]]
        assert b"trt" in (bundle / entry.file.path).read_bytes()[:4]
        assert (entry.backend, entry.backend_version) == ("tensorrt-rtx", version)
        assert (entry.compute_capabilities, entry.operating_system, entry.profile) == ((), "any", "default")
        assert entry.options == {"tf32": False}
        assert 0 < entry.build_seconds < 60
    ranges = {entry.graph: entry.ranges for entry in manifest.engines}
    assert ranges["vae_decoder"] == {"batch": (1, 1, 4), "latent_height": (4, 16, 32), "latent_width": (4, 16, 32)}
    assert set(ranges["sampler"]) == {"batch", "branches", "latent_height", "latent_width"}
    inside = {path.relative_to(bundle).as_posix() for path in (bundle / "engines").rglob("*") if path.is_file()}
    assert inside == set(wanted.values())


def test_a_second_build_builds_nothing_and_another_target_only_adds(bundle: Path) -> None:
    built: list[str] = []
    first = build(bundle, on_engine=built_graphs(built))
    before = tree(bundle)

    assert build(bundle, on_engine=built_graphs(built)) == first
    assert built == ["sampler", "vae_decoder"]
    assert tree(bundle) == before

    second = build(bundle, compute_capabilities=("8.9",), graphs=["sampler"], on_engine=built_graphs(built))
    assert built[2:] == ["sampler"]
    assert [entry.compute_capabilities for entry in second.engines] == [(), (), ("8.9",)]
    assert tree(bundle).items() >= {name: data for name, data in before.items() if name != "manifest.json"}.items()


def test_a_stale_engine_is_built_again_and_its_file_goes(bundle: Path) -> None:
    old = {entry.graph: entry for entry in build(bundle).engines}
    write_bundle(bundle, seed=1)
    reasons: list[str] = []

    def note(planned: PlannedEngine, entry: EngineEntry | None) -> None:
        reasons.append(f"{planned.recipe.graph} {planned.reason}")

    engines = build(bundle, on_engine=note).engines
    new = {entry.graph: entry for entry in engines}

    assert {reason.split(" was ")[0] for reason in reasons} == {
        "sampler stale: onnx_sha256",
        "vae_decoder stale: onnx_sha256",
    }
    assert len(engines) == len(new) == 2
    for graph, entry in new.items():
        assert entry.key != old[graph].key
        assert not (bundle / old[graph].file.path).parent.exists()
        check_files(bundle, [entry.file], fix="")


def test_a_damaged_engine_is_built_again(bundle: Path) -> None:
    entry = build(bundle, graphs=["sampler"]).engines[0]
    (bundle / entry.file.path).write_bytes(b"damaged")

    again = build(bundle, graphs=["sampler"]).engines
    assert len(again) == 1
    check_files(bundle, [again[0].file], fix="")


def test_a_custom_size_is_recorded_under_its_name(bundle: Path) -> None:
    profile = custom_profile(model_info(), height=256, width=768, batch=2)
    entry = build(bundle, profile=profile, graphs=["vae_decoder"]).engines[0]

    assert entry.profile == "256x768-b2"
    assert entry.ranges == {"batch": (1, 2, 2), "latent_height": (8, 8, 8), "latent_width": (24, 24, 24)}


def test_progress_reaches_the_caller_in_its_own_thread(bundle: Path) -> None:
    seen: list[Progress] = []
    build(bundle, graphs=["vae_decoder"], on_progress=seen.append)

    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert {progress.graph for progress in seen} == {"vae_decoder"}


def test_an_interrupted_build_goes_on_with_the_next_engine(bundle: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.graph == "vae_decoder":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(bundle, on_progress=interrupt)

    assert [entry.graph for entry in Manifest.load(bundle).engines] == ["sampler"]
    assert [name for name in tree(bundle) if "vae_decoder" in name and "engine" in name] == []
    assert psutil.Process().children() == []
    built: list[str] = []
    manifest = build(bundle, on_engine=built_graphs(built))
    assert built == ["vae_decoder"]
    assert [entry.graph for entry in manifest.engines] == ["sampler", "vae_decoder"]


def test_cancelled_by_the_caller(tmp_path: Path) -> None:
    write_bundle(tmp_path, ["slow"])
    before = tree(tmp_path)
    phases: list[str] = []
    started = time.monotonic()

    with pytest.raises(Cancelled):
        build(tmp_path, on_progress=lambda progress: phases.append(progress.phase), cancelled=lambda: len(phases) > 40)

    assert time.monotonic() - started < 5
    assert tree(tmp_path) == before


INTERRUPTED = """
import sys
from pathlib import Path
from sana_export.profiles import PROFILES
from sana_export.trt.bundle import build_bundle
seen = 0
def report(progress):
    global seen
    seen += 1
    print(progress.phase, flush=True)
try:
    build_bundle(Path(sys.argv[1]), backend="tensorrt-rtx", profile=PROFILES["default"], on_progress=report)
except KeyboardInterrupt:
    sys.exit(130)
"""


def start_slow_build(bundle: Path) -> tuple[subprocess.Popen[str], psutil.Process]:
    """A process that builds `bundle`, brought to the compiler's long silent phase, and the child that compiles."""
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(bundle)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Determining"):
            break
    time.sleep(0.3)
    assert process.poll() is None
    return process, psutil.Process(process.pid).children()[0]


@pytest.mark.parametrize("whole_group", [True, False], ids=["Ctrl-C", "kill -INT"])
def test_sigint_while_the_compiler_is_busy(whole_group: bool, tmp_path: Path) -> None:
    write_bundle(tmp_path, ["slow"])
    before = tree(tmp_path)
    process, compiler = start_slow_build(tmp_path)

    sent = time.monotonic()
    # A terminal sends the signal to the whole foreground group, the compiling child included.
    os.killpg(process.pid, signal.SIGINT) if whole_group else process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)

    assert time.monotonic() - sent < 5  # the compiler alone would need about ten seconds more
    assert (process.returncode, errors) == (130, "")
    assert not compiler.is_running()
    assert tree(tmp_path) == before


def test_the_compiler_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    write_bundle(tmp_path, ["slow"])
    before = tree(tmp_path)
    process, compiler = start_slow_build(tmp_path)

    process.kill()
    process.communicate(timeout=20)
    compiler.wait(timeout=5)

    # What the dead build may have left is of no consequence to the next one.
    left = set(tree(tmp_path)) - set(before)
    assert all(name.endswith(".partial") for name in left)
    assert Manifest.load(tmp_path).engines == ()


def test_two_builds_at_a_time_build_every_engine_once(bundle: Path) -> None:
    code = INTERRUPTED.replace("print(progress.phase, flush=True)", "pass").replace(
        "on_progress=report", "on_engine=lambda planned, entry: entry and print(planned.recipe.graph, flush=True)"
    )
    command = [sys.executable, "-c", code, str(bundle)]
    builders = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [builder.communicate(timeout=60) for builder in builders]

    assert [builder.returncode for builder in builders] == [0, 0, 0]
    assert sorted(" ".join(out for out, _ in outputs).split()) == ["sampler", "vae_decoder"]
    manifest = Manifest.load(bundle)
    assert sorted(entry.graph for entry in manifest.engines) == ["sampler", "vae_decoder"]
    check_files(bundle, [entry.file for entry in manifest.engines], fix="")


def test_what_others_write_into_the_manifest_meanwhile_is_kept(bundle: Path) -> None:
    def verify(planned: PlannedEngine, entry: EngineEntry | None) -> None:
        if entry is None:
            manifest = Manifest.load(bundle)
            dataclasses.replace(manifest, parity={"passed": planned.recipe.graph}).save(bundle)

    assert build(bundle, on_engine=verify).parity == {"passed": "vae_decoder"}


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
@pytest.mark.parametrize("damage", ["change", "remove"])
def test_damaged_onnx_is_found_before_the_compiler_starts(name: str, damage: str, bundle: Path) -> None:
    path = bundle / "onnx" / "vae_decoder" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content) if damage == "change" else path.unlink()
    before = tree(bundle)

    with pytest.raises(ArtifactError, match=f"vae_decoder/{name}") as caught:
        build(bundle, graphs=["vae_decoder"])

    assert "sana-export export" in str(caught.value)
    assert tree(bundle) == before


def test_an_onnx_that_the_compiler_refuses_is_named_across_the_processes(
    bundle: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = Manifest.load(bundle)
    decoder = manifest.graphs["vae_decoder"]
    foreign = dataclasses.replace(manifest.graphs["sampler"], onnx=decoder.onnx, data=decoder.data)
    dataclasses.replace(manifest, graphs={"sampler": foreign}).save(bundle)
    before = tree(bundle)

    with caplog.at_level(logging.INFO), pytest.raises(ArtifactError) as caught:
        build(bundle)

    for words in ("onnx/vae_decoder/model.onnx", "not the graph 'sampler'", "noise_pred float32", "fix:"):
        assert words in str(caught.value)
    assert caught.value.exit_code == 4
    assert capfd.readouterr() == ("", "")
    assert tree(bundle) == before


def test_a_crash_of_the_compiler_is_an_error_and_not_the_end(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash = "import os, sys; print('stack of the compiler', file=sys.stderr, flush=True); os.abort()"
    popen = subprocess.Popen

    def crashing(command: list[str], **options: Any) -> Any:
        return popen([sys.executable, "-c", crash], **options)

    monkeypatch.setattr(worker.subprocess, "Popen", crashing)
    with pytest.raises(ArtifactError, match="ended without an engine of sampler") as caught:
        build(bundle)
    assert "exit code -6" in str(caught.value)
    assert "stack of the compiler" in str(caught.value)


def test_the_folder_of_the_caller_does_not_shadow_the_childs_modules(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise RuntimeError('not the json that was meant')")
    monkeypatch.chdir(tmp_path)

    assert len(build(bundle, graphs=["sampler"]).engines) == 1


def test_full_disk_while_writing_keeps_the_bundle(bundle: Path) -> None:
    destination = bundle / paths(bundle)["sampler"]
    destination.parent.mkdir(parents=True)
    partial_path(destination).symlink_to("/dev/full")
    before = {name: data for name, data in tree(bundle).items() if not name.endswith(".partial")}

    with pytest.raises(DependencyError, match="disk is full") as caught:
        build(bundle)

    assert "run the same command again" in str(caught.value)
    assert tree(bundle) == before
    assert len(build(bundle).engines) == 2


def test_too_little_space_is_told_before_the_compiler_starts(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 1 << 20)
    monkeypatch.setattr(bundle_module, "build_in_child", lambda *args, **options: pytest.fail("compiled"))

    with pytest.raises(DependencyError, match="too little disk space for the engine of sampler"):
        build(bundle)


def test_a_bundle_that_cannot_be_written(bundle: Path) -> None:
    (bundle / "engines").write_text("a file where a folder belongs")

    with pytest.raises(DependencyError, match="cannot be written"):
        build(bundle)
    assert Manifest.load(bundle).engines == ()


def test_a_manifest_that_cannot_be_saved(bundle: Path) -> None:
    (bundle / "manifest.json.tmp").mkdir()

    with pytest.raises(DependencyError, match=r"manifest\.json cannot be written"):
        build(bundle, graphs=["sampler"])


def test_usage_errors_come_before_anything_is_built(bundle: Path) -> None:
    before = tree(bundle)
    for options in (
        {"compute_capabilities": ("9.0",)},
        {"graphs": ["denoiser"]},
        {"backend": "onnxruntime"},
    ):
        with pytest.raises(UsageError):
            build(bundle, **options)
    assert tree(bundle) == before


def test_a_missing_package_comes_before_anything_is_built(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)

    with pytest.raises(DependencyError, match=r'pip install "tensorrt>=10\.12"'):
        build(bundle, backend="tensorrt")


def test_the_other_flavour_is_the_same_code_with_the_other_module(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tensorrt` cannot be installed everywhere: here its name stands for the module at hand, on a machine with a GPU."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "tensorrt.py").write_text("from tensorrt_rtx import *\nfrom tensorrt_rtx import __version__\n")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setattr(flavour, "gpu_compute_capability", lambda: "9.0")

    manifest = build(bundle, backend="tensorrt", graphs=["sampler"])

    entry = manifest.engines[0]
    assert (entry.backend, entry.compute_capabilities) == ("tensorrt", ("9.0",))
    assert entry.operating_system.startswith(sys.platform)
    assert entry.file.path.startswith("engines/tensorrt/")
    caches = list((bundle / "engines" / "tensorrt").glob("timing-*.cache"))
    assert len(caches) == 1
    assert caches[0].stat().st_size > 0
    sys.modules.pop("tensorrt", None)


@pytest.mark.parametrize("tokens", [1, 24, 181])
def test_the_instructions_length_is_read_from_the_bundle(tokens: int, tmp_path: Path) -> None:
    write_instruction(tmp_path, tokens)
    assert read_instruction_tokens(tmp_path) == tokens


@pytest.mark.parametrize("content", [None, b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", b"\xff" * 40])
def test_a_damaged_instruction_is_named(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "instruction.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"instruction\.safetensors is damaged"):
        read_instruction_tokens(tmp_path)
