"""`push`: what reaches the hub and what does not, in one commit, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sana_export.errors import ArtifactError, DependencyError, UsageError
from sana_export.hub.bundles.card import make_card
from sana_export.hub.bundles.push import push_bundle
from sana_export.hub.client import Hub
from sana_export.manifest import Manifest
from tests.support.command_line import Cli
from tests.support.hub_server import LocalHub
from tests.support.small_bundles import write_bundle

REPO = "me/sana-bundle"


def listed(bundle: Path) -> set[str]:
    return {entry.path for entry in Manifest.load(bundle).entries()}


def test_only_listed_files_and_a_card_are_pushed_in_one_commit(engine_bundle: Path, local_hub: LocalHub) -> None:
    for stray in (".locks/manifest", "engines/tensorrt-rtx/a1/sampler.gpu.cache", "notes.txt", "hub.json", ".env"):
        (engine_bundle / stray).parent.mkdir(exist_ok=True)
        (engine_bundle / stray).write_text("secret")
    pushed = push_bundle(engine_bundle, REPO)
    files = local_hub.files(REPO)
    assert set(files) - {".gitattributes"} == listed(engine_bundle) | {"manifest.json", "README.md"} == set(pushed.files)
    assert all(files[name] == (engine_bundle / name).read_bytes() for name in listed(engine_bundle) | {"manifest.json"})
    assert len(local_hub.repos[REPO].commits) == 2  # the hub's own first one, and this one
    assert pushed.commit == local_hub.repos[REPO].branches["main"]
    assert not local_hub.repos[REPO].private


def test_what_the_command_says(bundle: Path, local_hub: LocalHub, cli: Cli) -> None:
    ran = cli("push", bundle, REPO, "--private", "--message", "first", "--json")
    assert ran.code == 0
    assert ran.json["bytes"] == sum(map(len, local_hub.files(REPO).values())) - len(local_hub.files(REPO)[".gitattributes"])
    assert (ran.json["repo"], ran.json["deleted"], ran.json["card_kept"]) == (REPO, [], False)
    assert local_hub.repos[REPO].private
    assert f"generate {REPO}" in cli("push", bundle, f"https://huggingface.co/{REPO}").out


def test_a_dry_run_checks_and_lists_and_contacts_nobody(bundle: Path, local_hub: LocalHub, cli: Cli) -> None:
    ran = cli("push", bundle, REPO, "--dry-run", "--json")
    assert {file["path"] for file in ran.json["files"]} == listed(bundle) | {"manifest.json", "README.md"}
    assert ran.json["bytes"] == sum(file["bytes"] for file in ran.json["files"])
    assert local_hub.log == []
    (bundle / "onnx/sampler/model.onnx").write_bytes(b"damaged")
    assert cli("push", bundle, REPO, "--dry-run").code == 4


@pytest.mark.parametrize("damage", ["missing", "changed", "edited"])
def test_a_damaged_bundle_is_refused_before_anything_is_sent(bundle: Path, local_hub: LocalHub, damage: str) -> None:
    path = bundle / ("manifest.json" if damage == "edited" else "onnx/vae_decoder/model.onnx.data")
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content.replace(b"fp16", b"fp32") if damage == "edited" else content[:-1] + b"x")
    with pytest.raises(ArtifactError):
        push_bundle(bundle, REPO)
    assert local_hub.log == []


def test_a_second_push_sends_what_changed_and_deletes_the_rest(engine_bundle: Path, local_hub: LocalHub, tmp_path: Path) -> None:
    first = push_bundle(engine_bundle, REPO)
    local_hub.put(REPO, {**local_hub.files(REPO), "LICENSE": b"terms", "picture.png": b"png"})
    local_hub.received, before = 0, local_hub.files(REPO)
    write_bundle(tmp_path / "other", seed=1)
    second = push_bundle(tmp_path / "other", REPO)
    files = local_hub.files(REPO)
    assert set(second.deleted) == {name for name in first.files if name.startswith("engines/")}
    assert set(files) == {".gitattributes", "LICENSE", "picture.png", "README.md", "manifest.json"} | listed(tmp_path / "other")
    new = {name for name in files if name.endswith((".onnx", ".data")) and files[name] != before.get(name)}
    assert local_hub.received == sum(len(files[name]) for name in new) > 0
    again = push_bundle(tmp_path / "other", REPO)
    assert again.commit == second.commit  # nothing changed: no empty commit


def test_a_card_that_somebody_wrote_stays(bundle: Path, local_hub: LocalHub) -> None:
    push_bundle(bundle, REPO)
    local_hub.put(REPO, {**local_hub.files(REPO), "README.md": b"# My model"})
    assert push_bundle(bundle, REPO).card_kept
    assert local_hub.files(REPO)["README.md"] == b"# My model"


def test_another_branch(bundle: Path, local_hub: LocalHub) -> None:
    push_bundle(bundle, REPO, branch="fp16")
    assert "manifest.json" in local_hub.files(REPO, "fp16")
    assert "manifest.json" not in local_hub.files(REPO)


def test_an_interrupted_push_leaves_the_old_bundle_and_continues(bundle: Path, local_hub: LocalHub) -> None:
    local_hub.uploads = 1
    with pytest.raises(DependencyError, match="broke off during a transfer of me/sana-bundle") as caught:
        push_bundle(bundle, REPO)
    assert "run the same command again" in str(caught.value)
    assert "manifest.json" not in local_hub.files(REPO)
    sent, local_hub.uploads = local_hub.received, None
    assert sent > 0
    push_bundle(bundle, REPO)
    assert local_hub.received == sum(len(data) for data in local_hub.lfs.values())  # each once


@pytest.mark.parametrize("branch", [None, "main", "new"])
@pytest.mark.parametrize(
    "files",
    [
        {"model_index.json": b"{}"},
        {"model.safetensors": b"x", "README.md": b"# A model"},
        {"manifest.json": b'{"name": "app", "start_url": "/"}', "app.js": b"x"},
        {"manifest.json": b'{"format": "x", "tool_version": "1"}'},
        {"manifest.json": b"[]"},
        {"manifest.json": b"not JSON"},
    ],
    ids=["checkpoint", "weights", "web app", "other format", "list", "text"],
)
def test_a_repository_with_something_else_is_refused(
    bundle: Path, local_hub: LocalHub, files: dict[str, bytes], branch: str | None
) -> None:
    local_hub.put(REPO, files)
    before = dict(local_hub.repos[REPO].branches)
    with pytest.raises(UsageError, match="holds something that is not a bundle"):
        push_bundle(bundle, REPO, branch=branch)
    assert local_hub.files(REPO) == files
    assert local_hub.repos[REPO].branches == before


def test_a_bundle_of_another_version_is_replaced(bundle: Path, local_hub: LocalHub) -> None:
    local_hub.put(REPO, {"manifest.json": b'{"format": 2, "tool_version": "0.1.0"}', "old.onnx": b"x"})
    push_bundle(bundle, REPO)
    assert local_hub.files(REPO)["manifest.json"] == (bundle / "manifest.json").read_bytes()


@pytest.mark.parametrize(
    ("token", "status", "words"),
    [
        ("", None, ("does not accept", "hf auth login", REPO)),
        ("hf_other", None, ("does not accept", "don't have the rights")),
        ("hf_owner", 401, ("does not accept", "hf auth login")),
        ("hf_owner", 404, ("does not accept", "hf auth login")),
        ("hf_owner", 503, ("cannot take what is pushed to me/sana-bundle now", "503", "try again later")),
        ("hf_owner", 429, ("cannot take what is pushed to me/sana-bundle now", "429", "try again later")),
        ("hf_owner", 413, ("refused what is pushed to me/sana-bundle", "413", "see what was found")),
    ],
    ids=["no token", "another's repository", "token", "unknown", "out of order", "too often", "too much"],
)
def test_what_the_hub_refuses(
    bundle: Path, local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch, token: str, status: int | None, words: tuple[str, ...]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    local_hub.status = status
    with pytest.raises(DependencyError) as caught:
        push_bundle(bundle, REPO, hub=Hub(token or None))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_somebody_else_pushes_meanwhile(bundle: Path, local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def card(repo: str, manifest: Manifest) -> str:
        local_hub.put(REPO, {"LICENSE": b"terms"})
        return make_card(repo, manifest)

    monkeypatch.setattr("sana_export.hub.bundles.push.make_card", card)
    with pytest.raises(DependencyError, match="somebody else pushed to me/sana-bundle meanwhile") as caught:
        push_bundle(bundle, REPO)
    assert "run the same command again" in str(caught.value)
    assert "auth login" not in str(caught.value)
    assert local_hub.files(REPO) == {"LICENSE": b"terms"}


def test_a_full_account(bundle: Path, local_hub: LocalHub) -> None:
    local_hub.quota = "Storage limit reached"
    with pytest.raises(DependencyError, match="cannot transfer the files of me/sana-bundle") as caught:
        push_bundle(bundle, REPO)
    assert "Storage limit reached" in str(caught.value)


def test_names_that_are_no_repository(bundle: Path, cli: Cli, local_hub: LocalHub) -> None:
    for name in ("name", "./name", "a/b/c", ""):
        for arguments in (("push", bundle, name), ("pull", name)):
            ran = cli(*arguments)
            assert (ran.code, "is not a hub id\n  wanted: owner/name\n" in ran.err, "folder" in ran.err) == (2, True, False), (
                ran.err
            )
    assert "folder" not in cli("pull", "https://example.com/a/b").err
    assert cli("push", bundle, "me/a--b").code == 2
    assert cli("push", bundle, REPO, "--offline").code == 3
    assert "POST /api/repos/create" not in local_hub.log


def test_a_bundle_in_the_hubs_cache_can_be_pushed_on(bundle: Path, local_hub: LocalHub) -> None:
    from sana_export.hub.bundles.fetch import pull_bundle

    push_bundle(bundle, REPO)
    push_bundle(pull_bundle(REPO).folder, "me/copy")
    assert local_hub.files("me/copy")["manifest.json"] == (bundle / "manifest.json").read_bytes()
    assert json.loads(local_hub.files("me/copy")["manifest.json"])["export_key"] == Manifest.load(bundle).export_key
