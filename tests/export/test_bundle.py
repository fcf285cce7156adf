"""An export writes a whole bundle or none, continues after an interruption, and never replaces other files."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import threading
from pathlib import Path

import pytest

from sana_export import files as disk
from sana_export.checkpoint.checkpoint import open_checkpoint
from sana_export.contract import GRAPH_GROUPS, GRAPHS
from sana_export.errors import DependencyError, UsageError
from sana_export.export import bundle as bundle_module
from sana_export.export import graph_files
from sana_export.export.bundle import export_bundle
from sana_export.export.options import parse_pag_layer
from sana_export.export.size import GRAPH_WEIGHTS, OVERHEAD, graph_bytes, text_bytes
from sana_export.manifest import Manifest
from sana_export.synth.checkpoint import MARKER, make_checkpoint

SMALL = ("sampler", "postprocess")


def small_export(checkpoint, output, **options):
    return export_bundle(checkpoint, output, graphs=SMALL, precision="fp32", **options)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def small_bundle(tiny_checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("bundles") / "small"
    small_export(tiny_checkpoint, output)
    return output


@pytest.fixture
def exported(monkeypatch):
    """The names of the graphs that the test exports, in order."""
    names = []
    export_graphs = bundle_module.export_graphs

    def spy(owner, group, *rest):
        names.extend(group)
        return export_graphs(owner, group, *rest)

    monkeypatch.setattr(bundle_module, "export_graphs", spy)
    return names


def test_the_manifest_lists_every_file(small_bundle, tiny_checkpoint):
    manifest = Manifest.load(small_bundle)
    named = {file.path for file in manifest.files} | {file.path for graph in manifest.graphs.values() for file in graph.files}
    assert named | {"manifest.json"} == set(snapshot(small_bundle))
    assert manifest.checkpoint.sha256 == tiny_checkpoint.sha256
    assert manifest.checkpoint.synthetic
    assert manifest.model.native_size == 512


def test_an_up_to_date_bundle_is_kept(small_bundle, tiny_checkpoint, exported):
    before = snapshot(small_bundle)
    small_export(tiny_checkpoint, small_bundle)
    assert exported == []
    assert snapshot(small_bundle) == before


def test_a_bundle_with_a_damaged_file_is_exported_again(tiny_checkpoint, tmp_path, exported):
    output = tmp_path / "b"
    small_export(tiny_checkpoint, output)
    before = snapshot(output)
    (output / "onnx/sampler/model.onnx").write_bytes(b"x")
    small_export(tiny_checkpoint, output)
    assert exported == [*SMALL, *SMALL]
    assert snapshot(output).keys() == before.keys()
    assert len(snapshot(output)["onnx/sampler/model.onnx"]) > 1


def test_other_options_replace_the_bundle(tiny_checkpoint, tmp_path, exported):
    small_export(tiny_checkpoint, tmp_path / "b")
    small_export(tiny_checkpoint, tmp_path / "b", pag_layers=["transformer_blocks.1"])
    assert exported == [*SMALL, *SMALL]
    assert Manifest.load(tmp_path / "b").options.pag_layers == (1,)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_an_interrupted_export_keeps_the_old_bundle_and_continues(tiny_checkpoint, tmp_path, monkeypatch, exported):
    output = tmp_path / "b"
    small_export(tiny_checkpoint, output)
    before = snapshot(output)
    exported.clear()

    def interrupt(progress):
        if progress.doing == "postprocess":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small_export(tiny_checkpoint, output, pag_layers=["1"], on_progress=interrupt)
    assert exported == ["sampler"]
    assert snapshot(output) == before
    small_export(tiny_checkpoint, output, pag_layers=["1"])
    assert exported == ["sampler", "postprocess"]
    assert Manifest.load(output).options.pag_layers == (1,)


def test_a_second_export_to_the_same_place_waits(tiny_checkpoint, tmp_path, exported):
    """It then finds the bundle of the first one and exports nothing."""
    inside, waiting = threading.Event(), threading.Event()

    class Waits(logging.Handler):
        def emit(self, record):
            if "waiting for it" in record.getMessage():
                waiting.set()

    def hold(progress):
        inside.set()
        waiting.wait(30)

    logger, handler = logging.getLogger("sana_export.export.bundle"), Waits()
    logger.addHandler(handler)
    try:
        first = threading.Thread(target=small_export, args=(tiny_checkpoint, tmp_path / "b"), kwargs={"on_progress": hold})
        first.start()
        assert inside.wait(60)
        manifest = small_export(tiny_checkpoint, tmp_path / "b")
        first.join()
    finally:
        logger.removeHandler(handler)
    assert waiting.is_set()
    assert exported == [*SMALL]
    assert set(manifest.graphs) == set(SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_an_export_with_other_options_does_not_continue_an_interrupted_one(tiny_checkpoint, tmp_path, exported):
    def interrupt(progress):
        if progress.doing == "postprocess":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small_export(tiny_checkpoint, tmp_path / "b", pag_layers=["1"], on_progress=interrupt)
    small_export(tiny_checkpoint, tmp_path / "b", pag_layers=["2"])
    assert exported == ["sampler", "sampler", "postprocess"]


def test_the_files_of_another_interrupted_export_are_deleted(tiny_checkpoint, tmp_path):
    def interrupt(progress):
        if progress.doing == "postprocess":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small_export(tiny_checkpoint, tmp_path / "b", on_progress=interrupt)
    export_bundle(tiny_checkpoint, tmp_path / "b", graphs=["postprocess"], precision="fp32")
    assert [path.name for path in (tmp_path / "b" / "onnx").iterdir()] == ["postprocess"]


def test_a_damaged_graph_of_an_interrupted_export_is_exported_again(tiny_checkpoint, tmp_path, exported):
    def interrupt(progress):
        if progress.doing == "postprocess":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small_export(tiny_checkpoint, tmp_path / "b", on_progress=interrupt)
    (tmp_path / "b.partial/onnx/sampler/model.onnx").write_bytes(b"short")
    small_export(tiny_checkpoint, tmp_path / "b")
    assert exported == ["sampler", "sampler", "postprocess"]


def test_a_full_disk_is_reported_and_keeps_the_old_bundle(tiny_checkpoint, tmp_path, monkeypatch):
    output = tmp_path / "b"
    small_export(tiny_checkpoint, output)
    before = snapshot(output)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(graph_files, "export_onnx", full)
    with pytest.raises(DependencyError, match="disk is full"):
        small_export(tiny_checkpoint, output, pag_layers=["1"])
    assert snapshot(output) == before


def test_a_folder_that_cannot_be_written_is_reported(tiny_checkpoint, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DependencyError, match="cannot be written"):
        small_export(tiny_checkpoint, tmp_path / "file" / "bundle")


def test_too_little_disk_space_is_reported_before_anything_is_written(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 1_000_000)
    with pytest.raises(DependencyError, match="too little disk space for the bundle") as raised:
        export_bundle(tiny_checkpoint, tmp_path / "b", precision="fp32")
    assert "1000000 bytes free" in raised.value.found
    options = bundle_module.choose_options(tiny_checkpoint, "fp32", (), None)
    graphs = sum(graph_bytes(name, tiny_checkpoint, options) for name in GRAPH_GROUPS["default"])
    wanted = text_bytes(tiny_checkpoint, options) + OVERHEAD + graphs
    assert raised.value.wanted == f"{wanted} bytes"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", [name for name in GRAPH_WEIGHTS if name in {*GRAPH_GROUPS["default"], *GRAPH_GROUPS["img2img"]}])
def test_the_estimate_of_a_graphs_size(img2img_bundle, tiny_checkpoint, name):
    """The file may be larger, because each tensor starts at a page."""
    manifest = Manifest.load(img2img_bundle)
    estimate = graph_bytes(name, tiny_checkpoint, manifest.options)
    (data,) = manifest.graphs[name].data
    assert estimate * 0.9 <= data.bytes <= estimate + 4096 * 400
    assert graph_bytes(name, tiny_checkpoint, dataclasses.replace(manifest.options, precision="fp16")) == estimate // 2


def test_progress_reports_bytes_and_time(tiny_checkpoint, tmp_path):
    reports = []
    export_bundle(tiny_checkpoint, tmp_path / "b", graphs=["context", "sampler"], precision="fp32", on_progress=reports.append)
    assert [progress.doing for progress in reports] == ["tokenizer, instruction and embeddings", "context", "sampler", "done"]
    assert [progress.done for progress in reports] == [0, 1, 2, 3]
    assert reports[0].bytes_done == 0
    assert reports[0].seconds_left is None
    options = bundle_module.choose_options(tiny_checkpoint, "fp32", (), None)
    assert reports[1].bytes_done == text_bytes(tiny_checkpoint, options)
    assert reports[1].seconds_left > 0
    assert reports[2].bytes_done == reports[2].bytes_total


def test_a_folder_with_other_files_is_refused(tiny_checkpoint, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not a bundle"):
        small_export(tiny_checkpoint, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_damaged_bundle_is_replaced(tiny_checkpoint, tmp_path):
    output = tmp_path / "b"
    small_export(tiny_checkpoint, output)
    document = json.loads((output / "manifest.json").read_text())
    document["options"]["clamp"] = True
    (output / "manifest.json").write_text(json.dumps(document))
    small_export(tiny_checkpoint, output)
    assert not Manifest.load(output).options.clamp


@pytest.mark.parametrize(
    ("dtype", "variant", "clamp"), [("float16", None, True), ("float16", "fp16", True), ("bfloat16", None, False)]
)
def test_the_clamp_of_an_unknown_checkpoint_depends_on_its_stored_dtype(tmp_path, dtype, variant, clamp):
    (make_checkpoint("tiny-random", tmp_path / "c", dtype=dtype, variant=variant) / MARKER).unlink()
    checkpoint = open_checkpoint(str(tmp_path / "c"), weights_variant=variant)
    assert bundle_module.choose_options(checkpoint, "fp16", (), None).clamp is clamp
    assert bundle_module.choose_options(checkpoint, "fp16", (), not clamp).clamp is not clamp


@pytest.mark.parametrize("name", ["transformer_blocks.2", "blocks.2", "2"])
def test_pag_layer_names(name):
    assert parse_pag_layer(name, 3) == 2


@pytest.mark.parametrize("name", ["transformer_blocks.3", "mid", "transformer_blocks.1.", "-1"])
def test_unknown_pag_layers_are_refused(name):
    with pytest.raises(UsageError, match=r"transformer_blocks\.2"):
        parse_pag_layer(name, 3)


def test_unknown_options_are_refused(tiny_checkpoint, tmp_path):
    with pytest.raises(UsageError, match="precision"):
        export_bundle(tiny_checkpoint, tmp_path / "b", precision="int8")
    with pytest.raises(UsageError, match="graph"):
        export_bundle(tiny_checkpoint, tmp_path / "b", graphs=["unet"])
    assert dataclasses.is_dataclass(tiny_checkpoint)
    assert not any(tmp_path.iterdir())


def test_no_group_has_the_name_of_a_graph():
    assert not set(GRAPH_GROUPS) & set(GRAPHS)
    assert set().union(*GRAPH_GROUPS.values()) == set(GRAPHS)
