"""Exports a checkpoint to the layout that optimum writes: one ONNX file for each component, beside diffusers' configs.

Folders, files, tensors and axes have the names of optimum-onnx (its `SanaTransformerOnnxConfig` and others), so what loads its
exports loads these. The graphs are composed of the deployment graphs (graphs/components.py). The folder is written whole or not at
all; the file `RECORD` in it says what it was made from, so that an export only ever replaces a folder of its own kind.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sana_export import __version__
from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.checkpoint.checks import check_encoder
from sana_export.checkpoint.configs import config_name
from sana_export.checkpoint.vae_config import read_decoder
from sana_export.contract import GraphSpec, TensorSpec
from sana_export.environment import peak_rss_bytes
from sana_export.errors import ArtifactError, UsageError
from sana_export.export.bundle import export_key
from sana_export.export.mapped_pages import returning_pages
from sana_export.export.meter import ExportMeter
from sana_export.export.onnx import check_onnx, check_values, export_onnx, run_module
from sana_export.export.options import choose_options
from sana_export.export.size import OVERHEAD, graph_bytes
from sana_export.files import FileEntry, check_files, file_entry, locked, require_free, write_whole
from sana_export.formats.dtypes import WEIGHT_DTYPES
from sana_export.graphs.components import TextEncoderComponent, TransformerComponent, VaeDecoderComponent, VaeEncoderComponent
from sana_export.graphs.numerics import NUMERICS
from sana_export.graphs.storage import WeightFile, stored_in
from sana_export.json_records import record_from_json
from sana_export.manifest import Checkpoint, Options
from sana_export.output_folder import OutputFolder
from sana_export.progress import OnProgress, ignore_progress
from sana_export.user_paths import user_path
from sana_export.variants import INDEX

log = logging.getLogger(__name__)

#: The file that says what a layout was made from.
RECORD = "sana_layout.json"
#: What an export replaces (`OutputFolder.check_replaceable`).
_REPLACEABLE = RECORD, "an exported layout", "-o"
ONNX = "model.onnx"
#: The name that optimum gives to a file of weights.
WEIGHTS = "model.onnx_data"


@dataclass(frozen=True)
class ComponentLayout:
    """What an exported layout was made from, and what it consists of: the content of `RECORD`."""

    checkpoint: Checkpoint
    options: Options
    #: The graph of each component, by the name of its folder.
    components: dict[str, GraphSpec]
    #: Every other file.
    files: tuple[FileEntry, ...]
    #: Hash of everything that determines the files.
    export_key: str
    tool_version: str = __version__

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True)
class ComponentGraph:
    """One folder of the layout."""

    #: The part of the checkpoint that its config and weights come from.
    part: str
    make: Callable[[Mapping[str, Any], Mapping[str, Tensor], Options], nn.Module]
    #: The deployment graphs whose weights it has.
    graphs: tuple[str, ...]


def _plain(part: str, graph: type[nn.Module], name: str) -> ComponentGraph:
    return ComponentGraph(part, lambda config, weights, options: graph(config, weights, NUMERICS[options.dtype]), (name,))


def _transformer(config: Mapping[str, Any], weights: Mapping[str, Tensor], options: Options) -> nn.Module:
    return TransformerComponent(config, weights, NUMERICS[options.dtype], clamp=options.clamp)


COMPONENTS: dict[str, ComponentGraph] = {
    "text_encoder": _plain("text_encoder", TextEncoderComponent, "text_encoder"),
    "transformer": ComponentGraph("transformer", _transformer, ("context", "denoiser")),
    "vae_encoder": _plain("vae", VaeEncoderComponent, "vae_encoder"),
    "vae_decoder": _plain("vae", VaeDecoderComponent, "vae_decoder"),
}


@dataclass(frozen=True)
class ComponentSizes:
    """The lengths of the axes for one set of inputs (`example_inputs.AxisSizes`)."""

    lengths: Mapping[str, int]
    #: The shortest height and width of the inputs.
    shortest: int = 1

    def of(self, axis: str) -> int:
        return self.lengths[axis]

    def least(self, spec: GraphSpec) -> dict[str, int]:
        return dict.fromkeys(("height", "width"), self.shortest) if self.shortest > 1 else {}


def export_components(
    checkpoint: SanaCheckpoint,
    output: Path,
    *,
    precision: str = "fp16",
    clamp: bool | None = None,
    on_progress: OnProgress = ignore_progress,
) -> ComponentLayout:
    """Export `checkpoint` to the folder `output` in optimum's layout. The arguments are those of `export_bundle`.

    Inputs and outputs are float32 or int64 in every precision. A layout that already is the result of this export is kept. Raises
    UsageError for invalid options, a checkpoint with a ControlNet, or if `output` contains something else; ArtifactError for a
    checkpoint that the graphs do not support; ParityError if an exported graph does not equal its module; and DependencyError if
    the disk is full or not writable.
    """
    place = OutputFolder.of(user_path(output, "the output folder"))
    if checkpoint.controlnet is not None:
        raise UsageError(
            "optimum's layout has no place for a ControlNet",
            found=f"the ControlNet {checkpoint.controlnet.source}",
            wanted="a checkpoint without one, or the layout of a bundle",
            fix="--layout bundle",
        )
    options = choose_options(checkpoint, precision, (), clamp)
    specs = component_specs(checkpoint)
    place.check_replaceable(*_REPLACEABLE)
    with locked(place.lock, lambda: log.warning("another process exports to %s: waiting for it", output), remove=True):
        return _export(checkpoint, place, options, specs, on_progress)


def _export(
    checkpoint: SanaCheckpoint, place: OutputFolder, options: Options, specs: dict[str, GraphSpec], on_progress: OnProgress
) -> ComponentLayout:
    """`export_components` while this process holds the lock on the place."""
    key = export_key(checkpoint, options, specs, __name__)
    output = place.folder
    place.restore()
    if (existing := existing_layout(place)) is not None and existing.export_key == key:
        log.info("%s is up to date", output)
        return existing
    sizes = {name: component_bytes(name, checkpoint, options) for name in specs}
    meter = ExportMeter(sizes, on_progress)
    require_free(output.parent, sum(sizes.values()) + OVERHEAD, f"the layout {output}")
    with place.written(last=RECORD) as partial:
        for name, spec in specs.items():
            with meter.step(name, name):
                export_component(name, spec, checkpoint, options, partial / name)
        _copy_files(checkpoint, partial)
        files = tuple(file_entry(partial, path) for path in sorted(partial.rglob("*")) if path.is_file())
        layout = ComponentLayout(checkpoint.record(), options, specs, files, key)
        write_whole(partial / RECORD, json.dumps(dataclasses.asdict(layout), indent=2))
    meter.done()
    log.info("exported in %.0f s with a peak of %.2f GB of memory", meter.seconds, peak_rss_bytes() / 1e9)
    return layout


def export_component(name: str, spec: GraphSpec, checkpoint: SanaCheckpoint, options: Options, folder: Path) -> None:
    """Write the ONNX file of a component and its config, and check the file."""
    component = COMPONENTS[name]
    config = checkpoint.config(component.part)
    trace, check = example_sizes(name, checkpoint)
    with WeightFile(folder / WEIGHTS) as weights:
        with stored_in(weights):
            module = component.make(config, checkpoint.weights(component.part), options).eval()
        export_onnx(module, spec, folder / ONNX, weights, trace)
        check_onnx(folder / ONNX, spec)
        with returning_pages(folder):
            examples = run_module(module, spec, check)
        check_values(folder / ONNX, spec, examples, options.precision)
    # Programs that load the layout know no defaults of a config.
    complete = {**checkpoint.read(config_name(component.part)), **config}
    write_whole(folder / "config.json", json.dumps(complete, indent=2, sort_keys=True) + "\n")


def _copy_files(checkpoint: SanaCheckpoint, folder: Path) -> None:
    """The checkpoint's own tokenizer, scheduler and model_index.json."""
    names = [f"tokenizer/{path.name}" for path in checkpoint.folder.glob("tokenizer/*") if path.is_file()]
    for name in (config_name("scheduler"), *names):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(checkpoint.config_file(name), folder / name)
    index = dict(checkpoint.index)
    if index["tokenizer"][1] == "GemmaTokenizer":
        # transformers 4, which optimum-onnx uses, reads tokenizer.json only with this class. In transformers 5 both are one.
        index["tokenizer"] = ["transformers", "GemmaTokenizerFast"]
    write_whole(folder / INDEX, json.dumps(index, indent=2) + "\n")


