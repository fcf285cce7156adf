"""What a bundle is: the record of everything in it, bound by hashes.

A bundle is a folder with `manifest.json` at its top. Every other file that a bundle uses is a `FileEntry` of the manifest,
addressed relative to the bundle. The manifest seals itself with the hash of its own content, so an edit by hand is noticed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sana_export import __version__
from sana_export.contract import GraphSpec, TensorSpec
from sana_export.errors import ArtifactError
from sana_export.files import FileEntry

FORMAT = 1
FILE_NAME = "manifest.json"
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class LoraTarget:
    """Where a layer of the transformer lies in a graph, for a LoRA on it (runtime/lora.py).

    `module` as diffusers names it, `shape` that of its weight there: [out, in] or [out, in, 1, 1]. The graph's `initializer`, an
    array of shape `stored` and of `dtype`, holds `factor` times the weight's rows `held` (first and end; None: all) in the rows
    from `first` on, or, where it is `transposed`, in the columns. A layer whose rows are apart has a target for each part.
    """

    module: str
    shape: tuple[int, ...]
    initializer: str
    stored: tuple[int, ...]
    dtype: str
    first: int = 0
    transposed: bool = False
    factor: float = 1.0
    held: tuple[int, int] | None = None


@dataclass(frozen=True)
class GraphEntry:
    """One exported graph: its resolved tensors, the ONNX file and the external data files it reads.

    `lora_targets`: where each layer of the transformer lies in it; empty in bundles of before they were recorded.
    """

    spec: GraphSpec
    onnx: FileEntry
    data: tuple[FileEntry, ...]
    opset: int
    parameters: int
    lora_targets: tuple[LoraTarget, ...] = ()

    @property
    def files(self) -> tuple[FileEntry, ...]:
        return (self.onnx, *self.data)


@dataclass(frozen=True)
class EngineEntry:
    """One serialized engine. `key` hashes all that changes it; `ranges` holds min, opt and max of every dynamic axis.

    `onnx_sha256` hashes the graph's ONNX file and its data. A `refittable` engine holds no weights: there it hashes the structure
    alone, and the weights that the engine needs when it is loaded are those in the `data` files of the graph's entry, whichever
    checkpoint they are of. `activation_bytes`: of the GPU, what a run works in at the largest shapes (0: the builder did not say).
    `build_seconds` and `build_peak_bytes` (host memory, 0: not measured) are of the process that built it.
    """

    graph: str
    backend: str
    key: str
    file: FileEntry
    onnx_sha256: str
    backend_version: str
    compute_capabilities: tuple[str, ...]
    operating_system: str
    profile: str
    ranges: Mapping[str, tuple[int, int, int]]
    options: Mapping[str, Any] = field(default_factory=dict)
    build_seconds: float = 0.0
    build_peak_bytes: int = 0
    activation_bytes: int = 0

    @property
    def refittable(self) -> bool:
        return bool(self.options.get("refittable"))


@dataclass(frozen=True)
class Overlay:
    """Weights that the user laid over a checkpoint: `path` as it was named, the hash of what of it was read, the factor on it."""

    path: str
    sha256: str
    scale: float = 1.0


@dataclass(frozen=True)
class Checkpoint:
    """Where the weights came from. `sha256` hashes the contents of all weight and config files, with those of the overlays.

    `variant` is its row of variants.py, `weights_variant` the files that were asked for (such as fp16), `clamp` how it was trained.
    `transformer` stands in place of the checkpoint's own transformer weights; `loras` are folded into them.
    """

    source: str
    revision: str | None
    sha256: str
    variant: str | None
    synthetic: bool
    weights_variant: str | None = None
    clamp: bool = False
    transformer: Overlay | None = None
    loras: tuple[Overlay, ...] = ()


@dataclass(frozen=True)
class Options:
    """How the bundle was exported: `precision` is fp32, fp16 or bf16; `clamp`: self-attention output clipped to +-65504."""

    precision: str
    clamp: bool
    pag_layers: tuple[int, ...] = ()

    @property
    def dtype(self) -> str:
        return PRECISIONS[self.precision]


@dataclass(frozen=True)
class ModelInfo:
    """What the runtime has to know of the checkpoint beyond its graphs' shapes.

    `guidance_embeds`: the denoiser takes the guidance scale as an input (SANA-Sprint) in place of guidance branches.
    `decoder_tile_scale`: image pixels a feature that `vae_decoder_head` gives. `decoder_tile_halo`: how many features beyond its
    own an image pixel of `vae_decoder_tail` depends on, to each side.
    """

    sample_size: int
    latent_channels: int
    vae_scale_factor: int
    timestep_scale: float
    text_channels: int
    embedding_rows: int
    scheduler: Mapping[str, Any]
    instruction: str
    max_sequence_length: int
    default_steps: int
    default_guidance_scale: float
    guidance_embeds: bool = False
    decoder_tile_halo: int = 0
    decoder_tile_scale: int = 1

    @property
    def native_size(self) -> int:
        """Height and width in pixels that the checkpoint was trained for."""
        return self.sample_size * self.vae_scale_factor


@dataclass(frozen=True)
class Manifest:
    """The whole record. `parity` is the last report of `verify`, as its JSON says it."""

    checkpoint: Checkpoint
    options: Options
    model: ModelInfo
    graphs: Mapping[str, GraphEntry]
    files: tuple[FileEntry, ...]
    export_key: str
    engines: tuple[EngineEntry, ...] = ()
    parity: Mapping[str, Any] | None = None
    tool_version: str = __version__
    format: int = FORMAT

    def with_engine(self, engine: EngineEntry) -> Manifest:
        """A copy that holds `engine` in place of any engine with its graph, backend and key."""
        same = (engine.graph, engine.backend, engine.key)
        kept = tuple(entry for entry in self.engines if (entry.graph, entry.backend, entry.key) != same)
        return replace(self, engines=(*kept, engine))

    def save(self, bundle: Path) -> None:
        """Write `manifest.json` under a temporary name, then rename it."""
        document = dataclasses.asdict(self)
        document["sha256"] = _seal(document)
        path = bundle / FILE_NAME
        temporary = path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True) + "\n", "utf-8")
        temporary.replace(path)

    @classmethod
    def load(cls, bundle: Path) -> Manifest:
        """Read and check `manifest.json`. Raises ArtifactError where it is missing, foreign, of another format or edited."""
        path = bundle / FILE_NAME
        rebuild = f"sana-export export MODEL -o {bundle}"
        if not path.is_file():
            raise ArtifactError(
                f"{bundle} is not a bundle", found="no manifest.json", wanted="a folder made by export", fix=rebuild
            )
        try:
            document = json.loads(path.read_text("utf-8"))
            found_format, sealed = document["format"], document.pop("sha256")
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path} is damaged", found=repr(error), wanted="a manifest", fix=rebuild) from error
        written_by = str(document.get("tool_version"))
        if found_format != FORMAT or _series(written_by) != _series(__version__):
            raise ArtifactError(
                f"{path} was written by another version of sana-export",
                found=f"format {found_format}, written by {written_by}",
                wanted=f"format {FORMAT}, written by {__version__}",
                fix=rebuild,
            )
        if _seal(document) != sealed:
            raise ArtifactError(
                f"{path} was edited after it was written",
                found=f"content hash {_seal(document)[:16]}",
                wanted=f"content hash {str(sealed)[:16]}",
                fix=rebuild,
            )
        try:
            return _parse(document)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path} is damaged", found=repr(error), wanted="a manifest", fix=rebuild) from error


def _series(version: str) -> list[str]:
    """The part of a version that stands for one way to write bundles: major and minor."""
    return version.split(".")[:2]


def _seal(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def parse_spec(entry: Mapping[str, Any]) -> GraphSpec:
    """The graph that `dataclasses.asdict` turned into `entry`."""

    def tensors(entries: Iterable[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(tensor["name"], tensor["dtype"], tuple(tensor["shape"])) for tensor in entries)

    return GraphSpec(entry["name"], tensors(entry["inputs"]), tensors(entry["outputs"]))


def parse_graph(entry: Mapping[str, Any]) -> GraphEntry:
    """The entry that `dataclasses.asdict` turned into `entry`."""
    return GraphEntry(
        parse_spec(entry["spec"]),
        FileEntry(**entry["onnx"]),
        tuple(FileEntry(**file) for file in entry["data"]),
        entry["opset"],
        entry["parameters"],
        tuple(map(_parse_target, entry.get("lora_targets", ()))),
    )


def _parse_target(entry: Mapping[str, Any]) -> LoraTarget:
    held = entry.get("held")
    tuples = {"shape": tuple(entry["shape"]), "stored": tuple(entry["stored"]), "held": None if held is None else tuple(held)}
    return LoraTarget(**{**entry, **tuples})


def _parse(document: Mapping[str, Any]) -> Manifest:
    def engine(entry: Mapping[str, Any]) -> EngineEntry:
        ranges = {axis: tuple(values) for axis, values in entry["ranges"].items()}
        capabilities = tuple(entry["compute_capabilities"])
        file = FileEntry(**entry["file"])
        return EngineEntry(**{**entry, "file": file, "ranges": ranges, "compute_capabilities": capabilities})

    def checkpoint(entry: Mapping[str, Any]) -> Checkpoint:
        transformer, loras = entry.get("transformer"), entry.get("loras", ())
        overlay = Overlay(**transformer) if transformer else None
        return Checkpoint(**{**entry, "transformer": overlay, "loras": tuple(Overlay(**lora) for lora in loras)})

    options = document["options"]
    return Manifest(
        checkpoint=checkpoint(document["checkpoint"]),
        options=Options(**{**options, "pag_layers": tuple(options["pag_layers"])}),
        model=ModelInfo(**document["model"]),
        graphs={name: parse_graph(entry) for name, entry in document["graphs"].items()},
        files=tuple(FileEntry(**file) for file in document["files"]),
        export_key=document["export_key"],
        engines=tuple(map(engine, document["engines"])),
        parity=document["parity"],
        tool_version=document["tool_version"],
        format=document["format"],
    )
