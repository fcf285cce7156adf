"""`sana-export generate`: generates images from a bundle, without PyTorch."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_export.cli.images import check_output, write_images
from sana_export.cli.schedulers import add_scheduler, scheduler_settings
from sana_export.cli.terminal.console import Console
from sana_export.cli.terminal.text import seconds, table
from sana_export.cli.verb import (
    Answer,
    Verb,
    add_bundle,
    add_device,
    add_intervals,
    add_size,
    given_intervals,
    path_named,
    positive,
)
from sana_export.runtime.backends import BACKENDS
from sana_export.runtime.control import CONDITIONING_SCALE
from sana_export.runtime.memory import AUTO

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from sana_export.runtime import SanaRuntime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    parser.add_argument("prompts", metavar="PROMPT", nargs="+", help="what to draw; one or more prompts")
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT.png",
        type=path_named("--output"),
        required=True,
        help="the image file (.png, .jpg, .webp, .npy); several images are named OUT-0.png, OUT-1.png, ...",
    )
    parser.add_argument("--negative-prompt", metavar="TEXT", default="", help="what not to draw")
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
    parser.add_argument("--pag-scale", type=float, metavar="P", default=0.0, help="perturbed attention guidance (default: 0, off)")
    add_intervals(parser, "")
    add_size(parser, "the image (default: the checkpoint's native size)")
    parser.add_argument(
        "--no-resolution-binning",
        action="store_true",
        help="sample at exactly this size (a multiple of 32) instead of the nearest size that the checkpoint was trained on",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same image (default: random)")
    parser.add_argument("--images-per-prompt", type=positive, metavar="N", default=1, help="images for each prompt (default: 1)")
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


def run(options: argparse.Namespace, console: Console) -> Answer:
    output = options.output
    from sana_export.adapters import parse_lora
    from sana_export.runtime import Request, SanaRuntime

    loras = [parse_lora(text) for text in options.lora]
    settings = {
        "negative_prompt": options.negative_prompt,
        "image": options.image,
        "strength": options.strength,
        "mask": options.mask,
        "control_image": options.control_image,
        "controlnet_conditioning_scale": CONDITIONING_SCALE if options.control_scale is None else options.control_scale,
        "num_inference_steps": options.steps,
        **scheduler_settings(options),
        "guidance_scale": options.guidance_scale,
        "pag_scale": options.pag_scale,
        **given_intervals(options),
        "height": options.height,
        "width": options.width,
        "num_images_per_prompt": options.images_per_prompt,
        "seed": options.seed,
        "use_resolution_binning": False if options.no_resolution_binning else None,
        "decoder_tile": options.decoder_tile,
    }
    Request(prompt=options.prompts, **settings)  # checks the values before anything is loaded
    output_type = check_output(output, len(options.prompts) * options.images_per_prompt)
    with SanaRuntime.from_pretrained(
        options.bundle, backend=options.backend, memory=options.memory, device=options.device, threads=options.threads
    ) as runtime:
        for lora in loras:
            runtime.load_lora(lora.path, lora.scales)
        return sample(runtime, options.prompts, settings, output, console, output_type=output_type)


def sample(
    runtime: SanaRuntime,
    prompts: list[str],
    settings: dict[str, Any],
    output: Path,
    console: Console,
    *,
    output_type: str = "pil",
) -> Answer:
    """Generate images of `prompts` with `settings` (parameters of `SanaRuntime.__call__`) and write them."""
    from sana_export.runtime import Request

    steps = len(runtime.plan(Request(prompt=prompts, **settings)).schedule.timesteps)
    log.info("sampling %d steps on %s", steps, runtime.backend.name)

    def on_step(_runtime: object, index: int, _timestep: float, _tensors: object) -> None:
        console.step("denoise", index + 1, steps)

    # A callback costs a copy of the latents in every step.
    callback = on_step if console.live else None
    if console.live:
        console.step("denoise", 0, steps)
    result = runtime(prompts, output_type=output_type, callback_on_step_end=callback, **settings)
    paths = write_images(result.images, output)
    repeats = len(paths) // len(prompts)
    document = {
        "images": [{"path": str(path), "prompt": prompts[index // repeats]} for index, path in enumerate(paths)],
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
    example='sana-export generate bundle "A cute 🐼 eating 🎋, ink drawing style" -o panda.png --steps 20 --seed 42',
    add_arguments=add_arguments,
    run=run,
)
