"""Draw one image and print its seed and where the time went.

python examples/generate.py engines/out/tiny "A cute panda" -o panda.png
"""

from __future__ import annotations

import argparse
import sys

from sana_export import SanaRuntime
from sana_export.errors import SanaExportError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("prompt")
    parser.add_argument("-o", "--output", default="image.png")
    parser.add_argument("--seed", type=int, help="default: a random one")
    parser.add_argument("--steps", type=int, help="default: the checkpoint's")
    parser.add_argument("--height", type=int, help="pixels; default: the checkpoint's")
    parser.add_argument("--width", type=int, help="pixels; default: the checkpoint's")
    args = parser.parse_args()

    with SanaRuntime.from_pretrained(args.bundle) as runtime:
        result = runtime(args.prompt, num_inference_steps=args.steps, height=args.height, width=args.width, seed=args.seed)
    result.images[0].save(args.output)

    timings = result.timings
    print(f"{args.output}: {result.width}x{result.height}, seed {result.seeds[0]}")
    print(f"text encoder  {timings.text_encoder:8.3f} s")
    print(f"denoising     {timings.denoise_loop:8.3f} s")
    print(f"decoder       {timings.vae_decoder:8.3f} s")
    print(f"total         {timings.total:8.3f} s")


if __name__ == "__main__":
    try:
        main()
    except SanaExportError as error:  # says what was found, what was wanted, and the command that fixes it
        sys.exit(str(error))