def component_specs(checkpoint: SanaCheckpoint) -> dict[str, GraphSpec]:
    """The tensors of every component, with optimum-onnx's names of tensors and axes.

    Without `vae_encoder`, and with a warning, if the autoencoder's encoder is not supported: only image-to-image needs it.
    """
    transformer, stride = checkpoint.config("transformer"), read_decoder(checkpoint.config("vae")).stride
    channels, width = transformer["in_channels"], checkpoint.config("text_encoder")["hidden_size"]

    def f32(name: str, *shape: str | int) -> TensorSpec:
        return TensorSpec(name, "float32", ("batch_size", *shape))

    def i64(name: str) -> TensorSpec:
        return TensorSpec(name, "int64", ("batch_size", "sequence_length"))

    guidance = (f32("guidance"),) if transformer["guidance_embeds"] else ()
    specs = (
        GraphSpec(
            "text_encoder",
            (i64("input_ids"), i64("attention_mask")),
            (f32("last_hidden_state", "sequence_length", width),),
        ),
        GraphSpec(
            "transformer",
            (
                f32("hidden_states", channels, "height", "width"),
                f32("encoder_hidden_states", "sequence_length", width),
                i64("encoder_attention_mask"),
                f32("timestep"),
                *guidance,
            ),
            (f32("out_hidden_states", channels, "height", "width"),),
        ),
        GraphSpec(
            "vae_encoder",
            (f32("sample", 3, "height", "width"),),
            (f32("latent_sample", channels, f"height / {stride}", f"width / {stride}"),),
        ),
        GraphSpec(
            "vae_decoder",
            (f32("latent_sample", channels, "latent_height", "latent_width"),),
            (f32("sample", 3, f"latent_height * {stride}", f"latent_width * {stride}"),),
        ),
    )
    found = {spec.name: spec for spec in specs}
    try:
        check_encoder(checkpoint)
    except ArtifactError as error:
        log.warning("the layout gets no vae_encoder, which only image-to-image needs: %s", error.message)
        del found["vae_encoder"]
    return found


