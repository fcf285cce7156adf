"""`pull`: a bundle from the hub as a folder, whole or not at all. Broken downloads, wrong files, full disks, engines."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from sana_export.errors import ArtifactError, DependencyError, UsageError
from sana_export.files import check_files
from sana_export.hub.bundles.fetch import fetch_files, pull_bundle
from sana_export.hub.bundles.push import push_bundle
from sana_export.hub.client import Hub
from sana_export.hub.origin import HubOrigin, origin_of
from sana_export.machine import Gpu
from sana_export.manifest import Manifest
from sana_export.trt.selection import engines_for, runnable
from tests.hub.conftest import add_engine
from tests.support.command_line import Cli, command
from tests.support.engine_entries import ADA, THERE
from tests.support.hub_server import LocalHub, environment

REPO = "me/sana-bundle"
DATA = "onnx/vae_decoder/model.onnx.data"
TURING = dataclasses.replace(THERE, gpus=(Gpu("NVIDIA RTX 2080", "7.5"),))


def content(folder: Path) -> dict[str, bytes]:
    """The files of a bundle by path, without locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != ".locks")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_folder_equals_the_bundle_and_nothing_else_is_downloaded(bundle: Path, local_hub: LocalHub, tmp_path: Path) -> None:
    push_bundle(bundle, REPO)
    local_hub.put(REPO, {**local_hub.files(REPO), "virus.py": b"import os", "onnx/other.bin": b"x" * 1000})
    pulled = pull_bundle(REPO, tmp_path / "out")
    found = content(tmp_path / "out")
    assert found.pop("hub.json")
    assert found == content(bundle)
    assert set(local_hub.downloads) == set(found)
    assert (len(pulled.downloaded), pulled.bytes) == (len(found) - 1, sum(map(len, found.values())) - len(found["manifest.json"]))
    assert origin_of(tmp_path / "out") == HubOrigin(REPO, pulled.origin.commit, folder=tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_the_command(bundle: Path, local_hub: LocalHub, tmp_path: Path, cli: Cli) -> None:
    push_bundle(bundle, REPO)
    ran = cli("pull", f"{REPO}@main", "-o", tmp_path / "out", "--json")
    assert (ran.code, ran.json["downloaded"]["files"], ran.json["engines_left"]) == (0, 4, [])
    assert "every file matches the manifest" in cli("pull", REPO).out
    assert cli("inspect", REPO, "--json").json["damaged"] == {}


def test_a_connection_that_breaks_is_continued(
    bundle: Path, local_hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100)
    push_bundle(bundle, REPO)
    local_hub.cut[DATA] = (1000, 2)
    local_hub.sent = 0
    pull_bundle(REPO, tmp_path / "out")
    assert (tmp_path / "out" / DATA).read_bytes() == (bundle / DATA).read_bytes()
    assert local_hub.downloads.count(DATA) == 3
    assert local_hub.sent == sum(len(data) for name, data in content(bundle).items())  # no byte twice


def test_one_that_breaks_for_good_is_an_error_and_the_next_pull_keeps_what_is_complete(
    bundle: Path, local_hub: LocalHub, tmp_path: Path
) -> None:
    push_bundle(bundle, REPO)
    local_hub.cut[DATA] = (0, 99)
    with pytest.raises(DependencyError, match=f"broke off during a transfer of {REPO}") as caught:
        pull_bundle(REPO, tmp_path / "out")
    assert "run the same command again" in str(caught.value)
    assert not (tmp_path / "out").exists()
    local_hub.cut.clear()
    local_hub.downloads.clear()
    pull_bundle(REPO, tmp_path / "out")
    assert local_hub.downloads == [DATA]


def test_an_interrupted_pull_leaves_no_folder_and_continues(bundle: Path, local_hub: LocalHub, tmp_path: Path) -> None:
    push_bundle(bundle, REPO)
    local_hub.hold.add(DATA)
    arguments = command("pull", REPO, "-o", tmp_path / "out", "-v")
    process = subprocess.Popen(
        arguments, env={**os.environ, **environment(local_hub, tmp_path / "c", "hf_owner")}, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while DATA not in local_hub.downloads and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert not (tmp_path / "out").exists()
    local_hub.hold.clear()
    local_hub.downloads.clear()
    pull_bundle(REPO, tmp_path / "out", hub=Hub(cache_dir=tmp_path / "c"))
    assert local_hub.downloads == [DATA]
    assert content(tmp_path / "out").keys() - {"hub.json"} == content(bundle).keys()


@pytest.mark.parametrize("output", [True, False], ids=["folder", "cache"])
def test_other_bytes_than_promised_are_refused_and_not_kept(
    bundle: Path, local_hub: LocalHub, tmp_path: Path, output: bool
) -> None:
    push_bundle(bundle, REPO)
    local_hub.wrong.add(DATA)
    for _ in range(2):
        with pytest.raises(ArtifactError, match=f"{DATA} of {REPO} is not the file that its manifest lists") as caught:
            pull_bundle(REPO, tmp_path / "out" if output else None)
        assert "--revision" in str(caught.value)
        assert not (tmp_path / "out").exists()
    local_hub.wrong.clear()
    folder = pull_bundle(REPO, tmp_path / "out" if output else None).folder
    assert (folder / DATA).read_bytes() == (bundle / DATA).read_bytes()


@pytest.mark.parametrize("change", ["hash", "size", "missing"])
def test_a_repository_whose_files_are_others_is_refused_before_a_download(
    bundle: Path, local_hub: LocalHub, tmp_path: Path, change: str
) -> None:
    push_bundle(bundle, REPO)
    files = local_hub.files(REPO)
    data = files.pop(DATA)
    other = {"hash": {DATA: bytes(len(data))}, "size": {DATA: data + b"x"}, "missing": {}}[change]
    local_hub.put(REPO, {**files, **other})
    local_hub.downloads.clear()
    with pytest.raises(ArtifactError, match=f"{DATA} of {REPO} is not the file that its manifest lists"):
        pull_bundle(REPO, tmp_path / "out")
    assert local_hub.downloads == ["manifest.json"]
    assert not (tmp_path / "out").exists()


def test_a_full_disk(bundle: Path, local_hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push_bundle(bundle, REPO)
    with monkeypatch.context() as patch:
        patch.setattr("sana_export.files.free_bytes", lambda folder: 1000)
        with pytest.raises(DependencyError, match="too little disk space"):
            pull_bundle(REPO, tmp_path / "out")
    assert local_hub.downloads == ["manifest.json"]

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(DependencyError, match="the disk is full"):
        pull_bundle(REPO, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_engines_for_this_machine_unless_all_are_wanted(engine_bundle: Path, local_hub: LocalHub, tmp_path: Path) -> None:
    push_bundle(engine_bundle, REPO)
    engines = {entry.file.path for entry in Manifest.load(engine_bundle).engines}
    portable, turing = sorted(engines)

    def pulled(name: str, **options: Any) -> set[str]:
        return {path for path in content(pull_bundle(REPO, tmp_path / name, **options).folder) if path.startswith("engines/")}

    assert pulled("ada", host=THERE) == {portable}
    assert pulled("turing", host=TURING) == {turing}
    assert pulled("none", host=dataclasses.replace(THERE, gpus=())) == set()
    assert pulled("all", host=THERE, all_engines=True) == engines
    assert pulled("ada", host=THERE, all_engines=True) == engines  # completes the folder
    assert content(tmp_path / "ada") == content(tmp_path / "all")


def test_an_engine_that_was_not_downloaded_is_another_reason_and_has_a_command(
    engine_bundle: Path, local_hub: LocalHub, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_bundle(engine_bundle, REPO)
    folder = pull_bundle(REPO, tmp_path / "out", host=TURING).folder
    manifest = Manifest.load(folder)
    with pytest.raises(ArtifactError) as caught:
        runnable(folder, dataclasses.replace(manifest, graphs={"sampler": manifest.graphs["sampler"]}), "tensorrt-rtx", THERE)
    commit = local_hub.repos[REPO].branches["main"]
    assert caught.value.fix == f"sana-export pull {REPO} --revision {commit} -o {folder}"
    assert "was not downloaded" in str(caught.value.found)
    monkeypatch.setattr("sana_export.cli.verbs.inspect.detect_host", lambda: THERE)
    ran = cli("inspect", folder, "--json")
    assert ran.code == 0
    assert [engine["damaged"] for engine in ran.json["engines"]] == [None, None]
    pull_bundle(REPO, folder, revision=commit, host=THERE)  # what the command does
    sampler = dataclasses.replace(manifest, graphs={"sampler": manifest.graphs["sampler"]})
    assert runnable(folder, sampler, "tensorrt-rtx", THERE).engines["sampler"] == engines_for(manifest, THERE)


def test_an_engine_that_is_missing_from_a_bundle_of_ones_own_is_an_error_as_before(engine_bundle: Path) -> None:
    manifest = Manifest.load(engine_bundle)
    shutil.rmtree(engine_bundle / "engines")
    found = runnable(
        engine_bundle, dataclasses.replace(manifest, graphs={"sampler": manifest.graphs["sampler"]}), "tensorrt-rtx", THERE
    )
    assert len(found.engines["sampler"]) == 1  # loading it says that the file is missing


def test_damaged_and_missing_files_are_replaced(bundle: Path, local_hub: LocalHub, tmp_path: Path) -> None:
    push_bundle(bundle, REPO)
    for folder in (pull_bundle(REPO, tmp_path / "out").folder, pull_bundle(REPO).folder):
        (folder / DATA).resolve().write_bytes(b"damaged")
        (folder / "instruction.safetensors").unlink()
        local_hub.downloads.clear()
        output = None if folder != tmp_path / "out" else folder
        assert {entry.path for entry in pull_bundle(REPO, output).downloaded} == {DATA, "instruction.safetensors"}
        assert (folder / DATA).read_bytes() == (bundle / DATA).read_bytes()


def test_engines_that_were_built_here_stay(engine_bundle: Path, local_hub: LocalHub, tmp_path: Path) -> None:
    push_bundle(engine_bundle, REPO)
    folder = pull_bundle(REPO, tmp_path / "out", host=dataclasses.replace(THERE, gpus=())).folder
    add_engine(folder, "c3")
    add_engine(folder, "a1", b"built here ")  # the same key and other bytes
    own = Manifest.load(folder).engines
    add_engine(engine_bundle, "d4", compute_capabilities=("12.0",))
    push_bundle(engine_bundle, REPO)
    manifest = pull_bundle(REPO, folder, host=dataclasses.replace(THERE, gpus=(ADA,))).manifest
    assert [entry for entry in manifest.engines if entry in own] == list(own)
    assert (folder / "engines/tensorrt-rtx/a1/sampler.engine").read_bytes() == b"built here a1"
    assert {entry.key[:2] for entry in manifest.engines} == {"a1", "b2", "c3", "d4"}


def test_a_file_of_the_users_is_not_replaced_by_an_engine(engine_bundle: Path, local_hub: LocalHub, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(engine_bundle, folder)
    unlisted = folder / "engines/tensorrt-rtx/d4/sampler.engine"
    unlisted.parent.mkdir()
    unlisted.write_text("mine")
    add_engine(engine_bundle, "d4")
    push_bundle(engine_bundle, REPO)
    before = content(folder)
    for options in ({"all_engines": True}, {"host": dataclasses.replace(THERE, gpus=())}):
        with pytest.raises(UsageError, match=f"{unlisted} would be replaced by an engine of {REPO}") as caught:
            pull_bundle(REPO, folder, **options)
        assert "move it away" in str(caught.value)
        assert content(folder) == before
    unlisted.write_bytes((engine_bundle / unlisted.relative_to(folder)).read_bytes())  # of a pull that was interrupted
    pull_bundle(REPO, folder, all_engines=True)
    assert content(folder).keys() - {"hub.json"} == content(engine_bundle).keys()


def test_an_engine_of_another_key_at_the_same_place_stays(engine_bundle: Path, local_hub: LocalHub, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(engine_bundle, folder)
    manifest = Manifest.load(folder)
    dataclasses.replace(manifest, engines=()).save(folder)
    add_engine(folder, "a1", b"built here ", key="f" * 64)
    push_bundle(engine_bundle, REPO)
    before = content(folder)
    with pytest.raises(UsageError, match="would be replaced by an engine"):
        pull_bundle(REPO, folder, all_engines=True)
    assert content(folder) == before


def test_an_engine_that_is_not_here_is_replaced_by_a_rebuilt_one(engine_bundle: Path, local_hub: LocalHub, tmp_path: Path) -> None:
    push_bundle(engine_bundle, REPO)
    folder = pull_bundle(REPO, tmp_path / "out", host=TURING).folder
    add_engine(engine_bundle, "a1", b"rebuilt ")
    push_bundle(engine_bundle, REPO)
    pulled = pull_bundle(REPO, folder, all_engines=True)
    assert [entry.path for entry in pulled.downloaded] == ["engines/tensorrt-rtx/a1/sampler.engine"]
    assert pulled.left == ()
    assert {entry.file.sha256 for entry in pulled.manifest.engines} == {
        entry.file.sha256 for entry in Manifest.load(engine_bundle).engines
    }
    assert content(folder).keys() - {"hub.json"} == content(engine_bundle).keys()


@pytest.mark.parametrize("change", ["build", "export"])
def test_what_changes_during_the_download_is_seen(
    engine_bundle: Path, local_hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    from tests.support.small_bundles import write_bundle

    push_bundle(engine_bundle, REPO)
    folder = pull_bundle(REPO, tmp_path / "out", host=TURING).folder
    add_engine(engine_bundle, "d4")
    push_bundle(engine_bundle, REPO)

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        downloaded = fetch_files(*arguments, **options)
        if change == "build":
            add_engine(folder, "d4", b"built here ")
        else:
            shutil.rmtree(folder)
            write_bundle(folder, seed=1)
        return downloaded

    monkeypatch.setattr("sana_export.hub.bundles.fetch.fetch_files", meanwhile)
    if change == "export":
        with pytest.raises(UsageError, match="is not an export of the same bundle"):
            pull_bundle(REPO, folder, all_engines=True)
        assert Manifest.load(folder).engines == ()
        return
    manifest = pull_bundle(REPO, folder, all_engines=True).manifest
    assert manifest == Manifest.load(folder)
    assert sorted(entry.key[:2] for entry in manifest.engines) == ["a1", "b2", "d4"]
    check_files(folder, [entry.file for entry in manifest.engines], fix="")


@pytest.mark.parametrize("what", ["file", "folder", "bundle"])
def test_something_else_at_the_place_is_refused_and_kept(bundle: Path, local_hub: LocalHub, tmp_path: Path, what: str) -> None:
    from tests.support.small_bundles import write_bundle

    push_bundle(bundle, REPO)
    place = tmp_path / "out"
    if what == "file":
        place.write_text("mine")
    elif what == "folder":
        place.mkdir()
        (place / "mine.txt").write_text("mine")
    else:
        write_bundle(place, seed=1)
    before = place.read_text() if what == "file" else content(place)
    with pytest.raises(UsageError, match=f"{place} is not an export of the same bundle as {REPO}"):
        pull_bundle(REPO, place)
    assert (place.read_text() if what == "file" else content(place)) == before


def test_a_revision_and_an_older_commit(bundle: Path, local_hub: LocalHub, tmp_path: Path) -> None:
    from tests.support.small_bundles import write_bundle

    old = push_bundle(bundle, REPO).commit
    write_bundle(tmp_path / "new", seed=1)
    push_bundle(tmp_path / "new", REPO)
    assert pull_bundle(REPO, tmp_path / "a", revision=old).manifest == Manifest.load(bundle)
    assert pull_bundle(REPO, tmp_path / "b").manifest == Manifest.load(tmp_path / "new")
    with pytest.raises(UsageError, match="has no revision 'v9'"):
        pull_bundle(REPO, tmp_path / "c", revision="v9")


def test_a_partial_folder_of_another_pull_is_not_continued(bundle: Path, local_hub: LocalHub, tmp_path: Path) -> None:
    push_bundle(bundle, REPO)
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "stray").write_text("of another pull")
    HubOrigin("someone/else", "0" * 40).save(partial)
    pull_bundle(REPO, tmp_path / "out")
    assert not (tmp_path / "out" / "stray").exists()


def test_offline_a_cached_bundle_becomes_a_folder(bundle: Path, local_hub: LocalHub, tmp_path: Path) -> None:
    push_bundle(bundle, REPO)
    with pytest.raises(DependencyError, match="is not in the cache, and offline mode is on"):
        pull_bundle(REPO, tmp_path / "out", hub=Hub(offline=True))
    pull_bundle(REPO)
    local_hub.log.clear()
    pull_bundle(REPO, tmp_path / "out", hub=Hub(offline=True))
    assert local_hub.log == []
    assert content(tmp_path / "out").keys() - {"hub.json"} == content(bundle).keys()


@pytest.mark.parametrize("output", [True, False], ids=["folder", "cache"])
@pytest.mark.parametrize("name", [DATA, "manifest.json"])
def test_offline_a_damaged_file_is_named(bundle: Path, local_hub: LocalHub, tmp_path: Path, output: bool, name: str) -> None:
    push_bundle(bundle, REPO)
    cached = pull_bundle(REPO).folder / name
    damaged = cached.read_bytes()[:-1] + b"x"
    cached.resolve().write_bytes(damaged)
    with pytest.raises(ArtifactError, match=name) as caught:
        pull_bundle(REPO, tmp_path / "out" if output else None, hub=Hub(offline=True))
    assert "damaged" in str(caught.value)
    assert "run the same command once without --offline" in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert cached.read_bytes() == damaged
    pull_bundle(REPO)
    pull_bundle(REPO, tmp_path / "out" if output else None, hub=Hub(offline=True))
