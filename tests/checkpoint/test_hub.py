"""The hub, without a network: an export downloads only what it reads, checks the pipeline first, and reports every error."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from sana_export.checkpoint.checkpoint import SanaCheckpoint, open_checkpoint
from sana_export.checkpoint.vae import open_vae
from sana_export.errors import ArtifactError, DependencyError, SanaExportError, UsageError
from sana_export.hub.client import Hub

REPO, COMMIT = "someone/sana-fine-tune", "0123456789abcdef0123456789abcdef01234567"
#: What huggingface_hub uses: httpx2 from its version 2 on.
httpx: Any = importlib.import_module("httpx2" if importlib.util.find_spec("httpx2") else "httpx")


class FakeHub:
    """huggingface_hub's functions over a local folder. They record their calls, and raise an error on request."""

    def __init__(self, source: Path, cache: Path) -> None:
        self.source, self.snapshot = source, cache / "snapshots" / COMMIT
        self.asked: list[dict[str, Any]] = []
        self.downloaded: list[str] = []
        self.error: Exception | None = None

    @property
    def names(self) -> list[str]:
        return sorted(path.relative_to(self.source).as_posix() for path in self.source.rglob("*") if path.is_file())

    def _answer(self, repo: str, **options: Any) -> None:
        self.asked.append({"repo": repo, **options})
        if self.error is not None:
            raise self.error

    def _copy(self, name: str) -> Path:
        self.downloaded.append(name)
        target = self.snapshot / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.source / name, target)
        return target

    def hf_hub_download(self, repo: str, name: str, *, local_files_only: bool, **options: Any) -> str:
        self._answer(repo, local_files_only=local_files_only, **options)
        if local_files_only:
            if not (self.snapshot / name).is_file():
                raise errors.LocalEntryNotFoundError("not in the cache")
            return str(self.snapshot / name)
        if name not in self.names:
            raise http_error(errors.RemoteEntryNotFoundError, 404)
        return str(self._copy(name))

    def list_repo_files(self, repo: str, **options: Any) -> list[str]:
        self._answer(repo, **options)
        return self.names

    def snapshot_download(self, repo: str, *, allow_patterns: list[str], **options: Any) -> str:
        self._answer(repo, **options)
        for name in self.names:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                self._copy(name)
        return str(self.snapshot)


def http_error(kind: type[Exception], status: int, text: str = "the server's words") -> Exception:
    request = httpx.Request("GET", "https://hub.invalid")
    return kind(text, response=httpx.Response(status, request=request))  # type: ignore[call-arg]


@pytest.fixture
def hub(tiny_checkpoint: SanaCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(shutil.copytree(tiny_checkpoint.folder, tmp_path / "repo"), tmp_path / "cache")
    for name in ("hf_hub_download", "list_repo_files", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(fake, name))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return fake


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}))


