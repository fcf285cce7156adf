"""`sana-export engines`: runs a recipe from checkpoint to engines, parity, image and latency. Skips what is up to date."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sana_export.cli.bundle_text import bundle_document, bundle_summary
from sana_export.cli.images import check_output
from sana_export.cli.packages import require
from sana_export.cli.recipe import BuildSection, Recipe, load_recipe
from sana_export.cli.stage_cache import StageCache, stage_key
from sana_export.cli.terminal.console import VERBOSE, Console
from sana_export.cli.terminal.text import plural, seconds, table
from sana_export.cli.verb import Answer, Verb, add_hub_options, model_options, path_named
from sana_export.cli.verbs.bench import measure
from sana_export.cli.verbs.build import build_engines, choose_profile
from sana_export.cli.verbs.export import export_model
from sana_export.cli.verbs.generate import sample
from sana_export.cli.verbs.verify import compare
from sana_export.errors import ArtifactError
from sana_export.manifest import EngineEntry, Manifest
from sana_export.trt.compatibility import detect_host, incompatibilities

T = TypeVar("T")


@dataclass(frozen=True)
class Stage:
    """One finished stage."""

    #: Name in the report.
    name: str
    #: Its result.
    answer: Answer
    #: Duration in this run.
    seconds: float
    #: Time of the earlier run that the answer comes from, "" if there was nothing to do, None if the stage ran now.
    since: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", metavar="RECIPE.toml", type=path_named("RECIPE.toml"), help="the recipe, for example engines/tiny.toml"
    )
    add_hub_options(parser)


def run(options: argparse.Namespace, console: Console) -> Answer:
    recipe = load_recipe(options.recipe)
    require("", "export")
    if recipe.sample is not None:
        check_output(recipe.sample.output, recipe.sample.images)
    stage_cache, stages = StageCache(recipe.output), []
    for name, do in _plan(recipe, model_options(recipe, options), stage_cache, console):
        started = time.monotonic()
        console.prefix = f"{name} "
        answer, since = do()
        console.prefix = ""
        stage = Stage(name, answer, time.monotonic() - started, since)
        stages.append(stage)
        if console.level <= VERBOSE:
            console.line(f"{name}: {_time(stage)}")
    return _report(recipe, stages)


#: A stage's work. Returns its answer and `Stage.since`.
Work = Callable[[], tuple[Answer, str | None]]


def _plan(recipe: Recipe, opening: Mapping[str, Any], stage_cache: StageCache, console: Console) -> list[tuple[str, Work]]:
    """The stages of `recipe` by name, in order. `opening` are the arguments of `open_checkpoint` (`model_options`)."""
    stages: list[tuple[str, Work]] = [("export", lambda: _export(recipe, opening, console))]
    for build in recipe.build:
        name = f"build {build.backend} {', '.join(build.compute_capabilities) or 'portable'}"
        stages.append((name, lambda build=build: _build(recipe, build, console)))  # type: ignore[misc]
    work = {"verify": partial(_verify, opening), "sample": _sample, "bench": partial(_bench, opening)}
    for name, do in work.items():
        if getattr(recipe, name) is not None:
            stages.append((name, lambda name=name, do=do: _once(name, do, recipe, stage_cache, console)))  # type: ignore[misc]
    return stages


def _export(recipe: Recipe, opening: Mapping[str, Any], console: Console) -> tuple[Answer, str | None]:
    try:
        before = Manifest.load(recipe.output).export_key
    except ArtifactError:
        before = None
    manifest = export_model(
        recipe.model,
        recipe.output,
        console,
        opening,
        precision=recipe.precision,
        pag_layers=recipe.pag_layers,
        clamp=recipe.clamp,
        graphs=recipe.graphs,
        quantize=recipe.quantize,
        quantize_method=recipe.quantize_method,
        calibration=recipe.calibration,
    )
    answer = Answer(bundle_document(recipe.output, manifest), plural(len(manifest.graphs), "graph"))
    return answer, "" if manifest.export_key == before else None


def _build(recipe: Recipe, build: BuildSection, console: Console) -> tuple[Answer, str | None]:
    before = Manifest.load(recipe.output)
    manifest = build_engines(
        recipe.output,
        console,
        backend=build.backend,
        profile=choose_profile(before, build.profile, build.height, build.width, build.batch),
        compute_capabilities=build.compute_capabilities,
        graphs=build.graphs,
        options=build.options,
    )
    built = [engine for engine in manifest.engines if engine not in before.engines]
    answer = Answer({"engines": [dataclasses.asdict(engine) for engine in built]}, plural(len(built), "engine"))
    return answer, None if built else ""


def _once(
    name: str,
    do: Callable[[Recipe, Manifest, Console], tuple[Answer, tuple[Path, ...]]],
    recipe: Recipe,
    stage_cache: StageCache,
    console: Console,
) -> tuple[Answer, str | None]:
    """The recorded answer of a stage, or a new one. A new one is recorded unless it missed a limit."""
    manifest = Manifest.load(recipe.output)
    key = stage_key(manifest.export_key, dataclasses.asdict(getattr(recipe, name)))
    if (recorded := stage_cache.find(name, key)) is not None:
        return recorded
    answer, files = do(recipe, manifest, console)
    if answer.exit_code == 0:
        stage_cache.record(name, key, answer, files)
    return answer, None


def _verify(opening: Mapping[str, Any], recipe: Recipe, manifest: Manifest, console: Console) -> tuple[Answer, tuple[Path, ...]]:
    settings = {name: value for name, value in dataclasses.asdict(_present(recipe.verify)).items() if value is not None}
    return compare(recipe.output, recipe.model, console, opening, **settings), ()


def _sample(recipe: Recipe, manifest: Manifest, console: Console) -> tuple[Answer, tuple[Path, ...]]:
    from sana_export.runtime import Request, SanaRuntime

    section = _present(recipe.sample)
    chosen: dict[str, Any] = {"backend": section.backend, "device": section.device, "threads": section.threads}
    with SanaRuntime.from_pretrained(recipe.output, **chosen) as runtime:
        kind = check_output(section.output, section.images)
        answer = sample(runtime, Request(prompt=section.prompts, output_type=kind, **section.settings), section.output, console)
    return answer, tuple(Path(image["path"]) for image in answer.document["images"])


def _bench(opening: Mapping[str, Any], recipe: Recipe, manifest: Manifest, console: Console) -> tuple[Answer, tuple[Path, ...]]:
    section = _present(recipe.bench)
    answer = measure(
        recipe.output,
        recipe.model,
        console,
        opening,
        backends=section.backends,
        workload=section.workload,
        output=section.output,
        device=section.device,
        threads=section.threads,
    )
    return answer, ()


def _present(section: T | None) -> T:
    assert section is not None  # `_plan` leaves out the stages of missing sections
    return section


def _report(recipe: Recipe, stages: list[Stage]) -> Answer:
    """The summary, with the exit code of the first stage that missed a limit."""
    manifest = Manifest.load(recipe.output)
    not_run = unusable_engines(manifest)
    document = {
        "recipe": str(recipe.path),
        "bundle": bundle_document(recipe.output, manifest),
        "stages": [
            {"name": stage.name, "seconds": stage.seconds, "up_to_date": stage.since is not None, "result": stage.answer.document}
            for stage in stages
        ],
        "not_run_here": not_run,
    }
    parts = [bundle_summary(recipe.output, manifest)]
    parts += [f"{stage.name}:\n{stage.answer.text}" for stage in stages if stage.name in ("verify", "sample", "bench")]
    if not_run:
        parts.append("cannot run on this machine:\n" + "\n".join(f"  {what}: {reason}" for reason, what in not_run.items()))
    total = sum(stage.seconds for stage in stages)
    parts.append("time:\n" + table([*((stage.name, _time(stage)) for stage in stages), ("total", seconds(total))], indent="  "))
    codes = [stage.answer.exit_code for stage in stages if stage.answer.exit_code]
    return Answer(document, "\n\n".join(parts), codes[0] if codes else 0)


def unusable_engines(manifest: Manifest) -> dict[str, str]:
    """Reason why engines cannot run on this machine to the number of those engines."""
    host = detect_host()
    reasons: dict[str, list[EngineEntry]] = {}
    for engine in manifest.engines:
        if why := incompatibilities(engine, host):
            reasons.setdefault("; ".join(why), []).append(engine)
    return {reason: f"{plural(len(engines), 'engine')} of {engines[0].backend}" for reason, engines in reasons.items()}


def _time(stage: Stage) -> str:
    if stage.since is None:
        return seconds(stage.seconds)
    return "up to date" + (f", as of {stage.since}" if stage.since else "")


VERB = Verb(
    name="engines",
    summary="run a recipe: export, build, verify, sample, bench",
    description="Runs the stages of a recipe: export, build, verify, sample and bench. Skips stages that are up to date.",
    example="sana-export engines engines/tiny.toml",
    add_arguments=add_arguments,
    run=run,
    level=VERBOSE,
)
