"""Checkpoint to bundle: everything that a bundle holds except engines, written aside and put in place whole.

While it is written a bundle lives beside its final place as `<name>.partial`, with a journal of the graphs that are done, and
`<name>.lock` keeps other exports to that place waiting (one that is killed leaves the file, which locks nothing then). An
interrupted export leaves the old bundle as it was; the next export of the same checkpoint with the same options goes on after the
last finished graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from sana_export import __version__
from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.contract import GRAPHS
from sana_export.environment import import_digest, peak_rss_bytes
from sana_export.errors import ArtifactError, UsageError
from sana_export.export.graph_files import export_graphs, groups
from sana_export.export.onnx import OPSET
from sana_export.export.size import OVERHEAD, graph_bytes, text_bytes
from sana_export.export.text_files import EMBEDDINGS, INSTRUCTION, TOKENIZER, write_text_files
from sana_export.files import check_files, disk_errors, file_entry, locked, require_free, write_whole
from sana_export.graphs.numerics import NUMERICS
from sana_export.graphs.vae_decoder import VaeDecoderTail, tile_halo, tile_scale
from sana_export.manifest import FILE_NAME, PRECISIONS, GraphEntry, Manifest, ModelInfo, Options, parse_graph
from sana_export.progress import OnProgress, Progress, ignore_progress
from sana_export.variants import SPRINT_STEPS, STEPS

log = logging.getLogger(__name__)

JOURNAL = "export.json"
MAX_SEQUENCE_LENGTH = 300


def export_bundle(
    checkpoint: SanaCheckpoint,
    output: Path,
    *,
    precision: str = "fp16",
    pag_layers: Iterable[str | int] = (),
    clamp: bool | None = None,
    graphs: Iterable[str] = (),
    on_progress: OnProgress = ignore_progress,
) -> Manifest:
    """Export `checkpoint` to the bundle `output` and return its manifest.

    `clamp` None: as the checkpoint was trained (variants.py, or the stored weights' dtype). `graphs` empty: all. A bundle that
    already is this export is kept as it is, with its engines. Raises UsageError for options that make no sense and for an output
    that holds something else, ParityError where a graph does not equal its module, DependencyError where the disk refuses. Waits
    while another process exports to `output`.
    """
    options = choose_options(checkpoint, precision, pag_layers, clamp)
    names = choose_graphs(graphs)
    lock = output.with_name(output.name + ".lock")
    with locked(lock, lambda: log.warning("another process exports to %s: waiting for it", output), remove=True):
        return _export(checkpoint, output, options, names, on_progress)


def _export(checkpoint: SanaCheckpoint, output: Path, options: Options, names: Sequence[str], on_progress: OnProgress) -> Manifest:
    """`export_bundle`, once nobody else exports to `output`."""
    key = export_key(checkpoint, options, names)
    partial, old = output.with_name(output.name + ".partial"), output.with_name(output.name + ".old")
    if old.exists() and not output.exists():
        old.rename(output)
    if (existing := existing_bundle(output)) is not None:
        if existing.export_key == key:
            log.info("%s is up to date", output)
            return existing
        log.info("replacing %s, whose %d engines go with it", output, len(existing.engines))
    parts = groups(names)
    sizes = {"": text_bytes(checkpoint), **{owner: graph_bytes(owner, checkpoint, options) for owner in parts}}
    with disk_errors(output):
        journal = Journal(partial, key)
        finished = {owner: done for owner, group in parts.items() if (done := journal.finished(group))}
        require_free(output.parent, sum(sizes[part] for part in sizes if part not in finished) + OVERHEAD, f"the bundle {output}")
        meter = _Meter(sizes, on_progress)
        with meter.step("", "tokenizer, instruction and embeddings"):
            instruction = write_text_files(checkpoint, partial)
        entries: dict[str, GraphEntry] = {}
        for owner, group in parts.items():
            if owner not in finished:
                with meter.step(owner, ", ".join(group)):
                    finished[owner] = export_graphs(owner, group, checkpoint, options, partial)
                journal.add(finished[owner])
            entries |= finished[owner]
        manifest = Manifest(
            checkpoint=checkpoint.record(),
            options=options,
            model=model_info(checkpoint, instruction),
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
    meter.done()
    log.info("exported in %.0f s, at most %.2f GB of memory", meter.seconds, peak_rss_bytes() / 1e9)
    return manifest


class _Meter:
    """Tells `on_progress` of every step, with the bytes that the steps before it wrote and the time that the rest will take."""

    def __init__(self, sizes: Mapping[str, int], on_progress: OnProgress) -> None:
        self._sizes, self._tell, self._done = sizes, on_progress, dict[str, float]()

    @contextlib.contextmanager
    def step(self, part: str, doing: str) -> Iterator[None]:
        self._report(doing, list(self._sizes).index(part))
        started = time.monotonic()
        yield
        self._done[part] = time.monotonic() - started

    @property
    def seconds(self) -> float:
        """What the steps took so far."""
        return sum(self._done.values())

    def done(self) -> None:
        self._report("done", len(self._sizes))

    def _report(self, doing: str, index: int) -> None:
        parts = list(self._sizes)
        written, total = sum(self._sizes[part] for part in parts[:index]), sum(self._sizes.values())
        timed = sum(self._sizes[part] for part in self._done)
        left = self.seconds / timed * (total - written) if timed and total > written else None
        self._tell(Progress(doing, index, len(parts), left, bytes_done=written, bytes_total=total))


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
    transformer, names = checkpoint.config("transformer"), [*map(str, pag_layers)]
    if names and transformer.get("guidance_embeds"):
        raise UsageError(
            f"{checkpoint.source} cannot be sampled with PAG: its guidance is distilled into one run a step (SANA-Sprint)",
            found=f"--pag-layers {' '.join(names)}",
            wanted="no PAG layers",
            fix="leave out --pag-layers",
        )
    layers = transformer["num_layers"]
    return Options(precision, clamp, tuple(sorted({parse_pag_layer(name, layers) for name in names})))


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
    code = import_digest(__name__)
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

    def finished(self, names: Iterable[str]) -> dict[str, GraphEntry] | None:
        """The entries of graphs that share a folder, where all of them are done and whole."""
        entries = {name: self.graphs[name] for name in names if name in self.graphs}
        if len(entries) < len(list(names)):
            return None
        try:
            check_files(self.path.parent, {file for entry in entries.values() for file in entry.files}, fix="")
        except ArtifactError as error:
            log.warning("exporting %s again: %s", ", ".join(names), error.message)
            return None
        return entries

    def add(self, entries: Mapping[str, GraphEntry]) -> None:
        self.graphs |= entries
        document = {"key": self.key, "graphs": {name: dataclasses.asdict(graph) for name, graph in self.graphs.items()}}
        write_whole(self.path, json.dumps(document))


def model_info(checkpoint: SanaCheckpoint, instruction: str) -> ModelInfo:
    """The manifest's part on the model."""
    transformer, vae, text = (checkpoint.config(component) for component in ("transformer", "vae", "text_encoder"))
    # The halo follows from the layers alone.
    layers = VaeDecoderTail(vae, checkpoint.weights("vae").on_meta(), NUMERICS["float32"])
    variant, guidance_embeds = checkpoint.defaults_from, bool(transformer.get("guidance_embeds"))
    return ModelInfo(
        sample_size=transformer["sample_size"],
        latent_channels=transformer["in_channels"],
        vae_scale_factor=2 ** (len(vae["encoder_block_out_channels"]) - 1),
        # SanaSprintPipeline does not apply it.
        timestep_scale=1.0 if guidance_embeds else transformer.get("timestep_scale", 1.0),
        text_channels=text["hidden_size"],
        embedding_rows=checkpoint.weights("text_encoder").shape("embed_tokens.weight")[0],
        scheduler=checkpoint.config("scheduler"),
        instruction=instruction,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        default_steps=SPRINT_STEPS if guidance_embeds else STEPS,
        default_guidance_scale=variant.guidance_scale if variant else 4.5,
        decoder_tile_halo=tile_halo(layers),
        decoder_tile_scale=tile_scale(vae),
        guidance_embeds=guidance_embeds,
    )
