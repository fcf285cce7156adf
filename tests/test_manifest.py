"""A manifest is read back as it was written, and changes by others are noticed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil

import pytest

from sana_export import __version__
from sana_export.contract import GRAPHS, resolve
from sana_export.errors import ArtifactError, DependencyError
from sana_export.files import FileEntry, check_files, locked, manifest_lock, read_unlisted
from sana_export.machine import Gpu
from sana_export.manifest import FORMAT, EngineEntry, LoraTarget, Manifest, Overlay, seal
from sana_export.trt.selection import engines_for
from tests.support.engine_entries import ENGINE, THERE


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def test_it_reads_back_what_it_wrote(bundle):
    manifest = Manifest.load(bundle)
    engine = EngineEntry(
        graph="sampler",
        backend="tensorrt-rtx",
        key="k",
        file=FileEntry("engines/x.engine", "0" * 64, 3),
        onnx_sha256="1" * 64,
        backend_version="1.7",
        compute_capabilities=("8.9",),
        operating_system="any",
        profile="default",
        ranges={"batch": (1, 1, 4)},
        options={"tf32": False},
    )
    changed = manifest.with_engine(engine)
    changed.save(bundle)
    assert Manifest.load(bundle) == changed
    assert changed.with_engine(dataclasses.replace(engine, build_seconds=2.0)).engines != changed.engines
    assert len(changed.with_engine(dataclasses.replace(engine, build_seconds=2.0)).engines) == 1


def test_an_old_portable_engine_runs_only_where_its_types_exist(bundle):
    """Of a graph in fp8. Those for named GPUs, and of graphs without fp8, stay as they are."""
    quantized = {"denoiser": "fp8", "vae_decoder": "int8-weight"}
    manifest = Manifest.load(bundle)
    manifest = dataclasses.replace(manifest, options=dataclasses.replace(manifest.options, quantize=quantized))
    engines = {
        name: dataclasses.replace(ENGINE, graph=graph, key=name, compute_capabilities=capabilities)
        for name, graph, capabilities in (
            ("portable", "denoiser", ()),
            ("named", "denoiser", ("12.0",)),
            ("decoder", "vae_decoder", ()),
            ("context", "context", ()),
        )
    }
    for engine in engines.values():
        manifest = manifest.with_engine(engine)
    manifest.save(bundle)
    found = {engine.key: engine for engine in Manifest.load(bundle).engines}
    assert found.pop("portable") == dataclasses.replace(engines["portable"], compute_capabilities=("8.9", "12.0", "12.1"))
    assert found == {name: engine for name, engine in engines.items() if name != "portable"}
    ampere = dataclasses.replace(THERE, gpus=(Gpu("NVIDIA A10", "8.6"),))
    assert {engine.key for engine in engines_for(Manifest.load(bundle), ampere)} == {"decoder", "context"}
    assert {engine.key for engine in engines_for(Manifest.load(bundle), THERE)} == {"portable", "decoder", "context"}


@pytest.mark.parametrize("change", ["option", "hash", "removed key"])
def test_an_edit_by_hand_is_noticed(bundle, change):
    path = bundle / "manifest.json"
    document = json.loads(path.read_text("utf-8"))
    if change == "option":
        document["options"]["clamp"] = not document["options"]["clamp"]
    elif change == "hash":
        document["graphs"]["sampler"]["onnx"]["sha256"] = "0" * 64
    else:
        del document["parity"]
    path.write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match="edited"):
        Manifest.load(bundle)


@pytest.mark.parametrize("changes", [{"format": 99}, {"tool_version": "7.0.1"}])
def test_a_bundle_of_another_version_names_both_versions(bundle, changes):
    dataclasses.replace(Manifest.load(bundle), **changes).save(bundle)
    with pytest.raises(ArtifactError, match="another version") as caught:
        Manifest.load(bundle)
    assert str(*changes.values()) in caught.value.found
    assert __version__ in caught.value.wanted


#: Fields of `LoraTarget` in format 1.
FORMAT_1_NAMES = {"source_rows": "held", "row_offset": "first", "initializer_shape": "stored"}


def test_a_bundle_of_format_1_names_the_command_that_exports_it_again(bundle):
    """The fields of its LoRA targets have other names. Its checkpoint and options can still be read."""
    manifest = Manifest.load(bundle)
    checkpoint = dataclasses.replace(
        manifest.checkpoint,
        source="my models/fox",
        revision="v1",
        loras=(Overlay("style.safetensors", "0" * 64, 0.7, (("attn2", 0.5),)),),
    )
    document = json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(manifest, checkpoint=checkpoint, format=1))))
    targets = [target for graph in document["graphs"].values() for target in graph["lora_targets"]]
    assert targets
    for target in targets:
        for name, former in FORMAT_1_NAMES.items():
            target[former] = target.pop(name)
    (bundle / "manifest.json").write_text(json.dumps({**document, "sha256": seal(document)}))
    with pytest.raises(ArtifactError, match="another version") as caught:
        Manifest.load(bundle)
    assert caught.value.found == f"format 1, written by {__version__}"
    assert caught.value.wanted == f"format {FORMAT}, written by {__version__}"
    assert caught.value.fix == (
        f"sana-export export 'my models/fox' -o {bundle} --revision v1 --lora style.safetensors:0.7,attn2=0.5 "
        "--dtype fp32 --pag-layers transformer_blocks.1"
    )


def test_lora_targets_read_back(bundle):
    manifest = Manifest.load(bundle)
    target = LoraTarget("layer", (8, 4, 1, 1), "weight", (4, 16), "float16", 8, True, 0.5, (2, 6))
    graphs = {**manifest.graphs, "sampler": dataclasses.replace(manifest.graphs["sampler"], lora_targets=(target,))}
    dataclasses.replace(manifest, graphs=graphs).save(bundle)
    assert Manifest.load(bundle).graphs["sampler"].lora_targets == (target,)


def test_a_patch_release_reads_older_bundles(bundle):
    series = ".".join(__version__.split(".")[:2])
    dataclasses.replace(Manifest.load(bundle), tool_version=f"{series}.99").save(bundle)
    Manifest.load(bundle)


def test_an_unknown_field_is_damage(bundle):
    path = bundle / "manifest.json"
    document = json.loads(path.read_text("utf-8"))
    del document["sha256"]
    document["options"]["quantization"] = "int4"
    path.write_text(json.dumps({**document, "sha256": seal(document)}))
    with pytest.raises(ArtifactError, match="damaged"):
        Manifest.load(bundle)


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, "\udcff".encode("utf-8", "surrogateescape")])
def test_a_damaged_manifest_is_reported(bundle, content):
    (bundle / "manifest.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ArtifactError, match="damaged"):
        Manifest.load(bundle)


@pytest.mark.parametrize("damage", ["missing", "shorter", "one bit"])
def test_damaged_files_are_named(bundle, damage):
    entry = Manifest.load(bundle).graphs["denoiser"].data[0]
    path = bundle / entry.path
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "shorter":
        path.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"denoiser/model\.onnx\.data") as caught:
        check_files(bundle, [entry], fix="the command that fixes it")
    assert caught.value.exit_code == 4
    assert caught.value.fix == "the command that fixes it"


@pytest.mark.parametrize(
    "path", ["../outside", "onnx/../../outside", "/etc/hostname", "", ".", "C:\\x", "..\\outside", "\\\\host\\x", "a\0b"]
)
def test_paths_lead_inside(bundle, path):
    (bundle.parent / "outside").write_text("x")
    with pytest.raises(ArtifactError, match="outside itself"):
        check_files(bundle, [FileEntry(path, "0" * 64, 1)], fix="")
    manifest = Manifest.load(bundle)
    dataclasses.replace(manifest, files=(*manifest.files, FileEntry(path, "0" * 64, 1))).save(bundle)
    with pytest.raises(ArtifactError, match="outside itself"):
        Manifest.load(bundle)


def test_a_link_leads_to_the_file_that_the_manifest_knows(bundle):
    outside = bundle.parent / "outside"
    outside.write_text("known")
    (bundle / "link").symlink_to(outside)
    known = hashlib.sha256(b"known").hexdigest()
    assert check_files(bundle, [FileEntry("link", known, 5)], fix="") == [bundle / "link"]
    for entry in (FileEntry("link", "0" * 64, 5), FileEntry("link", known, 6)):
        with pytest.raises(ArtifactError, match="a link to a file outside the bundle that is not the one") as caught:
            check_files(bundle, [entry], fix="")
        assert caught.value.found == "a link", "the error says nothing of what is behind it"


def test_a_pipe_or_a_device_is_not_read(bundle):
    os.mkfifo(bundle / "pipe")
    (bundle / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(ArtifactError, match="missing"):
            check_files(bundle, [FileEntry(name, "0" * 64, 0)], fix="")
        assert read_unlisted(bundle / name) is None


def test_a_file_that_the_manifest_does_not_list_is_no_link(bundle):
    (bundle / "cache").write_text("x")
    (bundle / "linked").symlink_to(bundle / "cache")
    assert read_unlisted(bundle / "cache") == b"x"
    assert read_unlisted(bundle / "linked") is None
    assert read_unlisted(bundle / "nothing") is None


def test_a_lock_is_no_link(bundle, tmp_path):
    manifest_lock(bundle).parent.mkdir()
    manifest_lock(bundle).symlink_to(tmp_path / "made by the lock")
    with pytest.raises(DependencyError, match="cannot be written"), locked(manifest_lock(bundle)):
        pass
    assert not (tmp_path / "made by the lock").exists()


def edited(bundle, edit):
    """Change the manifest's document and seal it again."""
    document = json.loads((bundle / "manifest.json").read_text("utf-8"))
    del document["sha256"]
    edit(document)
    (bundle / "manifest.json").write_text(json.dumps({**document, "sha256": seal(document)}))


