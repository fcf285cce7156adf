"""A Sana checkpoint on disk: its configs, and its weights mapped from safetensors, component by component."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from sana_export.adapters import Lora
from sana_export.architectures import TRANSFORMER_DEFAULTS
from sana_export.checkpoint.checks import CONTROLLED, check_checkpoint, check_configs, check_index, class_of
from sana_export.checkpoint.clamp import Clamp, trained_with_clamp
from sana_export.checkpoint.components import REQUIRED, select_weights, variant_among
from sana_export.checkpoint.configs import CONFIGURED, config_name, read_part
from sana_export.checkpoint.controlnet import ControlNetFiles, open_controlnet
from sana_export.checkpoint.fold_lora import fold_loras
from sana_export.checkpoint.hub import ReadJson, fetch, read_json
from sana_export.checkpoint.model_names import a_file, check_words, from_url, not_a_checkpoint
from sana_export.checkpoint.network_folder import CONFIG, synthetic_folder
from sana_export.checkpoint.single_file import open_single_file
from sana_export.checkpoint.vae import Vae, open_vae
from sana_export.checkpoint.weights import Weights, read_headers
from sana_export.errors import UsageError
from sana_export.files import hash_file
from sana_export.hub.client import Hub
from sana_export.hub.names import may_be_hub_id
from sana_export.lora_scales import scales_text
from sana_export.manifest import Checkpoint, Overlay
from sana_export.synth.checkpoint import MARKER, make_checkpoint
from sana_export.user_paths import at_home
from sana_export.variants import INDEX, VARIANTS, Variant, find_variant, recognize, unknown_alias

log = logging.getLogger(__name__)

#: The folder of the checkpoints that the package contains.
EMBEDDED = Path(__file__).parents[1] / "models"


@dataclass(frozen=True)
class SanaCheckpoint:
    """A checkpoint folder that was checked, with the weights that the user adds to it."""

    #: The folder, in the layout of diffusers.
    folder: Path
    #: The alias, hub id or folder that the user gave.
    source: str
    #: The hub revision that the user gave.
    revision: str | None = None
    #: The row of variants.py that the user named, or the rows that have the same configs.
    rows: tuple[Variant, ...] = ()
    #: The variant of the weight files: "fp16" means files such as *.fp16.safetensors.
    weights_variant: str | None = None
    #: A file whose weights replace the folder's transformer.
    transformer_file: Path | None = None
    #: The LoRAs that are folded into the transformer.
    loras: tuple[Lora, ...] = ()
    #: The autoencoder that replaces the folder's.
    vae: Vae | None = None
    #: The ControlNet that is exported with it.
    controlnet: ControlNetFiles | None = None

    @cached_property
    def index(self) -> dict[str, Any]:
        """The content of model_index.json."""
        return self.read(INDEX)

    def read(self, name: str) -> dict[str, Any]:
        """The JSON object in the file `name` of the folder."""
        return read_json(self.config_file(name))

    def config_file(self, name: str) -> Path:
        """Where the config `name` is: in the folder, or in that of the autoencoder that replaces the folder's."""
        if self.vae is not None and name == config_name("vae"):
            return self.vae.folder / CONFIG
        return self.folder / name

    def config(self, part: str) -> dict[str, Any]:
        """The config of a component or of the scheduler, as its class reads it: with a value for every key.

        The classes are those of model_index.json.
        """
        if part == "controlnet":
            assert self.controlnet is not None
            given = self.controlnet.config(self.config("transformer"))
            return TRANSFORMER_DEFAULTS | dict(read_part(part, given).config)
        own = part != "vae" or self.vae is None
        class_name = class_of(self.index, part, self.source, self.read) if own else None
        return dict(read_part(part, self.read(config_name(part)), class_name).config)

    def weights(self, component: str) -> Weights:
        """The component's tensors by their names in diffusers or transformers, with LoRAs folded in."""
        base = self.base_weights(component)
        return fold_loras(base, self.loras) if component == "transformer" else base

    def base_weights(self, component: str) -> Weights:
        """The same without LoRAs."""
        if component == "transformer" and self.transformer_file is not None:
            return open_single_file(self.transformer_file)
        if component == "controlnet":
            assert self.controlnet is not None
            return self.controlnet.weights()
        stored = read_headers(self.weight_files(component))
        return Weights({name.removeprefix("model."): entry for name, entry in stored.items()})

    def weight_files(self, component: str) -> list[Path]:
        """The component's safetensors files: one, or the shards that its index lists."""
        if component == "transformer" and self.transformer_file is not None:
            return [self.transformer_file]
        if component == "vae" and self.vae is not None:
            return self.vae.weight_files
        if component == "controlnet" and self.controlnet is not None:
            return self.controlnet.weight_files
        names = {path.relative_to(self.folder).as_posix() for path in self.folder.glob("*/*")}
        found = select_weights(component, names, self.weights_variant, self.read, self.source)
        return [self.folder / name for name in found]

    @cached_property
    def sha256(self) -> str:
        """Hash of every config and weight file that an export reads, and of the scales of LoRAs."""
        parts = [(name, self.config_file(name)) for name in (INDEX, *map(config_name, CONFIGURED))]
        parts += [(f"tokenizer/{path.name}", path) for path in sorted(self.folder.glob("tokenizer/*.json"))]
        for component in REQUIRED:
            parts += [(f"{component}/{number}", path) for number, path in enumerate(self.weight_files(component))]
        digest = hashlib.sha256()
        for role, path in parts:
            digest.update(f"{role}\0{hash_file(path)}\0".encode())
        if self.controlnet is not None:
            digest.update(f"controlnet\0{self.controlnet.sha256}\0".encode())
        for lora in self.loras:
            digest.update(f"lora\0{scales_text(lora.scale, lora.layer_scales)}\0{lora.sha256}\0".encode())
        return digest.hexdigest()

    def record(self) -> Checkpoint:
        """The manifest's entry for this checkpoint."""
        file = self.transformer_file
        return Checkpoint(
            self.source,
            self.revision,
            self.sha256,
            self.variant.alias if self.variant else None,
            self.synthetic,
            self.weights_variant,
            self.trained_with_clamp().on,
            None if file is None else Overlay(str(file), hash_file(file)),
            tuple(Overlay(str(lora.path), lora.sha256, lora.scale, lora.layer_scales) for lora in self.loras),
            None if self.vae is None else Overlay(self.vae.source, self.vae.sha256),
            None if self.controlnet is None else Overlay(self.controlnet.source, self.controlnet.sha256),
        )

    @property
    def marker(self) -> Mapping[str, Any]:
        """The marker file of a synthetic checkpoint. Empty for any other checkpoint."""
        path = self.folder / MARKER
        return read_json(path) if path.is_file() else {}

    @property
    def synthetic(self) -> bool:
        """Whether its weights are random."""
        added = [part for part in (self.vae, self.controlnet) if part is not None]
        return bool(self.marker.get("synthetic")) or any(part.synthetic for part in added)

    @property
    def variant(self) -> Variant | None:
        """Its row of variants.py. None if no row fits, or if several do that the checkpoint's files do not tell apart."""
        rows = self._family()
        return rows[0] if len(rows) == 1 else None

    @property
    def defaults_from(self) -> Variant | None:
        """A row of variants.py with the same configs and clamp, whose defaults apply to this checkpoint. None if there is none."""
        return next(iter(self._family()), None)

    def _family(self) -> list[Variant]:
        clamp = self.trained_with_clamp().on
        return [row for row in self.rows if row.clamp == clamp]

    def trained_with_clamp(self) -> Clamp:
        """Whether the checkpoint was trained with self-attention outputs clipped to +-65504, and how that is known."""
        rows = self.rows or recognize(self.config("transformer"))  # the clip depends on the transformer, whatever the scheduler
        names = [path.name for path in (self.folder / "transformer").glob("*.safetensors")]
        return trained_with_clamp(rows, names, self.base_weights("transformer").dtype())


