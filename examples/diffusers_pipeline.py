"""Draw with diffusers' own SanaPipeline, and again with a bundle behind it.

python examples/diffusers_pipeline.py engines/out/tiny sana_export/models/tiny "A cute panda" -o pandas
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from time import perf_counter

import torch
from diffusers import SanaPipeline

from sana_export.errors import SanaExportError
from sana_export.integrations.diffusers import SanaExportPipeline, use_bundle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("model", help="folder or hub id of the checkpoint that the bundle was exported from")
    parser.add_argument("prompt")
    parser.add_argument("-o", "--output", type=Path, default=Path())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, help="pixels of the image's side; default: the checkpoint's")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    def draw(pipe: SanaPipeline | SanaExportPipeline, name: str) -> None:
        pipe.set_progress_bar_config(disable=True)
        start = perf_counter()
        generator = torch.Generator().manual_seed(args.seed)
        image = pipe(args.prompt, generator=generator, **words).images[0]
        image.save(args.output / f"{name}.png")
        print(f"{name:12} {perf_counter() - start:6.2f} s")

    pipe = SanaPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
    size = args.size or pipe.transformer.config.sample_size * pipe.vae_scale_factor
    words = {"height": size, "width": size, "use_resolution_binning": False, "num_inference_steps": args.steps}
    draw(pipe, "diffusers")
    with use_bundle(pipe, args.bundle):  # the same call with the bundle's graphs
        draw(pipe, "use_bundle")
    draw(SanaExportPipeline.from_pretrained(args.bundle), "bundle-alone")  # no other weights, another import


if __name__ == "__main__":
    try:
        main()
    except SanaExportError as error:  # says what was found, what was wanted, and the command that fixes it
        sys.exit(str(error))
