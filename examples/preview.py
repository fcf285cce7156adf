"""Save a small preview after every step. Ctrl-C cancels after the current step.

python examples/preview.py engines/out/tiny "a red apple" -o apple.png

This writes apple-00.png, apple-01.png, ... and at the end apple.png. A preview is the image that the model expects at this step. It
is one pixel for each latent pixel and costs next to nothing; with --whole it is the decoder's image.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from sana_export import SanaRuntime


class Cancelled(Exception):
    """The user pressed Ctrl-C."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("prompt")
    parser.add_argument("-o", "--output", type=Path, default=Path("image.png"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: the checkpoint's")
    parser.add_argument("--whole", action="store_true", help="run the decoder for each preview")
    args = parser.parse_args()

    cancelled = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: cancelled.set())

    with SanaRuntime.from_pretrained(args.bundle) as runtime:

        def on_step(runtime: SanaRuntime, index: int, timestep: float, tensors: dict[str, Any]) -> None:
            if cancelled.is_set():
                raise Cancelled  # ends the call below; the runtime stays usable
            preview = runtime.preview(method="decoder" if args.whole else "linear")[0]
            preview.save(args.output.with_stem(f"{args.output.stem}-{index:02d}"))
            print(f"step {index}, timestep {timestep:.1f}", flush=True)

        try:
            result = runtime(args.prompt, num_inference_steps=args.steps, seed=args.seed, callback_on_step_end=on_step)
        except Cancelled:
            sys.exit("cancelled")
    result.images[0].save(args.output)


if __name__ == "__main__":
    main()
