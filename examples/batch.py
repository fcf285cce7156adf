"""Draw several images of several prompts in one call. Each image has a seed of its own and can be drawn again alone.

python examples/batch.py engines/out/tiny "a red apple" "a green pear" --images 2 --seed 100 -o fruit
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sana_export import SanaRuntime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--images", type=int, default=2, help="images of each prompt")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image; the others count up from it")
    parser.add_argument("--steps", type=int, help="default: the checkpoint's")
    parser.add_argument("-o", "--output", type=Path, default=Path("images"), help="folder")
    args = parser.parse_args()

    count = len(args.prompts) * args.images
    with SanaRuntime.from_pretrained(args.bundle) as runtime:
        result = runtime(
            args.prompts,
            num_images_per_prompt=args.images,
            num_inference_steps=args.steps,
            seed=range(args.seed, args.seed + count),
        )

    args.output.mkdir(parents=True, exist_ok=True)
    for index, (image, seed) in enumerate(zip(result.images, result.seeds, strict=True)):
        prompt = args.prompts[index // args.images]  # the images of the first prompt come first
        path = args.output / f"{index:03d}-seed-{seed}.png"
        image.save(path)
        print(f"{path}: seed {seed}, {prompt}")


if __name__ == "__main__":
    main()
