"""A Sana checkpoint on disk, read component by component: configs as they are, weights mapped from safetensors."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_export.environment import source_digest
from sana_export.errors import ArtifactError, DependencyError, UsageError
from sana_export.manifest import hash_file
from sana_export.variants import Variant, find_variant, unknown_alias

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

PIPELINES = ("SanaPipeline", "SanaPAGPipeline")
#: Component: the class that its entry of model_index.json names, and the stem of its weight files.
COMPONENTS = {
    "transformer": (("SanaTransformer2DModel",), "diffusion_pytorch_model"),
    "vae": (("AutoencoderDC",), "diffusion_pytorch_model"),
    "text_encoder": (("Gemma2Model", "Gemma2ForCausalLM", "Gemma2PreTrainedModel"), "model"),
}
#: What a hub download fetches beside the weights that it needs.
SMALL_FILES = ("*.json", "*.txt", "tokenizer/*")


class Weights(Mapping[str, "Tensor"]):
    """The tensors of one component, read from its safetensors files one at a time when asked for."""

    def __init__(self, files: list[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self._handles = {}
        for path in files:
            try:
                handle = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ArtifactError(
                    f"{path} is damaged or truncated",
                    found=str(error),
                    wanted="a whole safetensors file",
                    fix="download the checkpoint again",
                ) from error
            for name in handle.keys():  # noqa: SIM118 (a handle is not a mapping)
                self._handles[name.removeprefix("model.")] = (handle, name)

    def __getitem__(self, name: str) -> Tensor:
        handle, stored = self._handles[name]
        return handle.get_tensor(stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)

    def dtype(self) -> str:
        """The safetensors dtype of the first tensor: "F32", "F16" or "BF16"."""
        handle, stored = next(iter(self._handles.values()))
        return str(handle.get_slice(stored).get_dtype())


@dataclass(frozen=True)
class SanaCheckpoint:
    """A checked checkpoint folder. `source` is what the user named; `weights_variant` picks files such as *.fp16.safetensors."""

    folder: Path
    source: str
    revision: str | None = None
    variant: Variant | None = None
    weights_variant: str | None = None
    index: Mapping[str, Any] = field(default_factory=dict)

    def config(self, component: str) -> dict[str, Any]:
        """The component's config.json (scheduler_config.json for the scheduler)."""
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        return _read_json(self.folder / component / name)

    def weights(self, component: str) -> Weights:
        """The component's tensors under the names that diffusers or transformers gives them."""
        return Weights(self.weight_files(component))

    def weight_files(self, component: str) -> list[Path]:
        """The component's safetensors files: one, or the shards that its index lists."""
        folder, stem = self.folder / component, COMPONENTS[component][1]
        suffixes = [f".{self.weights_variant}", ""] if self.weights_variant else [""]
        for suffix in suffixes:
            single = folder / f"{stem}{suffix}.safetensors"
            if single.is_file():
                return [single]
            shards = folder / f"{stem}.safetensors.index{suffix}.json"
            if shards.is_file():
                names = sorted(set(_read_json(shards)["weight_map"].values()))
                if missing := [name for name in names if not (folder / name).is_file()]:
                    raise ArtifactError(
                        f"{component} of {self.source} lacks {len(missing)} of {len(names)} shards",
                        found=f"no {folder / missing[0]}",
                        wanted=", ".join(names),
                        fix="download the checkpoint again",
                    )
                return [folder / name for name in names]
        raise ArtifactError(
            f"{component} of {self.source} has no weights",
            found=", ".join(sorted(path.name for path in folder.iterdir())) or "an empty folder",
            wanted=f"{stem}{suffixes[0]}.safetensors",
            fix="download the checkpoint again, or save it as safetensors",
        )

    @cached_property
    def sha256(self) -> str:
        """Hash over the names and contents of every config and weight file that an export reads."""
        files = {path for component in COMPONENTS for path in self.weight_files(component)}
        files.update(self.folder.glob("*/*.json"))
        digest = hashlib.sha256()
        for path in sorted(files):
            digest.update(f"{path.relative_to(self.folder).as_posix()}\0{hash_file(path)}\0".encode())
        return digest.hexdigest()

    @property
    def synthetic(self) -> bool:
        marker = self.folder / "sana_export.json"
        return marker.is_file() and bool(_read_json(marker).get("synthetic"))

    def trained_with_clamp(self) -> tuple[bool, str]:
        """Whether self-attention outputs are clipped to +-65504 in this checkpoint's function, and how that is known."""
        if self.variant is not None:
            return self.variant.clamp, f"the table says so for {self.variant.alias}"
        stored = self.weights("transformer").dtype()
        return stored == "F16", f"its transformer is stored as {stored}"


