"""What a checkpoint must satisfy to be exported. All of it is checked when the checkpoint is opened, and reported together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sana_export.checkpoint.components import COMPONENTS, REQUIRED, check_weights
from sana_export.checkpoint.configs import CONFIGURED, Part, config_name, read_part
from sana_export.checkpoint.controlnet import ControlNetFiles
from sana_export.checkpoint.controlnet import fit_problems as controlnet_problems
from sana_export.checkpoint.foreign_weights import BEFORE_QUANTIZED
from sana_export.checkpoint.hub import read_json
from sana_export.checkpoint.tokenizer import check_tokenizer
from sana_export.checkpoint.vae import fit_problems
from sana_export.commands import resave_command
from sana_export.errors import ArtifactError
from sana_export.hub.client import LIST_VARIANTS
from sana_export.supported import SCHEDULERS, unsupported, unsupported_encoder
from sana_export.variants import INDEX

if TYPE_CHECKING:
    from sana_export.checkpoint.checkpoint import SanaCheckpoint

SPRINT, SPRINT_SCHEDULER = "SanaSprintPipeline", "SCMScheduler"
CONTROLLED = "SanaControlNetPipeline"
#: The pipelines of SANA-Sprint.
SPRINTS = (SPRINT, "SanaSprintImg2ImgPipeline")
PIPELINES = ("SanaPipeline", "SanaPAGPipeline", CONTROLLED, *SPRINTS)
#: The key of a config that says how the weights are quantized.
QUANTIZATION = "quantization_config"
ANOTHER = "use a checkpoint with the architecture of a published Sana model (sana-export variants lists them)"
#: What to do about an unsupported part, if it is not `ANOTHER`.
FIXES = {
    "vae": "use another autoencoder: --vae dc-ae or --vae dc-ae-lite",
    "controlnet": "use another ControlNet: --controlnet controlnet-hed-1600m or --controlnet controlnet-hed-600m",
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
    raise ArtifactError(
        f"{source} is not a Sana text-to-image checkpoint",
        found=f"{INDEX} names {name}",
        wanted=" or ".join(PIPELINES),
        fix=LIST_VARIANTS,
    )


def check_configs(
    index: Mapping[str, Any], read: Callable[[str], Mapping[str, Any]], source: str, names: Iterable[str] = CONFIGURED
) -> None:
    """Raise ArtifactError unless an export supports the configs of `names`. `read` reads a JSON file of the checkpoint."""
    check_index(index, source)
    refuse(source, (problem for _, problem in config_problems(index, read, source, {}, names)))


def check_checkpoint(checkpoint: SanaCheckpoint) -> None:
    """Raise ArtifactError unless an export supports all of the checkpoint: configs, weights and tokenizer."""
    check_index(checkpoint.index, checkpoint.source)
    refuse(checkpoint.source, _problems(checkpoint))


def check_encoder(checkpoint: SanaCheckpoint) -> None:
    """Raise ArtifactError unless an export supports the autoencoder's encoder, which only image-to-image needs."""
    given = checkpoint.read(config_name("vae"))
    part, owner = read_part("vae", given), checkpoint.source if checkpoint.vae is None else checkpoint.vae.source
    problems = [_unsupported("vae", one.key, one.found, one.wanted) for one in unsupported_encoder(part.config, given)]
    refuse(owner, problems or check_weights("vae", part.optional_shapes, checkpoint.base_weights("vae"), owner))


def refuse(source: str, problems: Iterable[ArtifactError]) -> None:
    """Raise the only problem, or one error that lists all of them. Do nothing if there are none."""
    found = list(problems)
    if len(found) == 1:
        raise found[0]
    if found:
        fixes: dict[str, list[str]] = {}
        for number, problem in enumerate(found, 1):
            fixes.setdefault(problem.fix or ANOTHER, []).append(str(number))
        raise ArtifactError(
            f"{source} cannot be exported, for {len(found)} reasons",
            found=_lines(
                f"{number}. {problem.message}: found {problem.found}, wanted {problem.wanted}"
                for number, problem in enumerate(found, 1)
            ),
            wanted="a checkpoint without these",
            fix=_lines(f"for {', '.join(numbers)}: {fix}" for fix, numbers in fixes.items()),
        )


def _lines(lines: Iterable[str]) -> str:
    """Lines that stand below each other in an error."""
    return "\n          ".join(" ".join(line.split()) for line in lines)


def _problems(checkpoint: SanaCheckpoint) -> Iterator[ArtifactError]:
    source, parts = checkpoint.source, dict[str, Part]()
    doubtful = set()
    replaced = () if checkpoint.vae is None else ("vae",)
    for name, problem in config_problems(checkpoint.index, checkpoint.read, source, parts, replaced=replaced):
        doubtful.add(name)
        yield problem
    if checkpoint.vae is not None and {"transformer", "vae"} <= parts.keys() - doubtful:
        yield from fit_problems(checkpoint.vae, parts["vae"].config, parts["transformer"].config, _replaced_vae(checkpoint), source)
    if checkpoint.controlnet is not None and "transformer" in parts and "transformer" not in doubtful:
        yield from _controlnet_problems(checkpoint, checkpoint.controlnet, parts["transformer"])
    owners = {"transformer": checkpoint.transformer_file, "vae": checkpoint.vae and checkpoint.vae.source}
    for name in REQUIRED:
        owner = str(owners.get(name) or source)
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


