"""`sana-export generate`: generates images from a bundle, without PyTorch."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_export.cli.images import check_output, named_output, output_type, write_images
from sana_export.cli.schedulers import add_scheduler, scheduler_settings
from sana_export.cli.terminal.console import Console
from sana_export.cli.terminal.text import seconds, table
from sana_export.cli.verb import (
    Answer,
    Verb,
    add_bundle_to_read,
    add_device,
    add_hub_options,
    add_intervals,
    add_size,
    bundle_to_read,
    given_intervals,
    path_named,
    positive,
    whole,
)
from sana_export.errors import UsageError
from sana_export.image_files import FORMATS, SUFFIXES
from sana_export.numeric import MAX_IMAGES
from sana_export.runtime.backends import BACKENDS
from sana_export.runtime.memory import AUTO

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from sana_export.adapters import Lora
    from sana_export.runtime import Request, SanaRuntime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle_to_read(parser)
    prompts = parser.add_argument("prompts", metavar="PROMPT", nargs="+", default=[], help="what to draw; one or more prompts")
    prompts.required = False  # with nargs="*", argparse takes no prompt that stands after an option
    parser.add_argument(
        "--prompts-file",
        metavar="FILE",
        type=path_named("--prompts-file"),
        help="draw a file instead: .txt with one prompt a line, or .jsonl with one object a line (prompt, seed, ...); after "
        "an interruption, the same command draws what is missing",
    )
    parser.add_argument(
        "--from-image",
        metavar="FILE",
        type=path_named("--from-image"),
        help="draw an image again that this command drew, with the parameters in its file; other options replace them",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT.png",
        type=path_named("--output"),
        required=True,
        help="the image file (.png, .jpg, .webp, .npy); several images are named OUT-0.png, OUT-1.png, ...; with --prompts-file "
        "the folder, whose images are named after their lines: 000001.png, ...",
    )
    parser.add_argument(
        "--output-format", choices=FORMATS, help="format of the image files (default: by the suffix; for a folder png)"
    )
    parser.add_argument(
        "--quality",
        type=whole(1, 100),
        metavar="N",
        help="quality of jpg and webp files, 1 to 100 (default: 95 for jpg; webp is lossless)",
    )
    parser.add_argument("--no-metadata", action="store_true", help="write no parameters into the image files")
    parser.add_argument(
        "--batch",
        type=whole(1, MAX_IMAGES),
        metavar="N",
        help="with --prompts-file: images that are sampled at a time (default: 1)",
    )
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what not to draw")
    parser.add_argument(
        "--image", metavar="IN.png", help="an image to start from; the bundle needs the graphs of the group img2img"
    )
    parser.add_argument(
        "--strength", type=float, metavar="S", help="with --image: how much is drawn anew, above 0, up to 1 (default: 0.6)"
    )
    parser.add_argument(
        "--mask", metavar="MASK.png", help="with --image: an image that is white where it is drawn anew and black where it stays"
    )
    parser.add_argument(
        "--control-image",
        metavar="IMAGE.png",
        help="an image that the bundle's ControlNet follows, for HED its edges in white on black",
    )
    parser.add_argument(
        "--control-scale", type=float, metavar="S", help="with --control-image: how closely it is followed (default: 1)"
    )
    parser.add_argument("--steps", type=positive, metavar="N", help="sampling steps (default: the checkpoint's)")
    add_scheduler(parser)
    parser.add_argument("--guidance-scale", type=float, metavar="G", help="1 turns guidance off (default: the checkpoint's)")
    parser.add_argument("--pag-scale", type=float, metavar="P", help="perturbed attention guidance (default: 0, off)")
    add_intervals(parser, "")
    add_size(parser, "the image (default: the checkpoint's native size)")
    parser.add_argument(
        "--no-resolution-binning",
        action="store_const",
        const=False,
        dest="use_resolution_binning",
        help="sample at exactly this size (a multiple of 32) instead of the nearest size that the checkpoint was trained on",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same image (default: random)")
    parser.add_argument("--images-per-prompt", type=positive, metavar="N", help="images for each prompt (default: 1)")
    parser.add_argument(
        "--decoder-tile",
        type=int,
        metavar="PIXELS",
        help="decode in tiles of this size: same image, less memory; 0 turns tiles off (default: 1024 above 2048x2048 pixels)",
    )
    parser.add_argument(
        "--lora",
        metavar="PATH[:SCALE]",
        action="append",
        default=[],
        help="a LoRA, added to the bundle's weights; SCALE: 0.7, or with other scales for some layers: 0.7,attn2=0.5; can be given "
        "several times",
    )
    parser.add_argument(
        "--backend", metavar="B", default=AUTO, help=f"auto, {', '.join(BACKENDS)} (default: auto, the best one that runs here)"
    )
    add_device(parser)
    parser.add_argument(
        "--memory",
        metavar="MODE",
        default=AUTO,
        help="resident: all graphs stay loaded; staged: text encoder, denoiser and decoder are loaded in turn; streaming: weights "
        "stay in host memory (default: auto, the first that fits)",
    )
    add_hub_options(parser)


#: The words of a request by the options that set them.
WORDS = {
    "negative_prompt": "negative_prompt",
    "image": "image",
    "strength": "strength",
    "mask": "mask",
    "control_image": "control_image",
    "control_scale": "controlnet_conditioning_scale",
    "steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "pag_scale": "pag_scale",
    "height": "height",
    "width": "width",
    "images_per_prompt": "num_images_per_prompt",
    "seed": "seed",
    "use_resolution_binning": "use_resolution_binning",
    "decoder_tile": "decoder_tile",
}


def run(options: argparse.Namespace, console: Console) -> Answer:
    _check_sources(options)
    from sana_export.adapters import parse_lora
    from sana_export.runtime import SanaRuntime

    loras = [parse_lora(text) for text in options.lora]
    chosen = {word: getattr(options, option) for option, word in WORDS.items()} | scheduler_settings(options)
    given = {word: value for word, value in chosen.items() if value is not None} | given_intervals(options)

    @cache
    def bundle() -> Path:
        return bundle_to_read(options, backend=options.backend)

    @contextlib.contextmanager
    def load() -> Iterator[SanaRuntime]:
        with SanaRuntime.from_pretrained(
            bundle(), backend=options.backend, memory=options.memory, device=options.device, threads=options.threads
        ) as runtime:
            for lora in loras:
                runtime.load_lora(lora.path, lora.scales)
            yield runtime

    if options.prompts_file is not None:
        return _run_file(options, bundle, given, loras, load, console)
    return _run_request(options, bundle, given, loras, load, console)


def _check_sources(options: argparse.Namespace) -> None:
    """Raise UsageError unless the options name one thing to draw."""
    words = ["sana-export", "generate", str(options.bundle)]
    if not (options.prompts or options.prompts_file or options.from_image):
        fix = shlex.join([*words, "a red apple", "-o", str(options.output)])
        raise UsageError("there is nothing to draw", found="no prompt", wanted="a prompt, --prompts-file or --from-image", fix=fix)
    if options.prompts_file is None:
        if options.batch is not None:
            fix = shlex.join([*words, "--prompts-file", "prompts.txt", "-o", "images", "--batch", str(options.batch)])
            raise UsageError("--batch is for --prompts-file", found="no --prompts-file", wanted="both or neither", fix=fix)
        return
    others = [name for name, value in (("PROMPT", options.prompts), ("--from-image", options.from_image)) if value]
    if others:
        fix = shlex.join([*words, "--prompts-file", str(options.prompts_file), "-o", str(options.output)])
        raise UsageError("--prompts-file has the prompts", found=f"{' and '.join(others)} too", wanted="one of them", fix=fix)


def _run_file(
    options: argparse.Namespace,
    bundle: Callable[[], Path],
    given: dict[str, Any],
    loras: Sequence[Lora],
    load: Callable[[], AbstractContextManager[SanaRuntime]],
    console: Console,
) -> Answer:
    from sana_export.cli.many import FileRun, draw_file

    file_run = FileRun(
        bundle=bundle(),
        prompts_file=options.prompts_file,
        folder=options.output,
        seed=given.pop("seed", None),
        defaults=given,
        loras=loras,
        format=options.output_format or "png",
        quality=options.quality,
        metadata=not options.no_metadata,
        batch=options.batch or 1,
    )
    file_run.check()
    return draw_file(file_run, load, console)


def _run_request(
    options: argparse.Namespace,
    bundle: Callable[[], Path],
    given: dict[str, Any],
    loras: Sequence[Lora],
    load: Callable[[], AbstractContextManager[SanaRuntime]],
    console: Console,
) -> Answer:
    from sana_export.cli.drawn_again import draw_again, warn_about_others
    from sana_export.runtime import Request

    output = named_output(options.output, options.output_format, options.quality)
    settings, index, again = given, None, None
    if options.from_image is not None:
        if options.prompts:
            given = {**given, "prompt": options.prompts}
        again = draw_again(options.from_image, given, bundle(), output, loras)
        settings, index = dict(again.words), again.index
    prompts = settings.pop("prompt", options.prompts)
    prompts = [prompts] if isinstance(prompts, str) else prompts
    # Checks the values before anything is loaded, and reads the images once.
    request = Request(prompt=prompts, output_type=output_type(SUFFIXES.get(output.suffix.lower(), "png")), **settings)
    check_output(output, len(prompts) * request.num_images_per_prompt if index is None else 1)
    if again is not None:
        warn_about_others(options.from_image, again.given, request)
    with load() as runtime:
        return sample(
            runtime,
            request,
            output,
            console,
            index=index,
            quality=options.quality,
            metadata=not options.no_metadata,
        )


def sample(
    runtime: SanaRuntime,
    request: Request,
    output: Path,
    console: Console,
    *,
    index: int | None = None,
    quality: int | None = None,
    metadata: bool = True,
) -> Answer:
    """Generate the images of a request, whose prompts are a list, and write them.

    index: the number of the only image to write. None: all. quality, metadata: of the files (`save_image`).
    """
    plan, prompts = runtime.plan(request), list(request.prompt or ())
    steps = len(plan.schedule.timesteps)
    log.info("sampling %d steps on %s", steps, runtime.backend.name)

    def on_step(_runtime: object, index: int, _timestep: float, _tensors: object) -> None:
        console.step("denoise", index + 1, steps)

    # A callback costs a copy of the latents in every step.
    callback = on_step if console.live else None
    if console.live:
        console.step("denoise", 0, steps)
    result = runtime.draw(request, plan, callback_on_step_end=callback)
    kept = slice(None) if index is None else slice(index, index + 1)
    paths = write_images(result.images[kept], output, result.metadata[kept] if metadata else None, quality)
    repeats, first = len(result.images) // len(prompts), index or 0
    document = {
        "images": [{"path": str(path), "prompt": prompts[number // repeats]} for number, path in enumerate(paths, first)],
        "seeds": list(result.seeds),
        "height": result.height,
        "width": result.width,
        "steps": steps,
        "scheduler": dict(result.scheduler),
        "guidance_interval": list(result.guidance_interval),
        "pag_interval": list(result.pag_interval),
        "backend": runtime.backend.name,
        "device": runtime.backend.device,
        "memory": runtime.memory,
        "loras": [lora.as_json() for lora in runtime.loras],
        "seconds": dataclasses.asdict(result.timings),
    }
    timings = result.timings
    times = table(
        [
            ("text encoder", seconds(timings.text_encoder)),
            ("context", seconds(timings.context)),
            ("denoise", f"{seconds(timings.denoise_loop)}, {steps} steps"),
            *([("vae encoder", seconds(timings.vae_encoder))] if timings.vae_encoder else []),
            ("vae decoder", seconds(timings.vae_decoder)),
            ("total", seconds(timings.total)),
        ],
        indent="  ",
    )
    size = f"{result.height}x{result.width} px, seed {', '.join(map(str, result.seeds))}, {runtime.backend.name}"
    return Answer(document, "\n".join([*(str(path) for path in paths), f"  {size}", times]))


VERB = Verb(
    name="generate",
    summary="generate images from a bundle, without PyTorch",
    description="Generates images from a bundle. A seed gives the same image as diffusers with a generator on the CPU.",
    example='sana-export generate bundle "A cute 🐼 eating 🎋, ink drawing style" -o panda.png --steps 20 --seed 42\n'
    "  sana-export generate bundle --prompts-file prompts.txt -o images --seed 42\n"
    "  sana-export generate bundle --from-image panda.png -o larger.png --height 2048 --width 2048",
    add_arguments=add_arguments,
    run=run,
)
