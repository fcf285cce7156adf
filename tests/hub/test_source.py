"""A bundle by its folder or by its repository: which one a name means, what is downloaded, the cache, and every refusal."""

from __future__ import annotations

import dataclasses
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sana_export.cli.verb import bundle_to_read
from sana_export.errors import ArtifactError, DependencyError, SanaExportError, UsageError
from sana_export.hub.bundles.fetch import pull_bundle
from sana_export.hub.bundles.push import push_bundle
from sana_export.hub.bundles.source import find_bundle
from sana_export.hub.client import Hub
from sana_export.hub.origin import HubOrigin, origin_of
from sana_export.manifest import Manifest
from sana_export.runtime import SanaRuntime
from tests.support.command_line import Cli
from tests.support.engine_entries import THERE
from tests.support.hub_server import LocalHub
from tests.support.small_bundles import write_bundle

REPO = "me/sana-bundle"
SMALL: dict[str, Any] = {"height": 96, "width": 160, "use_resolution_binning": False, "num_inference_steps": 2, "seed": 1}


def test_a_repository_draws_what_its_bundle_draws(
    tiny_bundle: Path, tiny_runtime: SanaRuntime, local_hub: LocalHub, tmp_path: Path, cli: Cli
) -> None:
    push_bundle(tiny_bundle, REPO)
    wanted = np.asarray(tiny_runtime("a red fox", **SMALL).images[0])
    with SanaRuntime.from_pretrained(REPO, backend="onnxruntime") as runtime:
        np.testing.assert_array_equal(np.asarray(runtime("a red fox", **SMALL).images[0]), wanted)
    downloads, log = list(local_hub.downloads), list(local_hub.log)
    assert set(downloads) == {entry.path for entry in runtime.manifest.entries()} | {"manifest.json"}
    with SanaRuntime.from_pretrained(REPO, backend="onnxruntime", local_files_only=True) as runtime:
        assert runtime.bundle.is_relative_to(tmp_path / "hf-cache")
    assert local_hub.log == log
    words = ["--height", 96, "--width", 160, "--no-resolution-binning", "--steps", 2, "--seed", 1]
    ran = cli("generate", f"{REPO}@main", "a red fox", "-o", tmp_path / "fox.png", *words, "--backend", "onnxruntime", "--json")
    assert ran.code == 0, ran.err
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "fox.png")), wanted)
    assert local_hub.downloads == downloads


def test_a_folder_wins_over_a_repository_of_its_name(bundle: Path, local_hub: LocalHub, tmp_path: Path, monkeypatch: Any) -> None:
    push_bundle(bundle, REPO)
    local_hub.log.clear()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bundle, tmp_path / REPO)
    assert find_bundle(REPO) == Path(REPO)
    with pytest.raises(UsageError, match="is a folder and has no revisions"):
        find_bundle(REPO, "v1")
    shutil.rmtree(tmp_path / REPO)
    assert find_bundle(Path(REPO)) == Path(REPO)  # a Path is always a folder
    assert local_hub.log == []
    assert find_bundle(REPO).parts[-3] == "models--me--sana-bundle"


