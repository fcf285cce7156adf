"""Blend two prompts: weighted sums of their embeddings, from the first to the second, with the same noise.

python examples/blend.py engines/out/tiny "a red apple" "a green pear" --images 5 -o blend

Embeddings from elsewhere are passed in the same way, for example those of a library for prompt weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from sana_export import SanaRuntime, save_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: the checkpoint's")
    parser.add_argument("-o", "--output", type=Path, default=Path("blend"), help="folder")
    args = parser.parse_args()

    with SanaRuntime.from_pretrained(args.bundle) as runtime:
        first, second = runtime.encode_prompt(args.first), runtime.encode_prompt(args.second)
        for index, weight in enumerate(np.linspace(0, 1, args.images, dtype=np.float32)):
            # Rows after a prompt's end are zero, so the shorter one fades out there.
            masks = [one.prompt_attention_mask for one, share in ((first, 1 - weight), (second, weight)) if share]
            result = runtime(
                prompt_embeds=(1 - weight) * first.prompt_embeds + weight * second.prompt_embeds,
                prompt_attention_mask=np.maximum.reduce(masks),
                num_inference_steps=args.steps,
                seed=args.seed,
            )
            path = args.output / f"{index:02d}.png"
            save_image(result.images[0], path, result.metadata[0])
            print(f"{path}: {weight:.0%} of the second prompt")


if __name__ == "__main__":
    main()
