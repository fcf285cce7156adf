"""What a checkpoint must satisfy to be exported. All of it is checked when the checkpoint is opened, and reported together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sana_export.checkpoint.components import COMPONENTS, check_weights
from sana_export.checkpoint.configs import CONFIGURED, Part, config_name, read_part
from sana_export.checkpoint.tokenizer import check_tokenizer
from sana_export.commands import resave_command
from sana_export.errors import ArtifactError, SanaExportError
from sana_export.supported import SCHEDULERS, unsupported
from sana_export.variants import INDEX

if TYPE_CHECKING:
    from sana_export.checkpoint.checkpoint import SanaCheckpoint

SPRINT, SPRINT_SCHEDULER = "SanaSprintPipeline", "SCMScheduler"
PIPELINES = ("SanaPipeline", "SanaPAGPipeline", SPRINT)
#: Other pipelines of diffusers whose folders a text-to-image pipeline can load.
TEXT_TO_IMAGE = {
    "SanaControlNetPipeline": "SanaPipeline",
    "SanaSprintImg2ImgPipeline": SPRINT,
}
LIST_VARIANTS = "sana-export variants  (lists the published checkpoints)"
ANOTHER = "use a checkpoint with the architecture of a published Sana model (sana-export variants lists them)"
#: The library and the classes that model_index.json may name for each part.
CLASSES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    **{name: (component.library, component.classes) for name, component in COMPONENTS.items()},
    "scheduler": ("diffusers", SCHEDULERS),
}


@dataclass(frozen=True)
class Fit:
    """A key of one part's config that another part, or another key, decides."""

    #: The part.
    part: str
    #: The key.
    key: str
    #: The part that decides.
    owner: str
    #: The values that the key may have, from the owner's config.
    allowed: Callable[[Mapping[str, Any]], tuple[object, ...]]
    #: What the values are, for an error.
    meaning: str


FITS = (
    Fit("transformer", "out_channels", "transformer", lambda own: (own["in_channels"], None), "in_channels"),
    Fit(
        "transformer",
        "cross_attention_dim",
        "transformer",
        lambda own: (own["num_attention_heads"] * own["attention_head_dim"],),
        "num_attention_heads * attention_head_dim",
    ),
    Fit("transformer", "caption_channels", "text_encoder", lambda text: (text["hidden_size"],), "hidden_size of the text encoder"),
    Fit("vae", "latent_channels", "transformer", lambda owner: (owner["in_channels"],), "in_channels of the transformer"),
)


def check_index(index: Mapping[str, Any], source: str) -> None:
    """Raise ArtifactError unless model_index.json describes a Sana text-to-image pipeline."""
    name = index.get("_class_name")
    if name in PIPELINES:
        return
    fix = LIST_VARIANTS
    if isinstance(name, str) and (loads := TEXT_TO_IMAGE.get(name)):
        fix = f"{resave_command(source, loads, '-text-to-image')}  (then export that folder)"
    raise ArtifactError(
        f"{source} is not a Sana text-to-image checkpoint",
        found=f"{INDEX} names {name}",
        wanted=" or ".join(PIPELINES),
        fix=fix,
    )


def check_configs(index: Mapping[str, Any], read: Callable[[str], Mapping[str, Any]], source: str) -> None:
    """Raise ArtifactError unless an export supports all of a checkpoint's configs. `read` reads a JSON file of the checkpoint."""
    check_index(index, source)
    refuse(source, (problem for _, problem in config_problems(index, read, source, {})))


def check_checkpoint(checkpoint: SanaCheckpoint) -> None:
    """Raise ArtifactError unless an export supports all of the checkpoint: configs, weights and tokenizer."""
    check_index(checkpoint.index, checkpoint.source)
    refuse(checkpoint.source, _problems(checkpoint))


def refuse(source: str, problems: Iterable[ArtifactError]) -> None:
    """Raise the only problem, or one error that lists all of them. Do nothing if there are none."""
    found = list(problems)
    if len(found) == 1:
        raise found[0]
    if found:
        fixes = dict.fromkeys(problem.fix for problem in found if problem.fix)
        raise ArtifactError(
            f"{source} cannot be exported, for {len(found)} reasons",
            found=_listed(f"{problem.message}: found {problem.found}, wanted {problem.wanted}" for problem in found),
            wanted="a checkpoint without these",
            fix=_listed(fixes) if len(fixes) > 1 else next(iter(fixes), None),
        )


def _listed(lines: Iterable[str]) -> str:
    return "\n          ".join(f"{number}. {' '.join(line.split())}" for number, line in enumerate(lines, 1))


def _problems(checkpoint: SanaCheckpoint) -> Iterator[ArtifactError]:
    source, parts = checkpoint.source, dict[str, Part]()
    doubtful = set()
    for name, problem in config_problems(checkpoint.index, checkpoint.read, source, parts):
        doubtful.add(name)
        yield problem
    for name in COMPONENTS:
        owner = str(checkpoint.transformer_file or source) if name == "transformer" else source
        try:
            weights = checkpoint.base_weights(name)
        except ArtifactError as error:
            yield error
            continue
        if name in parts and name not in doubtful:  # the shapes follow from the config
            yield from check_weights(name, parts[name].shapes, weights, owner)
    try:
        check_tokenizer(checkpoint, parts["text_encoder"].config["vocab_size"] if "text_encoder" in parts else None)
    except ArtifactError as error:
        yield error


