"""Exports a checkpoint to a bundle: everything in it except the engines.

The export writes into the folder `<name>.partial`, with a journal of the finished graphs, and renames it to `<name>` at the end
(`output_folder.py` says where these are if `<name>` cannot be renamed). Meanwhile `<name>.lock` makes other exports to the same
place wait. A killed export leaves the lock file behind, but the file no longer locks anything. An interrupted export leaves the old
bundle unchanged, and the next export of the same checkpoint with the same options continues after the last finished graph.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sana_export import __version__
from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.checkpoint.checks import check_encoder
from sana_export.checkpoint.vae_config import read_decoder
from sana_export.environment import import_digest, peak_rss_bytes
from sana_export.errors import ArtifactError
from sana_export.export.graph_files import export_graphs, groups
from sana_export.export.journal import Journal, remove_temporary
from sana_export.export.meter import ExportMeter
from sana_export.export.onnx import OPSET
from sana_export.export.options import choose_graphs, choose_options, choose_quantized, uses_encoder
from sana_export.export.quantize.statistics import MEASURED, CalibrationSource
from sana_export.export.size import OVERHEAD, graph_bytes, temporary_bytes, text_bytes
from sana_export.export.text_files import EMBEDDINGS, INSTRUCTION, TOKENIZER, write_text_files
from sana_export.files import check_files, disk_errors, file_entry, locked, require_free
from sana_export.graphs.numerics import NUMERICS
from sana_export.graphs.vae_decoder import VaeDecoderTail, tile_halo, tile_scale
from sana_export.graphs.vae_encoder import VaeEncoderHead, encoder_halo, encoder_tile_scale
from sana_export.manifest import FILE_NAME, GraphEntry, Manifest, ModelInfo, Options
from sana_export.output_folder import OutputFolder
from sana_export.progress import OnProgress, ignore_progress
from sana_export.quantization.choice import calibrated_parts
from sana_export.quantization.layers import EMBEDDINGS as QUANTIZED_EMBEDDINGS
from sana_export.user_paths import user_path
from sana_export.variants import SPRINT_STEPS, STEPS

log = logging.getLogger(__name__)

#: What an export replaces (`OutputFolder.check_replaceable`).
_REPLACEABLE = FILE_NAME, "a bundle", "-o"
MAX_SEQUENCE_LENGTH = 300


def export_bundle(
    checkpoint: SanaCheckpoint,
    output: Path,
    *,
    precision: str = "fp16",
    pag_layers: Iterable[str | int] = (),
    clamp: bool | None = None,
    graphs: Iterable[str] = (),
    quantize: Iterable[str] = (),
    quantize_method: Iterable[str] = (),
    calibration: CalibrationSource | Path | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Manifest:
    """Export `checkpoint` to the bundle `output` and return its manifest.

    `precision`: fp32, fp16 or bf16.
    `pag_layers`: the transformer blocks that perturbed-attention guidance perturbs, as numbers or names.
    `clamp`: whether to clip self-attention outputs to +-65504. None: as the checkpoint was trained (variants.py, or the dtype of
    the stored weights).
    `graphs`: the graphs to export, and groups of them (contract.GRAPH_GROUPS): ["default", "img2img"] adds image-to-image and
    inpainting. Empty: "default", and all groups for a checkpoint that was opened with a ControlNet.
    `quantize`: schemes (quantization/schemes.py): ["int8-weight"] for all parts of the bundle that take one,
    or ["text_encoder=int4-weight"] for one part. Several are combined.
    `quantize_method`: the steps that choose the numbers (quantization/method.py). Empty: each scheme's own.
    `calibration`: what layers read, if the quantization takes that: how to measure it (`sana_export.Calibration()`), or a file.
    `on_progress`: is called with a `Progress` at every step.

    If `output` already is the result of this export, it is kept, with its engines. Waits if another process is exporting to
    `output`. Raises UsageError for invalid options or if `output` contains something that is not a bundle, ArtifactError for a
    checkpoint that the graphs do not support, ParityError if an exported graph does not equal its module, and DependencyError if
    the disk is full or not writable.
    """
    place = OutputFolder.of(user_path(output, "the output folder"))
    options = choose_options(checkpoint, precision, pag_layers, clamp)
    names = choose_graphs(graphs, checkpoint)
    options, source = choose_quantized(options, names, checkpoint, quantize, quantize_method, calibration)
    if uses_encoder(names):
        check_encoder(checkpoint)
    place.check_replaceable(*_REPLACEABLE)  # before anything is written into it
    with locked(place.lock, lambda: log.warning("another process exports to %s: waiting for it", output), remove=True):
        return _export(checkpoint, place, options, names, source, on_progress)


def _export(
    checkpoint: SanaCheckpoint,
    place: OutputFolder,
    options: Options,
    names: Sequence[str],
    source: CalibrationSource | None,
    on_progress: OnProgress,
) -> Manifest:
    """`export_bundle` while this process holds the lock on the place."""
    key = export_key(checkpoint, options, names)
    output, partial = place.folder, place.partial
    place.restore()
    if (existing := existing_bundle(place)) is not None:
        if existing.export_key == key:
            log.info("%s is up to date", output)
            return existing
        log.info("replacing %s and deleting its %d engines", output, len(existing.engines))
    grouped = groups(names)
    sizes = {"": text_bytes(checkpoint, options), **{owner: graph_bytes(owner, checkpoint, options) for owner in grouped}}
    with disk_errors(output):
        journal = Journal(partial, key)
        finished = {owner: done for owner, group in grouped.items() if (done := journal.finished(group))}
        needed = sum(sizes[part] for part in sizes if part not in finished)
        temporary = max((temporary_bytes(owner, checkpoint, options) for owner in grouped if owner not in finished), default=0)
        require_free(output.parent, needed + temporary + OVERHEAD, f"the bundle {output}")
        meter = ExportMeter(sizes, on_progress)
        with meter.step("", "tokenizer, instruction and embeddings"):
            instruction = write_text_files(checkpoint, partial, quantized=QUANTIZED_EMBEDDINGS in options.quantize)
        parts = calibrated_parts(options.quantize, options.quantize_method)
        calibration = None
        if source is not None:
            journal.add({})  # a killed export keeps its calibration even if no graph is finished
            calibration = source.open(checkpoint, options, parts, partial, on_progress)
        entries: dict[str, GraphEntry] = {}
        for owner, group in grouped.items():
            if owner not in finished:
                with meter.step(owner, ", ".join(group)):
                    finished[owner] = export_graphs(owner, group, checkpoint, options, partial, calibration)
                journal.add(finished[owner])
            entries |= finished[owner]
        manifest = Manifest(
            checkpoint=checkpoint.record(),
            options=options,
            model=model_info(checkpoint, instruction, encoder=uses_encoder(names)),
            graphs=entries,
            files=tuple(file_entry(partial, partial / name) for name in (TOKENIZER, INSTRUCTION, EMBEDDINGS)),
            export_key=key,
        )
        manifest.save(partial)
        journal.path.unlink()
        (partial / MEASURED).unlink(missing_ok=True)
        remove_temporary(partial)
        place.put(last=FILE_NAME)
    meter.done()
    log.info("exported in %.0f s with a peak of %.2f GB of memory", meter.seconds, peak_rss_bytes() / 1e9)
    return manifest


def export_key(checkpoint: SanaCheckpoint, options: Options, names: Iterable[str], module: str = __name__) -> str:
    """Hash of everything that determines what an export by the code in `module` writes."""
    parts = [
        __version__,
        import_digest(module),
        torch.__version__,
        OPSET,
        checkpoint.sha256,
        dataclasses.asdict(options),
        list(names),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def existing_bundle(place: OutputFolder) -> Manifest | None:
    """The manifest of the bundle at `place`. None if there is nothing, an empty folder or a damaged bundle.

    Raises UsageError if there is anything else.
    """
    place.check_replaceable(*_REPLACEABLE)
    output = place.folder
    if not place.content():
        return None
    try:
        manifest = Manifest.load(output)
        check_files(output, [*manifest.files, *(file for graph in manifest.graphs.values() for file in graph.files)], fix="")
    except ArtifactError as error:
        log.warning("replacing the unusable bundle %s: %s", output, error.message)
        return None
    return manifest


def model_info(checkpoint: SanaCheckpoint, instruction: str, *, encoder: bool = False) -> ModelInfo:
    """The manifest's entry for the model. `encoder`: the bundle has the encoder's graphs."""
    transformer, vae, text = (checkpoint.config(component) for component in ("transformer", "vae", "text_encoder"))
    # The halo depends only on the layers, so the weights need no values.
    layers = checkpoint.weights("vae").on_meta()
    variant, guidance_embeds = checkpoint.defaults_from, bool(transformer["guidance_embeds"])
    return ModelInfo(
        sample_size=transformer["sample_size"],
        latent_channels=transformer["in_channels"],
        vae_scale_factor=read_decoder(vae).stride,
        # SanaSprintPipeline does not apply the config's scale.
        timestep_scale=1.0 if guidance_embeds else transformer["timestep_scale"],
        text_channels=text["hidden_size"],
        embedding_rows=checkpoint.weights("text_encoder").shape("embed_tokens.weight")[0],
        scheduler=checkpoint.config("scheduler"),
        instruction=instruction,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        default_steps=SPRINT_STEPS if guidance_embeds else STEPS,
        default_guidance_scale=variant.guidance_scale if variant else 4.5,
        decoder_tile_halo=tile_halo(VaeDecoderTail(vae, layers, NUMERICS["float32"])),
        decoder_tile_scale=tile_scale(vae),
        guidance_embeds=guidance_embeds,
        **(_encoder_info(vae, layers) if encoder else {}),
    )


def _encoder_info(vae: Mapping[str, Any], layers: Mapping[str, torch.Tensor]) -> dict[str, int]:
    scale = encoder_tile_scale(vae)
    halo = encoder_halo(VaeEncoderHead(vae, layers, NUMERICS["float32"]), scale)
    return {"encoder_tile_halo": halo, "encoder_tile_scale": scale}