@pytest.mark.parametrize(
    ("place", "value", "found"),
    [
        (("model", "vae_scale_factor"), 0, "vae_scale_factor is 0"),
        (("model", "latent_channels"), 10**9, "latent_channels is 1000000000"),
        (("model", "sample_size"), True, "sample_size is a bool, not int"),
        (("model", "instruction"), None, "instruction is a NoneType, not str"),
        (("options", "precision"), "fp8", "precision is 'fp8'"),
        (("options", "pag_layers"), [1.5], r"pag_layers\[0\] is a float, not int"),
        (("files",), {}, "files is a dict, not a list"),
        (("files", 0, "bytes"), "3", r"files\[0\].bytes is a str, not int"),
        (("graphs", "sampler", "spec", "inputs"), 3, "inputs is a int"),
        (("graphs", "denoiser", "lora_targets", 0, "source_rows"), [1, 2, 3], "source_rows is a list, not a list of 2"),
        (("parity",), 3, "parity is a int"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_a_sealed_value_of_another_type_is_damage(bundle, place, value, found):
    def edit(document):
        for key in place[:-1]:
            document = document[key]
        document[place[-1]] = value

    edited(bundle, edit)
    with pytest.raises(ArtifactError, match="damaged") as caught:
        Manifest.load(bundle)
    assert re.search(found, str(caught.value.found)), caught.value.found


def test_a_manifest_has_a_largest_size(bundle, monkeypatch):
    monkeypatch.setattr("sana_export.manifest.MAX_BYTES", 1000)
    with pytest.raises(ArtifactError, match="damaged") as caught:
        Manifest.load(bundle)
    assert "more than 1000 bytes" in caught.value.found


def test_the_contract_leaves_only_dynamic_axes_open(controlnet_bundle):
    manifest = Manifest.load(controlnet_bundle)
    assert set(manifest.graphs) == set(GRAPHS)
    sizes = dict.fromkeys(("latent_channels", "layers", "cross_attention_heads", "cross_attention_head_dim"), 2)
    text = dict.fromkeys(("text_channels", "text_layers", "text_kv_heads", "text_head_dim"), 3)
    for features, branches in (((), "branches"), (("pag_layers",), "text_branches")):  # one axis less without PAG layers
        (context,) = resolve("context", {**sizes, **text}, "float16", features).outputs
        assert context.shape == (2, 2, branches, "batch", 2, "text_tokens", 2)


def test_a_name_without_a_bundle_says_what_is_there(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    found = {}
    for name in ("nothing", "file", "folder"):
        with pytest.raises(ArtifactError, match="is not a bundle") as caught:
            Manifest.load(tmp_path / name)
        found[name] = caught.value.found
    assert found == {"nothing": "no such folder", "file": "a file", "folder": "no manifest.json"}