def add_what_is_not_read(folder: Path, tiny_pipeline: Any) -> None:
    """Other files of a published repository: a variant, its shards, pickles and images."""
    tiny_pipeline.transformer.save_pretrained(folder / "transformer", variant="fp16")
    tiny_pipeline.text_encoder.save_pretrained(folder / "text_encoder", variant="fp16", max_shard_size="300KB")
    for name in ("transformer/diffusion_pytorch_model.bin", "README.md", "asset/logo.png", "checkpoints/Sana.pth"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()


def test_only_files_that_an_export_reads_are_downloaded(hub, tiny_pipeline):
    add_what_is_not_read(hub.source, tiny_pipeline)
    checkpoint = open_checkpoint(REPO, revision="main")
    weights = {name for name in hub.downloaded if name.endswith((".safetensors", ".bin", ".pth"))}
    assert weights == {
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }
    assert "tokenizer/tokenizer.json" in hub.downloaded
    assert not {"README.md", "asset/logo.png", "text_encoder/model.safetensors.index.fp16.json"} & set(hub.downloaded)
    assert hub.downloaded[0] == "model_index.json"
    assert checkpoint.folder == hub.snapshot
    assert checkpoint.sha256 == open_checkpoint(str(hub.source)).sha256
    assert (checkpoint.source, checkpoint.revision) == (REPO, "main")


def test_files_of_the_variant_are_preferred_and_others_used_if_it_has_none(hub, tiny_pipeline):
    add_what_is_not_read(hub.source, tiny_pipeline)
    checkpoint = open_checkpoint(REPO, weights_variant="fp16")
    weights = {name for name in hub.downloaded if name.endswith(".safetensors")}
    shards = {name for name in weights if name.startswith("text_encoder/")}
    assert len(shards) > 1
    assert all("model.fp16-0000" in name for name in shards)
    assert weights - shards == {"transformer/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.safetensors"}
    assert len(checkpoint.weight_files("text_encoder")) == len(shards)


def test_the_hubs_transformer_is_not_downloaded_if_the_user_has_one(hub, tiny_checkpoint):
    open_checkpoint(REPO, transformer=tiny_checkpoint.weight_files("transformer")[0])
    assert {name for name in hub.downloaded if name.startswith("transformer/")} == {"transformer/config.json"}


@pytest.mark.parametrize("pipeline", [False, True])
def test_an_autoencoder_on_the_hub_is_a_repository_or_a_part_of_one(hub, tiny_checkpoint, pipeline):
    wanted = open_vae(str(tiny_checkpoint.folder), None, Hub())
    (hub.source / "sana_export.json").unlink()
    if not pipeline:
        for path in (hub.source / "vae").iterdir():
            path.rename(hub.source / path.name)
    found = open_vae(f"{REPO}@v1", None, Hub("hf_secret"))
    files = ["config.json", "diffusion_pytorch_model.safetensors"]
    assert set(hub.downloaded) == {f"vae/{name}" if pipeline else name for name in files}
    assert hub.asked[0]["revision"] == "v1"
    assert {asked["revision"] for asked in hub.asked[2:]} == {COMMIT}
    assert (found.sha256, found.source) == (wanted.sha256, f"{REPO}@v1")
    hub.asked.clear()
    assert open_vae(REPO, None, Hub(offline=True)).sha256 == wanted.sha256
    assert {asked["local_files_only"] for asked in hub.asked} == {True}


def test_another_autoencoder_on_the_hub_is_refused_before_its_weights_are_downloaded(hub):
    edit_json(hub.source / "vae" / "config.json", _class_name="AutoencoderKL")
    with pytest.raises(ArtifactError, match=f"{REPO} is not an autoencoder of Sana"):
        open_vae(REPO, None, Hub())
    assert hub.downloaded == ["vae/config.json"]
    shutil.rmtree(hub.source / "vae")
    with pytest.raises(ArtifactError, match=r"no vae/config\.json or config\.json"):
        open_vae(REPO, None, Hub())


def test_the_hubs_autoencoder_is_not_downloaded_if_the_user_has_one(hub):
    open_checkpoint(REPO, vae="tiny-dc-ae-lite")
    assert {name for name in hub.downloaded if name.startswith("vae/")} == {"vae/config.json"}


def test_every_call_uses_the_same_commit_token_and_cache(hub, tmp_path):
    open_checkpoint(REPO, revision="v1", hub=Hub("hf_secret", tmp_path / "own"))
    assert hub.asked[0]["revision"] == "v1"
    assert {asked["revision"] for asked in hub.asked[1:]} == {COMMIT}
    assert {asked["token"] for asked in hub.asked} == {"hf_secret"}
    assert {asked["cache_dir"] for asked in hub.asked if "cache_dir" in asked} == {tmp_path / "own"}
    assert "hf_secret" not in repr(Hub("hf_secret"))


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusionXLPipeline", "SanaVideoPipeline", "SanaImageToVideoPipeline"])
def test_another_pipeline_is_refused_before_anything_else_is_downloaded(hub, name):
    edit_json(hub.source / "model_index.json", _class_name=name)
    message = refused(ArtifactError)
    assert f"{REPO} is not a Sana text-to-image checkpoint" in message
    assert f"model_index.json names {name}" in message
    assert hub.downloaded == ["model_index.json"]


def test_a_repository_of_the_original_code_is_refused(hub):
    (hub.source / "model_index.json").unlink()
    (hub.source / "checkpoints").mkdir()
    (hub.source / "checkpoints" / "Sana_600M.pth").touch()
    message = refused(ArtifactError)
    assert f"{REPO} is not a diffusers checkpoint" in message
    assert "no model_index.json, but checkpoints/Sana_600M.pth" in message
    assert hub.downloaded == []


def test_a_controlnet_repository_is_refused(hub):
    (hub.source / "model_index.json").unlink()
    (hub.source / "config.json").write_text(json.dumps({"_class_name": "SanaControlNetModel"}))
    assert "a config.json of SanaControlNetModel" in refused(ArtifactError)


def test_a_missing_shard_is_named_before_any_weights_are_downloaded(hub, tiny_pipeline):
    (hub.source / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    tiny_pipeline.transformer.save_pretrained(hub.source / "transformer", max_shard_size="1MB")
    sorted((hub.source / "transformer").glob("*-00002-of-*"))[0].unlink()
    message = refused(ArtifactError)
    assert f"transformer of {REPO} is missing 1 of" in message
    assert "no transformer/diffusion_pytorch_model-00002-of-" in message
    assert not [name for name in hub.downloaded if name.endswith(".safetensors")]


def refused(kind: type[SanaExportError], **options: Any) -> str:
    with pytest.raises(kind) as caught:
        open_checkpoint(REPO, **options)
    error = caught.value
    assert type(error) is kind
    assert None not in (error.found, error.wanted, error.fix)
    assert REPO in str(error)
    return str(error)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (http_error(errors.RepositoryNotFoundError, 404), UsageError, ("the hub has no repository", "--token", "hf auth login")),
        (http_error(errors.RevisionNotFoundError, 404), UsageError, ("has no revision 'v9'", "omit --revision")),
        (http_error(errors.GatedRepoError, 403), DependencyError, ("is gated", f"https://huggingface.co/{REPO}", "--token")),
        (
            http_error(errors.HfHubHTTPError, 503, "503 Service Unavailable"),
            DependencyError,
            ("refused", "503 Service Unavailable"),
        ),
        (
            httpx.ConnectError("[Errno 111] Connection refused"),
            DependencyError,
            ("cannot be reached", "Connection refused", "--offline"),
        ),
        (httpx.ReadTimeout("timed out"), DependencyError, ("cannot be reached", "timed out")),
        (errors.OfflineModeIsEnabled("offline"), DependencyError, ("cannot be reached", "offline")),
        (errors.HFValidationError("bad id"), UsageError, ("is not a hub id", "owner/name")),
    ],
    ids=["unknown", "revision", "gated", "refused", "unreachable", "timeout", "offline mode", "name"],
)
def test_every_error_of_the_hub_is_translated(hub, error, kind, words):
    hub.error = error
    message = refused(kind, revision="v9")
    assert all(word in message for word in words), message