def example_sizes(name: str, checkpoint: SanaCheckpoint) -> tuple[ComponentSizes, ComponentSizes]:
    """The sizes to trace the component `name` with, and others to check it with (see `example_inputs.TRACE_SIZES`)."""
    pixels = read_decoder(checkpoint.config("vae")).stride if name == "vae_encoder" else 1
    vocabulary = checkpoint.weights("text_encoder").shape("embed_tokens.weight")[0]

    def sizes(batch: int, tokens: int, height: int, width: int) -> ComponentSizes:
        lengths = {
            "batch_size": batch,
            "sequence_length": tokens,
            "height": height * pixels,
            "width": width * pixels,
            "latent_height": height,
            "latent_width": width,
            "vocabulary": vocabulary,
        }
        return ComponentSizes(lengths, pixels)

    return sizes(2, 7, 4, 6), sizes(3, 11, 5, 3)


def component_bytes(name: str, checkpoint: SanaCheckpoint, options: Options) -> int:
    """Bytes of the weight file of the component `name`, about."""
    table = math.prod(checkpoint.weights("text_encoder").shape("embed_tokens.weight")) * WEIGHT_DTYPES[options.dtype].bytes
    own = sum(graph_bytes(graph, checkpoint, options) for graph in COMPONENTS[name].graphs)
    return own + (table if name == "text_encoder" else 0)


def existing_layout(place: OutputFolder) -> ComponentLayout | None:
    """The layout at `place`. None if there is none or it is damaged."""
    place.check_replaceable(*_REPLACEABLE)
    if not place.content():
        return None
    try:
        layout = record_from_json(ComponentLayout, json.loads((place.folder / RECORD).read_text("utf-8")))
        check_files(place.folder, layout.files, fix="")
    except (ArtifactError, ValueError) as error:
        log.warning("replacing the unusable layout %s: %s", place.folder, error)
        return None
    return layout
