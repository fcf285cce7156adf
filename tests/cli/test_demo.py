"""`demo`: its options, its end, and eager diffusers beside the bundle."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sana_export.adapters import Lora
from sana_export.cli.eager_reference import EagerReference
from sana_export.cli.main import parse
from sana_export.errors import Cancelled, UsageError
from sana_export.manifest import Manifest
from sana_export.runtime import Request, SanaRuntime
from tests.support.command_line import Cli, command, run_until
from tests.support.lora_files import diffusers_lora, load_transformer

REQUEST = Request("a red circle", negative_prompt="blue", height=512, width=512, num_inference_steps=2, guidance_scale=4.5, seed=5)


@pytest.fixture(scope="module")
def reference(tiny_bundle: Path) -> EagerReference:
    return EagerReference.open(tiny_bundle, "tiny-random", parse(["demo", str(tiny_bundle)]))


def test_a_signal_ends_the_page_and_the_command_succeeds(tiny_bundle: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed (pip install '.[demo]')")
    arguments = command("demo", tiny_bundle, "--port", 0, "--backend", "onnxruntime", "--json")
    ran = run_until("Ctrl-C ends it", arguments, signal.SIGINT)
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["address"].startswith("http://127.0.0.1:")
    assert "Traceback" not in ran.err


def test_a_missing_lora_is_named_before_anything_is_loaded(cli: Cli, tiny_bundle: Path, tmp_path: Path) -> None:
    ran = cli("demo", tiny_bundle, "--lora", tmp_path / "style.safetensors")
    assert (ran.code, "style.safetensors" in ran.err) == (2, True)


def test_another_checkpoint_is_no_reference(cli: Cli, tiny_bundle: Path) -> None:
    ran = cli("demo", tiny_bundle, "--reference", "tiny-sprint")
    assert ran.code == 2
    assert "was not exported from tiny-sprint" in ran.err
    assert "sana-export demo" in ran.err


@pytest.mark.parametrize("pag_scale", [0.0, 3.0])
def test_the_reference_draws_what_the_bundle_draws(reference: EagerReference, tiny_runtime: SanaRuntime, pag_scale: float) -> None:
    request = Request(**{**vars(REQUEST), "pag_scale": pag_scale})
    found = reference.draw(request, 5, (), lambda: False)
    wanted = np.asarray(tiny_runtime.draw(request).images[0], np.int16)
    difference = np.abs(np.asarray(found.image, np.int16) - wanted)
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.999
    assert list(found.seconds) == ["text encoder", "2 steps", "decoder"]
    assert all(0 < value < 60 for value in found.seconds.values())
    assert found.title == f"{'SanaPAGPipeline' if pag_scale else 'SanaPipeline'}, eager on cpu"


def test_the_reference_takes_the_loras_of_the_page(
    reference: EagerReference, tiny_bundle: Path, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    lora = Lora(diffusers_lora(load_transformer(tiny_checkpoint), tmp_path), 2.0)
    plain, styled = (reference.draw(REQUEST, 5, loras, lambda: False).image for loras in ((), (lora,)))
    with SanaRuntime.from_pretrained(tiny_bundle, backend="onnxruntime") as runtime:
        runtime.load_lora(lora.path, lora.scales)
        wanted = np.asarray(runtime.draw(REQUEST).images[0], np.int16)
    assert np.abs(np.asarray(styled, np.int16) - wanted).max() <= 1
    assert np.abs(np.asarray(styled, np.int16) - np.asarray(plain, np.int16)).max() > 8


def test_the_reference_stops_at_its_next_step(reference: EagerReference) -> None:
    asked: list[bool] = []

    def cancelled() -> bool:
        asked.append(True)
        return len(asked) == 2

    with pytest.raises(Cancelled):
        reference.draw(REQUEST, 5, (), cancelled)
    assert len(asked) == 2


def test_the_reference_has_the_overlays_that_the_manifest_names(tiny_bundle: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from sana_export.records import Overlay

    manifest = Manifest.load(tiny_bundle)
    overlay = Overlay(str(tmp_path / "missing.safetensors"), "0" * 64)
    altered = tmp_path / "bundle"
    altered.mkdir()
    replace(manifest, checkpoint=replace(manifest.checkpoint, transformer=overlay), engines=()).save(altered)
    with pytest.raises(UsageError, match=r"missing\.safetensors"):
        EagerReference.open(altered, "tiny-random", parse(["demo", str(altered)]))
