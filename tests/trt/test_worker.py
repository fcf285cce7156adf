"""The compiler in a child process: its progress, interruptions and crashes, and several builds at once."""

import dataclasses
import mmap
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from sana_export.environment import peak_rss_bytes
from sana_export.errors import ArtifactError, Cancelled, DependencyError
from sana_export.files import check_files
from sana_export.manifest import EngineEntry, Manifest
from sana_export.progress import Progress
from sana_export.trt.plan import PlannedEngine
from tests.support.engine_builds import INTERRUPTED, build, built_graphs, start_slow_build, tree
from tests.support.small_bundles import write_bundle


def test_an_interrupted_build_goes_on_with_the_next_engine(bundle: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.doing.startswith("vae_decoder: "):
            raise KeyboardInterrupt

    before = psutil.Process().children()  # a test that spawned a process leaves Python's resource tracker behind
    with pytest.raises(KeyboardInterrupt):
        build(bundle, on_progress=interrupt)

    assert [entry.graph for entry in Manifest.load(bundle).engines] == ["sampler"]
    assert [name for name in tree(bundle) if "vae_decoder" in name and "engine" in name] == []
    assert psutil.Process().children() == before
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
        build(tmp_path, on_progress=lambda progress: phases.append(progress.doing), cancelled=lambda: len(phases) > 40)

    assert time.monotonic() - started < 5
    assert tree(tmp_path) == before


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
    code = INTERRUPTED.replace("print(progress.doing, flush=True)", "pass").replace(
        "on_progress=report", "on_engine=lambda planned, entry: entry and print(planned.spec.graph, flush=True)"
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
            dataclasses.replace(manifest, parity={"passed": planned.spec.graph}).save(bundle)

    assert build(bundle, on_engine=verify).parity == {"passed": "vae_decoder"}


def test_a_crash_of_the_compiler_is_an_error_and_not_the_end(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash = "import os, sys; print('stack of the compiler', file=sys.stderr, flush=True); os.abort()"
    popen = subprocess.Popen

    def crashing(command: list[str], **options: Any) -> Any:
        return popen([sys.executable, "-c", crash], **options)

    monkeypatch.setattr(subprocess, "Popen", crashing)
    with pytest.raises(ArtifactError, match="ended without an engine of sampler") as caught:
        build(bundle)
    assert "exit code -6" in str(caught.value)
    assert "stack of the compiler" in str(caught.value)


def test_a_build_that_runs_out_of_memory_reports_its_peak(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When memory runs out, the system kills the largest process with signal 9. Here the child kills itself."""
    held = 300 << 20
    kill = f"import os, signal, time; held = b'x' * {held}; time.sleep(1); os.kill(os.getpid(), signal.SIGKILL)"
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: popen([sys.executable, "-c", kill], **options))
    before = tree(bundle)

    with pytest.raises(DependencyError, match="killed the build of sampler: there is too little memory") as caught:
        build(bundle)

    assert "run the same command again" in str(caught.value.fix)
    seen = re.search(r"signal 9\) with (\d+) bytes", str(caught.value.found))
    assert seen is not None
    assert held < int(seen[1]) < held + (100 << 20)
    assert tree(bundle) == before


def test_the_peak_is_that_of_the_compiler_and_not_of_its_caller(bundle: Path) -> None:
    (entry,) = build(bundle, graphs=["sampler"]).engines
    held = bytearray(entry.build_peak_bytes * 2)
    held[:: mmap.PAGESIZE] = b"x" * len(range(0, len(held), mmap.PAGESIZE))
    (bundle / entry.file.path).unlink()

    (again,) = build(bundle, graphs=["sampler"]).engines

    assert peak_rss_bytes() > len(held)
    assert 0.5 < again.build_peak_bytes / entry.build_peak_bytes < 1.5


def test_the_folder_of_the_caller_does_not_shadow_the_childs_modules(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise RuntimeError('not the json that was meant')")
    monkeypatch.chdir(tmp_path)

    assert len(build(bundle, graphs=["sampler"]).engines) == 1


def test_progress_reaches_the_caller_in_its_own_thread(bundle: Path) -> None:
    seen: list[Progress] = []
    threads: set[int] = set()

    def note(progress: Progress) -> None:
        seen.append(progress)
        threads.add(threading.get_ident())

    build(bundle, on_progress=note)

    assert threads == {threading.get_ident()}
    finished = [progress.done for progress in seen]
    assert finished == sorted(finished)
    assert {progress.total for progress in seen} == {2}
    last = {progress.doing.split(": ")[0]: progress.done for progress in seen}
    assert last == {"sampler": 1.0, "vae_decoder": 2.0}