def _controlnet_problems(checkpoint: SanaCheckpoint, controlnet: ControlNetFiles, transformer: Part) -> Iterator[ArtifactError]:
    try:
        weights = controlnet.weights()
        part = read_part("controlnet", controlnet.config(transformer.config))
    except ArtifactError as error:
        yield error
        return
    problems = [
        _unsupported("controlnet", setting.key, setting.found, setting.wanted)
        for setting in unsupported(part.class_name, part.config, part.given)
    ]
    problems += controlnet_problems(controlnet, part.config, transformer.config, checkpoint.source)
    yield from problems
    if not problems:
        yield from check_weights("controlnet", part.shapes, weights, controlnet.source)


def _replaced_vae(checkpoint: SanaCheckpoint) -> Mapping[str, Any] | None:
    """The complete config of the checkpoint's own autoencoder. None if it has none, or one that nobody can read or needs."""
    try:
        return read_part("vae", read_json(checkpoint.folder / config_name("vae"))).config
    except ArtifactError:
        return None


def config_problems(
    index: Mapping[str, Any],
    read: Callable[[str], Mapping[str, Any]],
    source: str,
    parts: dict[str, Part],
    names: Iterable[str] = CONFIGURED,
    *,
    replaced: Collection[str] = (),
) -> Iterator[tuple[str, ArtifactError]]:
    """Everything in model_index.json and the configs of `names` that an export does not support, with the part that it belongs to.

    `parts` gets the parts that could be read. Those that are `replaced` are not the checkpoint's own.
    """
    for name in names:
        try:
            class_name = None if name in replaced else class_of(index, name, source, read)
            parts[name] = read_part(name, read(config_name(name)), class_name)
        except ArtifactError as error:
            yield name, error
    for name, part in parts.items():
        for setting in unsupported(part.class_name, part.config, part.given):
            yield name, _unsupported(name, setting.key, setting.found, setting.wanted)
    yield from _foreign(parts)
    for fit in FITS:
        if fit.part in parts and fit.owner in parts and fit.part not in replaced:
            found, allowed = parts[fit.part].config[fit.key], fit.allowed(parts[fit.owner].config)
            if found not in allowed:
                yield fit.part, _unsupported(fit.part, fit.key, repr(found), f"{allowed[0]} ({fit.meaning})")
    pipeline = index["_class_name"]
    if "transformer" in parts and bool(found := parts["transformer"].config["guidance_embeds"]) != (pipeline in SPRINTS):
        wanted = f"{pipeline in SPRINTS}, because {INDEX} names {pipeline}"
        yield "transformer", _unsupported("transformer", "guidance_embeds", found, wanted)


def class_of(index: Mapping[str, Any], part: str, source: str, read: Callable[[str], Mapping[str, Any]]) -> str:
    """The class of a part. As in diffusers, model_index.json decides. Raises ArtifactError for an unsupported class."""
    sprint = index.get("_class_name") in SPRINTS
    if part == "scheduler":
        library, classes = "diffusers", tuple(name for name in SCHEDULERS if (name == SPRINT_SCHEDULER) == sprint)
    else:
        library, classes = COMPONENTS[part].library, COMPONENTS[part].classes
    entry = index.get(part)
    named = entry[1] if isinstance(entry, list) and len(entry) == 2 and entry[0] == library else entry
    if named in classes and named != entry:
        return str(named)
    raise ArtifactError(
        f"{source} has no {part}" if entry in (None, [None, None]) else f"{source} has an unsupported {part}",
        found=f"{INDEX} names {'none' if entry in (None, [None, None]) else named}",
        wanted=" or ".join(classes),
        fix=_scheduler_fix(source, read, sprint=sprint) if part == "scheduler" else FIXES.get(part, ANOTHER),
    )


def _scheduler_fix(source: str, read: Callable[[str], Mapping[str, Any]], *, sprint: bool) -> str:
    """The command that gives a checkpoint the scheduler of the published ones."""
    try:
        shift = read(config_name("scheduler")).get("flow_shift")
    except ArtifactError:
        shift = None
    settings = f'flow_shift={shift or 3.0}, use_flow_sigmas=True, prediction_type="flow_prediction"'
    scheduler = f"{SPRINT_SCHEDULER}()" if sprint else f"DPMSolverMultistepScheduler({settings})"
    change = f"pipeline.scheduler = diffusers.{scheduler}"
    return f"{resave_command(source, 'DiffusionPipeline', '-fixed', change)}  (then export that folder)"


def _unsupported(name: str, key: str, found: object, wanted: object) -> ArtifactError:
    """The error for the entry `key` of a part's config."""
    scheduler = f"set {key} to a supported value in {config_name(name)}, if the checkpoint was trained with it"
    fix = scheduler if name == "scheduler" else FIXES.get(name, ANOTHER)
    fix = BEFORE_QUANTIZED if key == QUANTIZATION else fix
    return ArtifactError(f"{config_name(name)} has an unsupported {key}", found=found, wanted=wanted, fix=fix)


def _foreign(parts: Mapping[str, Part]) -> Iterator[tuple[str, ArtifactError]]:
    """Keys that make a config another model's, although its class would ignore them."""
    text = parts.get("text_encoder")
    if text is not None and text.given.get("model_type", "gemma2") != "gemma2":
        yield "text_encoder", _unsupported("text_encoder", "model_type", repr(text.given["model_type"]), "gemma2")
    for name, part in parts.items():
        if (method := part.given.get(QUANTIZATION)) is not None:
            kind = method.get("quant_method") if isinstance(method, Mapping) else method
            yield name, _unsupported(name, QUANTIZATION, kind, "weights that are not quantized")