def config_problems(
    index: Mapping[str, Any], read: Callable[[str], Mapping[str, Any]], source: str, parts: dict[str, Part]
) -> Iterator[tuple[str, ArtifactError]]:
    """Everything in model_index.json and the configs that an export does not support, with the part that it belongs to.

    `parts` gets the parts that could be read.
    """
    for name in CONFIGURED:
        try:
            parts[name] = read_part(name, read(config_name(name)), class_of(index, name, source, read))
        except ArtifactError as error:
            yield name, error
    for name, part in parts.items():
        for setting in unsupported(part.class_name, part.config, part.given):
            yield name, _unsupported(name, setting.key, setting.found, setting.wanted)
    yield from _foreign(parts)
    for fit in FITS:
        if fit.part in parts and fit.owner in parts:
            found, allowed = parts[fit.part].config[fit.key], fit.allowed(parts[fit.owner].config)
            if found not in allowed:
                yield fit.part, _unsupported(fit.part, fit.key, repr(found), f"{allowed[0]} ({fit.meaning})")
    yield from _pipeline_problems(str(index["_class_name"]), parts)


def class_of(index: Mapping[str, Any], part: str, source: str, read: Callable[[str], Mapping[str, Any]]) -> str:
    """The class of a part. As in diffusers, model_index.json decides. Raises ArtifactError for an unsupported class."""
    library, classes = CLASSES[part]
    found = index.get(part)
    if isinstance(found, list) and len(found) == 2 and found[0] == library and found[1] in classes:
        return str(found[1])
    empty = found is None or found == [None, None]
    named = found[1] if isinstance(found, list) and len(found) == 2 and found[0] == library else found
    raise ArtifactError(
        f"{source} has no {part}" if empty else f"{source} has an unsupported {part}",
        found=f"{INDEX} names {'none' if empty else named}",
        wanted=" or ".join(classes),
        fix=_scheduler_fix(source, read) if part == "scheduler" else ANOTHER,
    )


def _scheduler_fix(source: str, read: Callable[[str], Mapping[str, Any]]) -> str:
    """How to give a checkpoint the scheduler of the published ones."""
    try:
        shift = read(config_name("scheduler")).get("flow_shift")
    except SanaExportError:
        shift = None
    settings = f"flow_shift={shift or 3.0}, use_flow_sigmas=True, prediction_type='flow_prediction'"
    change = f"pipeline.scheduler = diffusers.DPMSolverMultistepScheduler({settings})"
    return f"{resave_command(source, 'DiffusionPipeline', '-dpm', change)}  (then export that folder)"


def _unsupported(name: str, key: str, found: object, wanted: object) -> ArtifactError:
    """The error for the entry `key` of a part's config."""
    fix = f"change {key} in {config_name(name)}, if the checkpoint was trained for that" if name == "scheduler" else ANOTHER
    return ArtifactError(f"{config_name(name)} has an unsupported {key}", found=found, wanted=wanted, fix=fix)


def _foreign(parts: Mapping[str, Part]) -> Iterator[tuple[str, ArtifactError]]:
    """Keys that make a config another model's, although its class would ignore them."""
    text = parts.get("text_encoder")
    if text is not None and text.given.get("model_type", "gemma2") != "gemma2":
        yield "text_encoder", _unsupported("text_encoder", "model_type", repr(text.given["model_type"]), "gemma2")
    for name, part in parts.items():
        if (method := part.given.get("quantization_config")) is not None:
            kind = method.get("quant_method") if isinstance(method, Mapping) else method
            yield name, _unsupported(name, "quantization_config", kind, "weights that are not quantized")


def _pipeline_problems(pipeline: str, parts: Mapping[str, Part]) -> Iterator[tuple[str, ArtifactError]]:
    """What does not fit the class of the pipeline. Only SANA-Sprint has a guidance embedding and samples with SCMScheduler."""
    sprint = pipeline == SPRINT
    if "transformer" in parts and bool(found := parts["transformer"].config["guidance_embeds"]) != sprint:
        yield "transformer", _unsupported("transformer", "guidance_embeds", found, f"{sprint}, because {INDEX} names {pipeline}")
    if "scheduler" in parts and (parts["scheduler"].class_name == SPRINT_SCHEDULER) != sprint:
        wanted = [name for name in SCHEDULERS if (name == SPRINT_SCHEDULER) == sprint]
        error = ArtifactError(
            f"{INDEX} names a scheduler that {pipeline} cannot sample with",
            found=parts["scheduler"].class_name,
            wanted=" or ".join(wanted),
            fix=f"name the pipeline and the scheduler that the checkpoint was trained for in {INDEX}",
        )
        yield "scheduler", error
