"""The model card: what it says of a bundle, as the hub's own reader of cards sees it, and what it must not say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from sana_export.hub.bundles.card import base_repository, make_card, private_paths
from sana_export.manifest import Manifest
from sana_export.records import Overlay
from sana_export.variants import VARIANTS

REPO = "me/sana-bundle"
PARITY = {
    "bundle": "/home/alice/bundle",
    "reference": "tiny",
    "backend": "onnxruntime",
    "device": "cpu",
    "passed": False,
    "graphs": [{"name": "denoiser", "cosine": 0.99999, "psnr_db": 61.25, "limit": "cosine >= 0.999", "passed": True}],
    "images": [{"name": "a | <b>\n# red", "cosine": 0.5, "psnr_db": "inf", "limit": "psnr_db >= 40", "passed": False}],
}


def card(bundle: Path, source: str, revision: str | None = None, **fields: Any) -> tuple[str, dict[str, Any]]:
    """The text of a card, and its metadata."""
    manifest = Manifest.load(bundle)
    checkpoint = dataclasses.replace(manifest.checkpoint, source=source, revision=revision, synthetic=False)
    text = make_card(REPO, dataclasses.replace(manifest, checkpoint=checkpoint, **fields))
    return text, ModelCard(text).data.to_dict()


def test_of_a_published_checkpoint(bundle: Path) -> None:
    repo = VARIANTS["sana-1600m-1024px"].repo
    for source in ("sana-1600m-1024px", str(repo)):
        text, data = card(bundle, source)
        assert (data["base_model"], data["license"], data["license_link"]) == (repo, "other", f"https://huggingface.co/{repo}")
        assert (data["pipeline_tag"], data["library_name"]) == ("text-to-image", "sana_export")
        assert {"sana", "onnx", "fp16"} <= set(data["tags"])
        assert "The license that its card names applies" in text
        assert "ai.google.dev/gemma/terms" in text
        assert f'from_pretrained("{REPO}")' in text
        assert "Not measured" in text


def test_of_other_checkpoints(bundle: Path) -> None:
    text, data = card(bundle, "someone/fine-tune", "v1")
    assert (data["base_model"], data["license_link"]) == ("someone/fine-tune", "https://huggingface.co/someone/fine-tune")
    assert "at revision v1" in text
    assert "base_model" not in card(bundle, "a/b](http://evil)")[1]
    text, data = card(bundle, "tiny")
    assert (data["license"], data.get("base_model")) == ("apache-2.0", None)
    text, data = card(bundle, "/home/alice/my checkpoint")
    assert "license" not in data
    assert "a custom checkpoint" in text
    assert "alice" not in text
    text, data = card(bundle, "models/sana")  # a folder, or a hub id
    assert data.keys() & {"base_model", "license", "license_link"} == set()
    assert "models/sana" not in text
    assert "a custom checkpoint" in text


def test_tables_of_graphs_engines_and_parity(engine_bundle: Path) -> None:
    text, data = card(engine_bundle, "tiny", parity=PARITY)
    assert "tensorrt-rtx" in data["tags"]
    assert "| tensorrt-rtx | 1.7.1 | portable | any | default | 1 | 0.0 MB |" in text
    assert "| tensorrt-rtx | 1.7.1 | 7.5 | any | default | 1 | 0.0 MB |" in text
    assert "| `vae_decoder` |" in text
    assert "onnxruntime on cpu: **did not pass**" in text
    assert "| denoiser | 0.99999 | 61.25 | cosine >= 0.999 | yes |" in text
    assert "| a \\| &lt;b> # red | 0.5 | inf | psnr_db >= 40 | **no** |" in text
    assert "alice" not in text


def test_paths_that_a_manifest_gives_away(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    checkpoint = dataclasses.replace(
        manifest.checkpoint, source="/home/alice/sana", loras=(Overlay("~/loras/x.safetensors", "0" * 64), Overlay("x/y", "0" * 64))
    )
    found = private_paths(dataclasses.replace(manifest, checkpoint=checkpoint, parity=PARITY))
    assert found == ["/home/alice/sana", "~/loras/x.safetensors", "/home/alice/bundle"]
    assert private_paths(manifest) == []
    for source in ("C:/Users/alice/sana", "c:\\sana", "..\\sana", "../sana", "models\\sana", "\\\\host\\sana", "~alice/sana"):
        checkpoint = dataclasses.replace(manifest.checkpoint, source=source)
        assert private_paths(dataclasses.replace(manifest, checkpoint=checkpoint)) == [source]


@pytest.mark.parametrize("parity", [{}, {"graphs": None, "passed": True}, {"graphs": ["x"], "images": [{}]}])
def test_an_unusual_report(bundle: Path, parity: dict[str, Any]) -> None:
    assert "## Parity" in card(bundle, "tiny", parity=parity)[0]


def test_a_synthetic_checkpoint_has_no_base(bundle: Path) -> None:
    assert base_repository(Manifest.load(bundle).checkpoint) is None
