"""Draw one prompt with a LoRA and, after unloading it, without. The bundle stays as it is.

python examples/lora.py engines/out/tiny style.safetensors "a red apple" --scale 0.7 -o apple

This writes apple/with-lora.png and apple/plain.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sana_export import SanaRuntime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("lora", help="file or folder in the format of diffusers or PEFT")
    parser.add_argument("prompt")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: the checkpoint's")
    parser.add_argument("-o", "--output", type=Path, default=Path("images"), help="folder")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    with SanaRuntime.from_pretrained(args.bundle) as runtime:

        def draw(name: str) -> None:
            result = runtime(args.prompt, num_inference_steps=args.steps, seed=args.seed)
            result.images[0].save(args.output / name)
            print(f"{args.output / name}: LoRAs {[lora.path.name for lora in runtime.loras]}")

        runtime.load_lora(args.lora, args.scale)  # another load_lora would add a second one
        draw("with-lora.png")
        runtime.unload_lora()  # all of them: the weights are the bundle's again, bit for bit
        draw("plain.png")


if __name__ == "__main__":
    main()
