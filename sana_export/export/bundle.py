"""Checkpoint to bundle: everything that a bundle holds except engines, written aside and put in place whole.

While it is written a bundle lives beside its final place as `<name>.partial`, with a journal of the graphs that are done. An
interrupted export leaves the old bundle as it was; the next export of the same checkpoint with the same options goes on after the
last finished graph.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from sana_export import __version__
from sana_export.contract import GRAPHS
from sana_export.disk import disk_errors
from sana_export.environment import source_digest
from sana_export.errors import ArtifactError, UsageError
from sana_export.export.modules import build_graph, graph_spec
from sana_export.export.onnx import OPSET, check_onnx, check_values, export_onnx, external_files, parameter_count
from sana_export.graphs.checkpoint import SanaCheckpoint
from sana_export.graphs.text_encoder import encode_instruction
from sana_export.manifest import (
    FILE_NAME,
    PRECISIONS,
    Checkpoint,
    GraphEntry,
    Manifest,
    ModelInfo,
    Options,
    check_files,
    file_entry,
    parse_graph,
)

log = logging.getLogger(__name__)

JOURNAL = "export.json"
TOKENIZER = "tokenizer/tokenizer.json"
INSTRUCTION = "instruction.safetensors"
EMBEDDINGS = "embeddings.safetensors"
MAX_SEQUENCE_LENGTH = 300

#: Called with what is about to be done, the count of steps done and of all steps.
Progress = Callable[[str, int, int], None]


def export_bundle(
    checkpoint: SanaCheckpoint,
    output: Path,
    *,
    precision: str = "fp16",
    pag_layers: Iterable[str | int] = (),
    clamp: bool | None = None,
    graphs: Iterable[str] = (),
    on_progress: Progress = lambda doing, done, total: None,
) -> Manifest:
    """Export `checkpoint` to the bundle `output` and return its manifest.

    `clamp` None: as the checkpoint was trained (variants.py, or the stored weights' dtype). `graphs` empty: all. A bundle that
    already is this export is kept as it is, with its engines. Raises UsageError for options that make no sense and for an output
    that holds something else, ParityError where a graph does not equal its module, DependencyError where the disk refuses.
    """
    options = choose_options(checkpoint, precision, pag_layers, clamp)
    names = choose_graphs(graphs)
    key = export_key(checkpoint, options, names)
    partial, old = output.with_name(output.name + ".partial"), output.with_name(output.name + ".old")
    if old.exists() and not output.exists():
        old.rename(output)
    if (existing := existing_bundle(output)) is not None:
        if existing.export_key == key:
            log.info("%s is up to date", output)
            return existing
        log.info("replacing %s, whose %d engines go with it", output, len(existing.engines))
    with disk_errors(output):
        journal = Journal(partial, key)
        on_progress("tokenizer, instruction and embeddings", 0, len(names) + 1)
        model = write_text_files(checkpoint, partial)
        entries = {}
        for done, name in enumerate(names, start=1):
            on_progress(name, done, len(names) + 1)
            entries[name] = journal.finished(name) or export_graph(name, checkpoint, options, partial)
            journal.add(name, entries[name])
        manifest = Manifest(
            checkpoint=Checkpoint(
                checkpoint.source,
                checkpoint.revision,
                checkpoint.sha256,
                checkpoint.variant.alias if checkpoint.variant else None,
                checkpoint.synthetic,
                checkpoint.weights_variant,
                checkpoint.trained_with_clamp()[0],
            ),
            options=options,
            model=model,
            graphs=entries,
            files=tuple(file_entry(partial, partial / name) for name in (TOKENIZER, INSTRUCTION, EMBEDDINGS)),
            export_key=key,
        )
        manifest.save(partial)
        journal.path.unlink()
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)
            output.rename(old)
        partial.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    on_progress("done", len(names) + 1, len(names) + 1)
    return manifest


def choose_options(checkpoint: SanaCheckpoint, precision: str, pag_layers: Iterable[str | int], clamp: bool | None) -> Options:
    """Check the options against the checkpoint; say where the clamp comes from."""
    if precision not in PRECISIONS:
        raise UsageError("unknown precision", found=precision, wanted=", ".join(PRECISIONS))
    trained, reason = checkpoint.trained_with_clamp()
    if clamp is None:
        clamp = trained
        log.info("self-attention outputs are %s: %s", "clipped to +-65504" if clamp else "not clipped", reason)
    elif clamp != trained:
        log.warning("--%sclamp overrides what is known of this checkpoint: %s", "" if clamp else "no-", reason)
    layers = checkpoint.config("transformer")["num_layers"]
    return Options(precision, clamp, tuple(sorted({parse_pag_layer(str(name), layers) for name in pag_layers})))


def parse_pag_layer(name: str, layers: int) -> int:
    """The block that "transformer_blocks.8", "blocks.8" or "8" names, exactly; UsageError where there is none."""
    number = name.removeprefix("transformer_").removeprefix("blocks.").removesuffix(".attn1")
    if not number.isdecimal() or int(number) >= layers:
        raise UsageError("no such layer for PAG", found=name, wanted=f"transformer_blocks.0 to transformer_blocks.{layers - 1}")
    return int(number)


def choose_graphs(names: Iterable[str]) -> list[str]:
    """The graphs to export, in the table's order; all where `names` is empty."""
    wanted = set(names) or set(GRAPHS)
    if unknown := wanted - set(GRAPHS):
        raise UsageError("no such graph", found=", ".join(sorted(unknown)), wanted=", ".join(GRAPHS))
    return [name for name in GRAPHS if name in wanted]


def export_key(checkpoint: SanaCheckpoint, options: Options, names: Iterable[str]) -> str:
    """Hash of all that decides what an export writes."""
    code = source_digest("graphs", "export")
    parts = [__version__, code, torch.__version__, OPSET, checkpoint.sha256, dataclasses.asdict(options), list(names)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def existing_bundle(output: Path) -> Manifest | None:
    """The manifest of the whole bundle at `output`; None for nothing, an empty folder or a damaged bundle.

    Raises UsageError for anything else.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / FILE_NAME).is_file():
        raise UsageError(
            f"{output} holds something that is not a bundle, and is left alone",
            found="no manifest.json in it",
            wanted="a new name, an empty folder or an older bundle",
        )
    try:
        manifest = Manifest.load(output)
        check_files(output, [*manifest.files, *(file for graph in manifest.graphs.values() for file in graph.files)], fix="")
    except ArtifactError as error:
        log.warning("replacing a bundle that cannot be used: %s", error.message)
        return None
    return manifest


class Journal:
    """The graphs that an unfinished export in the folder `partial` has done. One of another key is thrown away."""

    def __init__(self, partial: Path, key: str) -> None:
        self.path, self.key = partial / JOURNAL, key
        self.graphs: dict[str, GraphEntry] = {}
        try:
            document = json.loads(self.path.read_text("utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            document = {}
        if document.get("key") == key:
            self.graphs = {name: parse_graph(entry) for name, entry in document["graphs"].items()}
            log.info("going on after %s", ", ".join(self.graphs))
        else:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def finished(self, name: str) -> GraphEntry | None:
        """The entry of a graph that is done and whole."""
        entry = self.graphs.get(name)
        try:
            check_files(self.path.parent, entry.files if entry else (), fix="")
        except ArtifactError as error:
            log.warning("exporting %s again: %s", name, error.message)
            return None
        return entry

    def add(self, name: str, entry: GraphEntry) -> None:
        self.graphs[name] = entry
        document = {"key": self.key, "graphs": {name: dataclasses.asdict(graph) for name, graph in self.graphs.items()}}
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(document), "utf-8")
        temporary.replace(self.path)


def export_graph(name: str, checkpoint: SanaCheckpoint, options: Options, bundle: Path) -> GraphEntry:
    """Export one graph into `bundle`, check it, and return its entry."""
    module, spec = build_graph(name, checkpoint, options), graph_spec(name, checkpoint, options)
    path = bundle / "onnx" / name / "model.onnx"
    shutil.rmtree(path.parent, ignore_errors=True)
    export_onnx(module, spec, path)
    model = check_onnx(path, spec)
    check_values(path, module, spec, options.precision)
    locations = external_files(model)
    for file in path.parent.iterdir():
        if file != path and file.name not in locations:
            file.unlink()  # a graph without weights leaves an empty one
    data = tuple(file_entry(bundle, path.parent / location) for location in locations)
    return GraphEntry(spec, file_entry(bundle, path), data, model.opset_import[0].version, parameter_count(model))


def write_text_files(checkpoint: SanaCheckpoint, bundle: Path) -> ModelInfo:
    """Write the tokenizer, the instruction's keys and values and the embedding table; return the manifest's part on the model."""
    from transformers import AutoTokenizer

    transformer, vae = checkpoint.config("transformer"), checkpoint.config("vae")
    text, weights = checkpoint.config("text_encoder"), checkpoint.weights("text_encoder")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder / "tokenizer", local_files_only=True)
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    path = bundle / TOKENIZER
    path.parent.mkdir(parents=True, exist_ok=True)
    backend.save(str(path))

    instruction = complex_human_instruction()
    token_ids = torch.tensor(backend.encode(instruction).ids)
    if token_ids.tolist() != tokenizer.encode(instruction) or token_ids[0] != tokenizer.bos_token_id:
        raise ArtifactError(
            "the tokenizer's file gives other ids than the tokenizer",
            found=backend.encode(instruction).tokens[:4],
            wanted=f"{tokenizer.bos_token} first, and the ids of {type(tokenizer).__name__}",
        )
    table = weights["embed_tokens.weight"]
    prefix, bos_row = encode_instruction(text, weights, table[token_ids].float())
    # The last token of the instruction may merge with the prompt, so its keys and values are never reused.
    tensors = {"token_ids": token_ids, "prefix": prefix[..., :-1, :].contiguous(), "bos_row": bos_row}
    for file, content in ((INSTRUCTION, tensors), (EMBEDDINGS, {"embed_tokens.weight": table})):
        save_file(content, bundle / file)
        (bundle / file).chmod(0o644)  # save_file makes it private

    variant = checkpoint.variant
    return ModelInfo(
        sample_size=transformer["sample_size"],
        latent_channels=transformer["in_channels"],
        vae_scale_factor=2 ** (len(vae["encoder_block_out_channels"]) - 1),
        timestep_scale=transformer.get("timestep_scale", 1.0),
        text_channels=text["hidden_size"],
        embedding_rows=table.shape[0],
        scheduler=checkpoint.config("scheduler"),
        instruction=instruction,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        default_steps=variant.steps if variant else 20,
        default_guidance_scale=variant.guidance_scale if variant else 4.5,
    )


def complex_human_instruction() -> str:
    """The instruction that Sana's pipelines put before a prompt: the default argument of diffusers' `SanaPipeline.__call__`."""
    from diffusers import SanaPipeline

    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)
