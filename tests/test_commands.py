"""The command that exports a bundle again repeats everything that the bundle was made from."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest

from sana_export.adapters import Lora
from sana_export.cli.main import parse
from sana_export.cli.verb import model_options
from sana_export.commands import build_command, export_command, model_words, ranges_command
from sana_export.manifest import Checkpoint, Manifest, Options, Overlay

PLAIN = Checkpoint("someone/sana", None, "0" * 64, None, False)
#: Scales of some layers of a LoRA.
SCALES = (("attn2", 0.5), ("transformer_blocks.0-9", -1.0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"revision": "v1"}, ["--revision", "v1"]),
        ({"weights_variant": "bf16"}, ["--variant", "bf16"]),
        ({"weights_variant": "fp16", "variant": "sana-600m-512px"}, ["--variant", "fp16"]),
        ({"source": "sana-600m-512px", "variant": "sana-600m-512px", "weights_variant": "fp16"}, []),
        ({"source": "sana-600m-512px", "variant": "sana-600m-512px", "weights_variant": "bf16"}, ["--variant", "bf16"]),
        ({"transformer": Overlay("a b/t.safetensors", "1")}, ["--transformer", "a b/t.safetensors"]),
        ({"loras": (Overlay("a", "1", 0.7), Overlay("b:2", "2"))}, ["--lora", "a:0.7", "--lora", "b:2:1.0"]),
    ],
)
def test_the_words_that_name_a_checkpoint(changes: dict[str, Any], words: list[str]) -> None:
    checkpoint = dataclasses.replace(PLAIN, **changes)
    assert model_words(checkpoint) == [checkpoint.source, *words]


def test_the_command_parses_to_the_options_of_the_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    overlays = {"transformer": Overlay("own t.safetensors", "1"), "loras": (Overlay("x:1", "2", 0.7, SCALES), Overlay("y", "3"))}
    checkpoint = dataclasses.replace(PLAIN, revision="v1", weights_variant="bf16", **overlays)
    manifest = dataclasses.replace(Manifest.load(tiny_bundle), checkpoint=checkpoint, options=Options("bf16", True, (8,)))
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    options = parse(shlex.split(export_command(tmp_path, Manifest.load(tmp_path)))[1:])
    assert (options.model, options.output, options.dtype, options.clamp) == ("someone/sana", tmp_path, "bf16", True)
    found = model_options(options, options)
    assert (found["revision"], found["weights_variant"], found["transformer"]) == ("v1", "bf16", Path("own t.safetensors"))
    assert found["loras"] == (Lora(Path("x:1"), 0.7, SCALES), Lora(Path("y")))


def test_hub_options_are_parsed_and_the_token_is_never_shown() -> None:
    words = ["export", "someone/sana", "-o", "b", "--token", "hf_secret", "--cache-dir", "c", "--offline"]
    options = parse(words)
    hub = model_options(options, options)["hub"]
    assert (hub.token, hub.cache_dir, hub.offline) == ("hf_secret", Path("c"), True)
    assert "hf_secret" not in repr(hub)
    for verb in (["verify", "b"], ["bench", "b", "--reference", "m"], ["engines", "r.toml"]):
        assert parse([*verb, *words[4:]]).token == "hf_secret"


def test_the_build_command_names_the_size_and_quotes_the_path() -> None:
    line = build_command(Path("my bundles/tiny"), "tensorrt-rtx", height=2048, width=512, batch=2)
    assert line == "sana-export build 'my bundles/tiny' --backend tensorrt-rtx --height 2048 --width 512 --batch 2"
    assert parse(shlex.split(line)[1:]).bundle == Path("my bundles/tiny")


def test_the_ranges_command_names_the_whole_checkpoint(tiny_bundle: Path) -> None:
    overlays = {"transformer": Overlay("own t.safetensors", "1"), "loras": (Overlay("x:1", "2", 0.7),)}
    manifest = dataclasses.replace(Manifest.load(tiny_bundle), checkpoint=dataclasses.replace(PLAIN, revision="v1", **overlays))
    options = parse(shlex.split(ranges_command(Path("a bundle"), manifest))[1:])
    assert (options.verb, options.bundle, options.reference, options.ranges) == ("verify", "a bundle", "someone/sana", True)
    found = model_options(options, options)
    assert (found["revision"], found["transformer"]) == ("v1", Path("own t.safetensors"))
    assert found["loras"] == (Lora(Path("x:1"), 0.7),)