def test_a_full_disk_is_reported(hub):
    hub.error = OSError(28, "No space left on device")
    with pytest.raises(DependencyError, match="the disk is full"):
        open_checkpoint(REPO)


def test_offline_mode_uses_the_cached_copy_and_no_network(hub, tiny_checkpoint):
    open_checkpoint(REPO)
    hub.asked.clear()
    checkpoint = open_checkpoint(REPO, hub=Hub(offline=True))
    assert checkpoint.sha256 == tiny_checkpoint.sha256
    assert [asked["local_files_only"] for asked in hub.asked] == [True]


def test_offline_mode_without_a_cached_copy_is_reported(hub, monkeypatch):
    message = refused(DependencyError, hub=Hub(offline=True))
    assert "is not in the cache, and offline mode is on" in message
    assert "without --offline" in message
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "is not in the cache" in refused(DependencyError)


def test_offline_mode_with_an_incomplete_copy_names_what_is_missing(hub):
    open_checkpoint(REPO)
    (hub.snapshot / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    message = refused(DependencyError, hub=Hub(offline=True))
    assert "is incomplete in the cache, and offline mode is on" in message
    assert f"vae of {REPO} has no weights" in message
    assert "without --offline" in message


def test_a_closed_port_is_an_unreachable_hub(monkeypatch, tmp_path):
    """The real huggingface_hub, with a port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    message = refused(DependencyError, hub=Hub(cache_dir=tmp_path))
    assert f"the hub cannot be reached for {REPO}" in message
    assert "Connection refused" in message
    assert "--offline" in message