def test_a_folder_that_is_called_like_a_hub(bundle: Path, local_hub: LocalHub, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("hf.company/bundle", "hf.co/bundle", "huggingface.co/me/sana-bundle"):
        shutil.copytree(bundle, tmp_path / name)
        assert find_bundle(name) == Path(name)
    assert find_bundle(Path("hf.co/me/none")) == Path("hf.co/me/none")
    assert local_hub.log == []
    commit = push_bundle(bundle, REPO).commit
    assert find_bundle(f"https://huggingface.co/{REPO}").name == commit  # an address is never a folder
    assert find_bundle(f"HuggingFace.co/{REPO}/tree/main").name == commit


@pytest.mark.parametrize("backend", ["tensorrt-rtxx", "", 5])
def test_a_mistyped_backend_is_refused_before_a_download(bundle: Path, local_hub: LocalHub, cli: Cli, backend: Any) -> None:
    push_bundle(bundle, REPO)
    local_hub.log.clear()
    with pytest.raises(UsageError, match=r"no backend named|backend is not a name"):
        SanaRuntime.from_pretrained(REPO, backend=backend)
    if backend:
        ran = cli("generate", REPO, "a red fox", "-o", "fox.png", "--backend", backend)
        assert (ran.code, "there is no backend named" in ran.err) == (2, True)
    assert local_hub.log == []


def test_a_verb_that_writes_says_how_to_get_a_folder(local_hub: LocalHub, cli: Cli) -> None:
    ran = cli("build", REPO, "--backend", "tensorrt-rtx")
    assert ran.code == 4
    assert f"sana-export pull {REPO} -o sana-bundle" in ran.err


@pytest.mark.parametrize("name", [REPO, f"{REPO}@main", f"https://huggingface.co/{REPO}", f"huggingface.co/{REPO}/tree/main"])
def test_names_of_a_repository(bundle: Path, local_hub: LocalHub, name: str) -> None:
    commit = push_bundle(bundle, REPO).commit
    folder = find_bundle(name)
    assert folder.name == commit == find_bundle(REPO, commit).name
    assert Manifest.load(folder) == Manifest.load(bundle)
    assert origin_of(folder) == HubOrigin(REPO, commit, cache=folder.parents[2])


@pytest.mark.parametrize(
    ("name", "revision", "kind", "words"),
    [
        ("bundle", None, ArtifactError, ("no such folder, and not a hub id", "the folder of a bundle, or the hub id")),
        ("a/b/c", None, ArtifactError, ("no such folder, and not a hub id",)),
        ("./a/b", None, ArtifactError, ("no such folder, and not a hub id",)),
        ("~/b", None, ArtifactError, ("no such folder, and not a hub id",)),
        ("", None, UsageError, ("the bundle is not a path",)),
        (5, None, UsageError, ("the bundle is not a path",)),
        ("me/none", None, UsageError, ("the hub has no repository me/none, or it is private", "there is no folder me/none here")),
        ("me/a--b", None, UsageError, ("is not a hub id",)),
        (f"{REPO}@v1", "v2", UsageError, ("name two revisions",)),
        (REPO, "v9", UsageError, ("has no revision 'v9'", f"https://huggingface.co/{REPO}/commits")),
        ("https://example.com/a/b", None, UsageError, ("is not the address of a model on the hub",)),
        (
            f"https://huggingface.co/{REPO}/blob/main/manifest.json",
            None,
            UsageError,
            ("is a part of a", "sana-export pull"),
        ),
    ],
)
def test_names_of_nothing(
    bundle: Path, local_hub: LocalHub, name: Any, revision: str | None, kind: type[SanaExportError], words: tuple[str, ...]
) -> None:
    push_bundle(bundle, REPO)
    with pytest.raises(kind) as caught:
        find_bundle(name, revision)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"model_index.json": b"{}"}, ("a checkpoint in diffusers' format", "sana-export export me/other -o other-bundle")),
        (
            {"pytorch_lora_weights.safetensors": b"x"},
            ("a LoRA (pytorch_lora_", "hf download me/other", "--lora other"),
        ),
        ({"checkpoints/Sana.pth": b"x"}, ("pickled weights (checkpoints/Sana.pth)",)),
        ({"README.md": b"x"}, ("no manifest.json among its 1 files",)),
        ({}, ("no manifest.json among its 0 files", "sana-export push other-bundle me/other")),
    ],
    ids=["checkpoint", "LoRA", "pickle", "card", "empty"],
)
def test_repositories_without_a_bundle_are_called_what_they_are(
    local_hub: LocalHub, files: dict[str, bytes], words: tuple[str, ...], cli: Cli
) -> None:
    local_hub.put("me/other", files)
    ran = cli("inspect", "me/other")
    assert ran.code == 4
    assert "me/other is not a bundle" in ran.err
    assert all(word in ran.err for word in words), ran.err
    assert local_hub.downloads == []