def open_checkpoint(model: str, *, revision: str | None = None, weights_variant: str | None = None) -> SanaCheckpoint:
    """Find `model` (an alias, a local folder or a hub id) and check that it is a whole Sana checkpoint.

    Raises UsageError for an unknown name, ArtifactError for a folder that is not a Sana, DependencyError where the hub cannot be
    reached.
    """
    requested = weights_variant
    variant = find_variant(model)
    if variant is not None and variant.recipe is not None:
        folder = _synthetic_folder(variant.recipe)
    elif Path(model).is_dir():
        folder, variant = Path(model), None
    elif variant is not None or (model.count("/") == 1 and not model.startswith((".", "/", "~"))):
        weights_variant = weights_variant or (variant.weights_variant if variant else None)
        folder = _download(variant.repo if variant and variant.repo else model, revision, weights_variant)
    else:
        raise unknown_alias(model)
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ArtifactError(
            f"{model} is not a diffusers checkpoint",
            found=f"no {index_file}",
            wanted="a folder that SanaPipeline.from_pretrained loads",
            fix="sana-export variants  (lists the published checkpoints)",
        )
    checkpoint = SanaCheckpoint(folder, model, revision, variant, weights_variant, _read_json(index_file))
    _check(checkpoint)
    if requested and not any(f".{requested}" in path.name for path in checkpoint.weight_files("transformer")):
        raise UsageError(
            f"{model} has no weights of the variant {requested!r}",
            found=", ".join(path.name for path in checkpoint.weight_files("transformer")),
            wanted=f"files named *.{requested}.safetensors",
            fix="leave out --variant",
        )
    return checkpoint


def _check(checkpoint: SanaCheckpoint) -> None:
    index = checkpoint.index
    if index.get("_class_name") not in PIPELINES:
        raise ArtifactError(
            f"{checkpoint.source} is not a Sana text-to-image checkpoint",
            found=f"model_index.json names {index.get('_class_name')}",
            wanted=" or ".join(PIPELINES),
            fix="sana-export variants  (lists the published checkpoints)",
        )
    for component, (classes, _) in COMPONENTS.items():
        found = (index.get(component) or [None, None])[1]
        if found not in classes:
            raise ArtifactError(f"{checkpoint.source} has an unknown {component}", found=found, wanted=" or ".join(classes))
        checkpoint.config(component)
        checkpoint.weights(component)
    checkpoint.config("scheduler")
    if not (checkpoint.folder / "tokenizer" / "tokenizer.json").is_file():
        raise ArtifactError(
            f"the tokenizer of {checkpoint.source} is missing",
            found="no tokenizer/tokenizer.json",
            wanted="the tokenizer's file in the format of the tokenizers library",
            fix="download the checkpoint again",
        )


def cache_folder() -> Path:
    """Where sana_export keeps what it makes for itself: $SANA_EXPORT_CACHE, or sana_export under the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("SANA_EXPORT_CACHE") or f"{root}/sana_export").expanduser()


def _synthetic_folder(recipe: str) -> Path:
    from sana_export.synth.checkpoint import make_checkpoint

    folder = cache_folder() / "checkpoints" / f"{recipe}-{source_digest('synth')[:12]}"
    if not (folder / "model_index.json").is_file():
        log.info("making the synthetic checkpoint %s in %s", recipe, folder)
        make_checkpoint(recipe, folder)
    return folder


def _download(repo: str, revision: str | None, weights_variant: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    stems = {stem for _, stem in COMPONENTS.values()}
    suffix = f"*.{weights_variant}*" if weights_variant else "*"
    patterns = [*SMALL_FILES, *(f"*/{stem}{suffix}.safetensors" for stem in stems)]
    if weights_variant:
        patterns += [f"*/{stem}{extra}.safetensors" for stem in stems for extra in ("", "-?????-of-?????")]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DependencyError(
            f"{repo} could not be downloaded",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            wanted="a reachable hub and access to the repository",
            fix="check the name and the network, run `hf auth login` for gated files, or name a local folder",
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing", found="no such file", wanted="a config in JSON") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is damaged", found=str(error), wanted="a config in JSON") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} is damaged", found=type(content).__name__, wanted="a JSON object")
    return content
