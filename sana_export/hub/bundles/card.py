"""The model card of a pushed bundle: README.md with what is in it, how close it is to its checkpoint, and whose terms apply.

The card states nothing that the manifest does not say, and no path of this machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sana_export.contract import GRAPHS, OPTIONAL_GRAPHS
from sana_export.hub.origin import REPO
from sana_export.manifest import EngineEntry, Manifest
from sana_export.records import Checkpoint
from sana_export.variants import Variant, find_variant

FILE_NAME = "README.md"
#: A card with this line is ours: the next push replaces it.
MARKER = "<!-- Written by sana-export push. Delete this line to keep your own text at the next push. -->"
#: The largest card that is read.
MAX_BYTES = 1 << 20
_GEMMA_TERMS = "https://ai.google.dev/gemma/terms"
#: How paths on somebody's machine begin, on any system, or what they contain.
_PRIVATE = re.compile(r"[/~]|\.\.|[A-Za-z]:[\\/]|.*\\", re.DOTALL)


def make_card(repo: str, manifest: Manifest) -> str:
    """The text of README.md for the bundle that `manifest` describes, in the repository `repo`."""
    base, row = base_repository(manifest.checkpoint), find_variant(manifest.checkpoint.source)
    sections = [
        f"---\n{_metadata(manifest, base, row)}---",
        MARKER,
        f"# {repo.partition('/')[2]}",
        _origin(manifest, base),
        "## Use\n\n" + _usage(repo, manifest),
        "## Graphs\n\n" + _graphs(manifest),
        "## Engines\n\n" + _engines(manifest.engines),
        "## Parity\n\n" + _parity(manifest.parity),
        "## License\n\n" + _license(base, row),
    ]
    return "\n\n".join(sections) + "\n"


def base_repository(checkpoint: Checkpoint) -> str | None:
    """The hub id of the checkpoint that a bundle was made from. None: local, embedded, synthetic or unknown.

    The manifest does not tell a hub id from a folder such as models/sana, unless the checkpoint was exported from a revision.
    """
    row = find_variant(checkpoint.source)
    if row is not None:
        return row.repo
    return checkpoint.source if checkpoint.revision and REPO.fullmatch(checkpoint.source) and not checkpoint.synthetic else None


def private_paths(manifest: Manifest) -> list[str]:
    """What the manifest names that looks like a path on the machine of the export."""
    checkpoint = manifest.checkpoint
    overlays = (checkpoint.transformer, checkpoint.vae, checkpoint.controlnet, *checkpoint.loras)
    named = [checkpoint.source, *(overlay.path for overlay in overlays if overlay is not None)]
    if manifest.parity is not None:
        named += [str(manifest.parity.get(key, "")) for key in ("bundle", "reference")]
    return [text for text in dict.fromkeys(named) if _PRIVATE.match(text)]


def _metadata(manifest: Manifest, base: str | None, row: Variant | None) -> str:
    """The YAML at the top, with values as JSON, which is YAML too."""
    tags = ["sana", "onnx", *dict.fromkeys(engine.backend for engine in manifest.engines), manifest.options.precision]
    fields: dict[str, Any] = {"library_name": "sana_export", "pipeline_tag": "text-to-image", "tags": tags}
    if base is not None:
        fields |= {"base_model": base, "license": "other", "license_name": "terms-of-the-base-model"}
        fields["license_link"] = f"https://huggingface.co/{base}"
    elif row is not None:
        fields["license"] = "apache-2.0"
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in fields.items())


def _origin(manifest: Manifest, base: str | None) -> str:
    checkpoint, model = manifest.checkpoint, manifest.model
    row = find_variant(checkpoint.source)
    if base is not None:
        source = f"[{base}](https://huggingface.co/{base})" + (
            f" at revision {_cell(checkpoint.revision)}" if checkpoint.revision else ""
        )
    elif row is not None:
        source = f"`{row.alias}`, a checkpoint of sana_export" + (" with random weights" if checkpoint.synthetic else "")
    else:
        source = "a custom checkpoint"
    extras = [
        text
        for text, overlay in (
            ("another transformer", checkpoint.transformer),
            ("another autoencoder", checkpoint.vae),
            ("a ControlNet", checkpoint.controlnet),
        )
        if overlay is not None
    ]
    extras += [f"{len(checkpoint.loras)} LoRA merged in"] if checkpoint.loras else []
    lines = [
        f"A Sana text-to-image model as ONNX graphs, made from {source}{', with ' if extras else ''}{', '.join(extras)}. "
        "It runs without PyTorch, with sana_export "
        f"{'.'.join(manifest.tool_version.split('.')[:2])} (it was written by {manifest.tool_version}).",
        "",
        f"- Precision: {manifest.options.precision}. Native size: {model.native_size} x {model.native_size} px. "
        f"{model.default_steps} steps, guidance scale {model.default_guidance_scale:g}.",
        f"- Checkpoint hash: `{checkpoint.sha256}`",
    ]
    if manifest.options.pag_layers:
        lines.append("- Perturbed attention guidance in blocks " + ", ".join(map(str, manifest.options.pag_layers)))
    groups = sorted({OPTIONAL_GRAPHS[name] for name in manifest.graphs if name in OPTIONAL_GRAPHS})
    return "\n".join([*lines, *([f"- Optional graphs: {', '.join(groups)}"] if groups else [])])


def _usage(repo: str, manifest: Manifest) -> str:
    python = f'from sana_export import SanaRuntime\n\nruntime = SanaRuntime.from_pretrained("{repo}")\n'
    python += 'runtime("a red apple", seed=42).images[0].save("apple.png")'
    shell = f'# sana_export with the extras cpu (or cuda) and hub\nsana-export generate {repo} "a red apple" -o apple.png\n'
    shell += f"sana-export pull {repo} -o {repo.partition('/')[2]}    # the whole bundle as a folder"
    note = (
        "Every file is checked against the hashes in `manifest.json` before it is used. ONNX graphs and weights contain no code. "
        "Engines, if there are any, are compiled GPU programs, which TensorRT loads; "
        '`backend="onnxruntime"` does not download or load them.'
    )
    return f"```bash\n{shell}\n```\n\n```python\n{python}\n```\n\n{note}"


def _graphs(manifest: Manifest) -> str:
    order = [*(name for name in GRAPHS if name in manifest.graphs), *(name for name in manifest.graphs if name not in GRAPHS)]
    rows = [
        (
            f"`{name}`",
            f"{(graph := manifest.graphs[name]).parameters / 1e6:.2f} M",
            _megabytes(sum(file.bytes for file in graph.files)),
        )
        for name in order
    ]
    note = (
        "Graphs that share their weights count them each."
        if len({graph.data for graph in manifest.graphs.values()}) < len(rows)
        else ""
    )
    return "\n\n".join(filter(None, [_table(("Graph", "Parameters", "Size"), rows), note]))


def _engines(engines: Sequence[EngineEntry]) -> str:
    if not engines:
        return "None. `sana-export build` makes them for your GPU."
    groups: dict[tuple[str, ...], list[EngineEntry]] = {}
    for engine in engines:
        built_for = ", ".join(engine.compute_capabilities) or "portable"
        key = (engine.backend, engine.backend_version, built_for, engine.operating_system, engine.profile)
        groups.setdefault(key, []).append(engine)
    rows = [(*key, str(len(group)), _megabytes(sum(engine.file.bytes for engine in group))) for key, group in groups.items()]
    head = ("Backend", "Version", "Compute capability", "System", "Profile", "Engines", "Size")
    return _table(head, rows) + "\n\nOnly those that run on your machine are downloaded."


def _parity(parity: Mapping[str, Any] | None) -> str:
    """The report of `sana-export verify`. Its values are another program's: only numbers and names of known kinds are taken."""
    if parity is None:
        return "Not measured: `sana-export verify` was not run before the push."
    rows = []
    for kind in ("graphs", "images"):
        for row in parity.get(kind) or ():
            if not isinstance(row, Mapping):
                continue
            values = [f"{row.get('cosine', '')}"[:11], f"{row.get('psnr_db', '')}"[:6], str(row.get("limit", ""))]
            rows.append((str(row.get("name", "")), *values, "yes" if row.get("passed") else "**no**"))
    verdict = "passed" if parity.get("passed") else "**did not pass**"
    where = f"{parity.get('backend', 'an unknown backend')} on {parity.get('device', 'an unknown device')}"
    lines = f"Compared with diffusers in fp32 by `sana-export verify`, on {where}: {verdict}."
    return lines + "\n\n" + _table(("Graph or prompt", "Cosine", "PSNR, dB", "Limit", "Passed"), rows)


def _license(base: str | None, row: Variant | None) -> str:
    if base is None and row is not None:
        return row.license + "."
    if base is None:
        return (
            "This bundle contains weights of the checkpoint that it was made from, whose license applies to them. The text encoder "
            f"of Sana is Gemma 2, to which [Google's Gemma terms]({_GEMMA_TERMS}) apply."
        )
    return (
        f"This bundle contains the weights of [{base}](https://huggingface.co/{base}) in another format. The license that its card "
        "names applies to them; read it there. The text encoder is that of the checkpoint; for Gemma, "
        f"[Google's Gemma terms]({_GEMMA_TERMS}) apply. The code of sana_export is under Apache-2.0."
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in lines)


def _cell(text: str) -> str:
    """`text` on one line, without what would end the cell or begin a tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