def test_a_private_repository_needs_a_token(bundle: Path, local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    push_bundle(bundle, REPO, private=True)
    monkeypatch.delenv("HF_TOKEN")
    for token in (None, "hf_other"):
        with pytest.raises(UsageError, match="no repository me/sana-bundle, or it is private"):
            find_bundle(REPO, hub=Hub(token))
    assert find_bundle(REPO, hub=Hub("hf_owner")).is_dir()
    assert local_hub.log[-1].startswith("GET ")


def test_a_hub_that_is_down(bundle: Path, local_hub: LocalHub, caplog: pytest.LogCaptureFixture) -> None:
    push_bundle(bundle, REPO)
    local_hub.status = 503
    with pytest.raises(DependencyError, match=f"the hub refused to send {REPO}"):
        find_bundle(REPO)
    local_hub.status = None
    folder = find_bundle(REPO)
    local_hub.status = 503
    assert find_bundle(REPO) == folder
    (folder / "instruction.safetensors").unlink()
    with pytest.raises(DependencyError, match=f"the hub refused to send {REPO}"):
        find_bundle(REPO)
    assert f"The copy of {folder.name[:12]} in the cache is used" in caplog.text


@pytest.mark.parametrize("revision", [None, "v1"])
def test_a_download_that_stopped_leaves_the_former_commit_in_use(
    bundle: Path, local_hub: LocalHub, tmp_path: Path, revision: str | None
) -> None:
    old = push_bundle(bundle, REPO, branch=revision).commit
    assert find_bundle(REPO, revision).name == old
    write_bundle(tmp_path / "new", seed=1)
    new = push_bundle(tmp_path / "new", REPO, branch=revision).commit
    local_hub.cut["onnx/vae_decoder/model.onnx.data"] = (0, 99)
    for _ in range(2):
        with pytest.raises(DependencyError, match="broke off"):
            find_bundle(REPO, revision)
        assert find_bundle(REPO, revision, Hub(offline=True)).name == old
    local_hub.status = 503
    assert find_bundle(REPO, revision).name == old
    local_hub.status = None
    pull_bundle(REPO, tmp_path / "elsewhere", revision=old)  # a folder is not the cache
    local_hub.cut.clear()
    assert find_bundle(REPO, revision).name == new == find_bundle(REPO, revision, Hub(offline=True)).name
    requests = len(local_hub.log)
    find_bundle(REPO, revision)
    assert len(local_hub.log) == requests + 1


def test_a_server_that_is_no_hub(local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.hub_server.Handler.info", None, raising=False)
    monkeypatch.setattr("tests.support.hub_server.ROUTES", [(r".*", lambda self, *_: self._send(200, b"<html>log in</html>"))])
    with pytest.raises(DependencyError, match="answer about me/sana-bundle is not a hub's"):
        find_bundle(REPO)


def test_offline(bundle: Path, local_hub: LocalHub) -> None:
    push_bundle(bundle, REPO)
    local_hub.log.clear()
    with pytest.raises(DependencyError, match="is not in the cache, and offline mode is on"):
        find_bundle(REPO, hub=Hub(offline=True))
    assert local_hub.log == []
    folder = find_bundle(REPO)
    assert find_bundle(REPO, hub=Hub(offline=True)) == folder
    (folder / "instruction.safetensors").unlink()
    with pytest.raises(DependencyError, match="offline mode is on") as caught:
        find_bundle(REPO, hub=Hub(offline=True))
    assert "instruction.safetensors" in str(caught.value)


def test_only_engines_that_the_chosen_backend_runs_here(engine_bundle: Path, local_hub: LocalHub, monkeypatch: Any) -> None:
    push_bundle(engine_bundle, REPO)
    monkeypatch.setattr("sana_export.hub.bundles.source.detect_host", lambda device: THERE)

    def engines(**options: Any) -> list[str]:
        folder = find_bundle(REPO, **options)
        return [path.parent.name for path in sorted(folder.glob("engines/*/*/*.engine"))]

    assert engines(backend="onnxruntime") == []
    assert engines(backend="tensorrt") == []
    assert engines(hub=Hub(offline=True)) == []  # not in the cache, and not needed
    assert engines(backend="tensorrt-rtx") == ["a1"]
    assert engines() == ["a1"]


@pytest.mark.parametrize(("backend", "wanted"), [("auto", ["a1"]), (None, ["a1"]), ("onnxruntime", [])])
def test_the_engines_of_a_command(
    engine_bundle: Path, local_hub: LocalHub, monkeypatch: Any, backend: str | None, wanted: list[str]
) -> None:
    push_bundle(engine_bundle, REPO)
    monkeypatch.setattr("sana_export.hub.bundles.source.detect_host", lambda device: THERE)
    folder = bundle_to_read(Namespace(bundle=REPO, token=None, cache_dir=None, offline=False), backend=backend)
    assert [path.parent.name for path in folder.glob("engines/*/*/*.engine")] == wanted


def test_without_huggingface_hub(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub.constants", None)
    assert find_bundle(str(bundle)) == bundle
    with pytest.raises(DependencyError, match="loading me/x from the hub needs a package that is not installed") as caught:
        find_bundle("me/x")
    assert "[hub]" in str(caught.value)


def test_fixes_of_a_bundle_in_the_cache_do_not_change_the_cache(bundle: Path, local_hub: LocalHub) -> None:
    from sana_export.commands import engines_command, export_command, repair_command

    commit = push_bundle(bundle, REPO).commit
    folder = find_bundle(REPO)
    manifest, pull = Manifest.load(folder), f"sana-export pull {REPO} --revision {commit}"
    assert repair_command(folder, manifest) == f"{pull} --cache-dir {folder.parents[2]}"
    assert " -o sana-bundle" in export_command(folder, manifest)
    pulled = f"{pull} -o sana-bundle --cache-dir {folder.parents[2]} && sana-export build sana-bundle --backend tensorrt-rtx"
    assert engines_command(folder, "tensorrt-rtx") == pulled
    default = dataclasses.replace(origin_of(folder) or HubOrigin("", ""), cache=Path("/home/me/.cache/huggingface/hub"))
    assert default.pull_command() == pull


@pytest.mark.parametrize(
    "record",
    [
        *("", "null", "[]", '{"repo": 1, "commit": 2}', '{"repo": "a/b", "commit": "x"}'),
        '{"repo": "a/b; rm -rf ~", "commit": "0123456789012345678901234567890123456789"}',
    ],
)
def test_a_record_of_the_origin_that_is_not_ours_is_ignored(bundle: Path, record: str) -> None:
    (bundle / "hub.json").write_text(record)
    assert origin_of(bundle) is None
