"""Ctrl-C and SIGTERM in the middle of a long verb: exit code 130, one line, and existing files stay intact."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from sana_export.manifest import FILE_NAME
from tests.support.command_line import Cli, Ran, command, run_until


def interrupted(ran: Ran) -> None:
    assert ran.code == 130, ran.err
    assert "Traceback" not in ran.err
    assert ran.err.endswith("sana-export: interrupted\n")


def test_export(tiny_checkpoint: Any, bundle_copy: Path, cli: Cli) -> None:
    before = (bundle_copy / FILE_NAME).read_bytes()
    line = command("export", tiny_checkpoint.folder, "-o", bundle_copy, "--dtype", "fp16", "--graphs", "context,sampler")
    ran = run_until("] sampler", line, signal.SIGINT)
    interrupted(ran)
    assert ran.out == ""
    assert (bundle_copy / FILE_NAME).read_bytes() == before
    assert cli("inspect", bundle_copy).code == 0
    partial = bundle_copy.with_name("bundle.partial")
    assert "context" in json.loads((partial / "export.json").read_text())["graphs"]


def test_build(bundle_copy: Path, cli: Cli) -> None:
    pytest.importorskip("tensorrt_rtx")
    line = command("build", bundle_copy, "--backend", "tensorrt-rtx", "--graphs", "sampler,vae_decoder", "--json")
    ran = run_until("[2/2] vae_decoder", line, signal.SIGINT)
    interrupted(ran)
    assert json.loads(ran.out)["exit_code"] == 130
    engines = cli("inspect", bundle_copy, "--json").json["engines"]
    assert [engine["graph"] for engine in engines] == ["sampler"]
    assert all(engine["damaged"] is None for engine in engines)
    held = {path.name for path in (bundle_copy / "engines").rglob("*") if path.is_file()}
    assert held == {"sampler.engine"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_generate(number: signal.Signals, tiny_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.png"
    output.write_bytes(b"an older image")
    ran = run_until("sampling", command("generate", tiny_bundle, "a cat", "-o", output, "--steps", 1000, "-v"), number)
    interrupted(ran)
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
    assert output.read_bytes() == b"an older image"