def open_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    weights_variant: str | None = None,
    transformer: Path | None = None,
    vae: str | None = None,
    controlnet: str | None = None,
    loras: Iterable[Lora] = (),
    hub: Hub | None = None,
) -> SanaCheckpoint:
    """Find `model` (an alias, a local folder or a hub id) and check that it is a complete Sana checkpoint.

    `transformer` is a safetensors file whose weights replace the checkpoint's transformer. `vae` names an autoencoder that replaces
    the checkpoint's (`open_vae`), `controlnet` a ControlNet that is exported with it (`open_controlnet`). `loras` are folded into
    the transformer.
    Raises UsageError for an unknown name, ArtifactError if the checkpoint is not a Sana, is incomplete or has parts that do not fit
    together, and DependencyError if the hub cannot be reached.
    """
    check_words(model, revision=revision, variant=weights_variant)
    if transformer is not None and not transformer.is_file():
        raise UsageError(
            f"the transformer file {transformer} does not exist",
            found="no such file",
            wanted="a .safetensors file of a Sana transformer",
        )
    model, revision = from_url(at_home(model, "MODEL"), revision)
    named = find_variant(model)
    replaced = {"transformer": transformer, "vae": vae}
    components = [name for name in REQUIRED if replaced.get(name) is None]
    requested, local = weights_variant, Path(model).is_dir()
    if named is not None and named.recipe is not None:
        folder = synthetic_folder(named.recipe, INDEX, make_checkpoint)
    elif named is not None and named.embedded:
        folder = EMBEDDED / named.alias
    elif local:
        folder, named, revision = Path(model), None, None
    elif Path(model).is_file():
        raise a_file(Path(model))
    elif named is not None or may_be_hub_id(model):
        weights_variant = weights_variant or (named.weights_variant if named else None)
        repo = named.repo if named and named.repo else model
        own = [name for name in CONFIGURED if replaced.get(name) is None or name == "transformer"]
        select = partial(_select, components=components, weights_variant=weights_variant, source=repo)
        folder = fetch(
            repo,
            revision,
            hub or Hub(),
            partial(check_index, source=repo),
            select,
            check_configs=partial(check_configs, source=repo, names=own),
        )
    else:
        raise unknown_alias(model)
    if not (folder / INDEX).is_file():
        raise not_a_checkpoint(model, [path.name for path in folder.iterdir()], lambda name: read_json(folder / name), folder)
    other = None if vae is None else open_vae(vae, weights_variant, hub or Hub())
    if controlnet is None and read_json(folder / INDEX)["_class_name"] == CONTROLLED:
        controlnet = str(folder) if local else f"{model}@{revision}" if revision else model
    control = None if controlnet is None else open_controlnet(controlnet, weights_variant, hub or Hub())
    rows = (named,) if named else ()
    draft = SanaCheckpoint(folder, model, revision, rows, weights_variant, transformer, tuple(loras), other, control)
    check_checkpoint(draft)
    checkpoint = draft if named else replace(draft, rows=_rows(draft))
    checkpoint.weights("transformer")  # with the LoRAs
    owned = [name for name in REQUIRED if name != "transformer" or transformer is None]
    files = [path.name for name in owned for path in checkpoint.weight_files(name)]
    if variant_among(files, requested) != requested:
        raise UsageError(
            f"{model} has no weights of the variant {requested!r}",
            found=", ".join(files),
            wanted=f"files named *.{requested}.safetensors",
            fix="omit --variant",
        )
    return checkpoint


def _select(
    names: Collection[str], read: ReadJson, *, components: Iterable[str], weights_variant: str | None, source: str
) -> list[str]:
    """The files of a hub repository that `export` and `verify` read."""
    # The config of an autoencoder that is replaced says which latents the transformer was trained for.
    small = [INDEX, MARKER, *map(config_name, CONFIGURED)]
    found = [name for name in names if name in small or (name.startswith("tokenizer/") and name.count("/") == 1)]
    for component in components:
        found += select_weights(component, names, weights_variant, read, source)
    return found


def _rows(checkpoint: SanaCheckpoint) -> tuple[Variant, ...]:
    """The rows of variants.py that fit a checkpoint which is not one of them by name."""
    marked = VARIANTS.get(str(checkpoint.marker.get("variant")))
    return (marked,) if marked else recognize(checkpoint.config("transformer"), checkpoint.config("scheduler"))
