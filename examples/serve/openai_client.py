"""Draw with a running `sana-export serve`, through the official client of OpenAI: pip install openai

python examples/serve/openai_client.py --url http://127.0.0.1:8000/v1 --output apples
"""

from __future__ import annotations

import argparse
import base64
import os
from pathlib import Path

from openai import BadRequestError, NotFoundError, OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="the server's address, with /v1")
    parser.add_argument("--output", type=Path, default=Path("apples"), help="folder for the images")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    # A server without API keys takes any.
    client = OpenAI(base_url=args.url, api_key=os.environ.get("OPENAI_API_KEY", "none"))

    model = client.models.list().data[0].id
    print("model:", model)

    answer = client.images.generate(model=model, prompt="a red apple", n=2, extra_body={"seed": 7, "num_inference_steps": 20})
    for number, image in enumerate(answer.data):
        path = args.output / f"apple-{number}.png"
        path.write_bytes(base64.b64decode(image.b64_json))
        print(f"{path.name}: seed {image.seed}, {answer.size}")

    for event in client.images.generate(prompt="a panda", stream=True, partial_images=2, extra_body={"seed": 1}):
        path = args.output / f"panda-{event.type.rpartition('.')[2]}-{getattr(event, 'partial_image_index', 0)}.png"
        path.write_bytes(base64.b64decode(event.b64_json))
        print(f"{event.type}: {path.name}")

    try:
        client.images.generate(model="dall-e-3", prompt="a panda")
    except NotFoundError as error:
        print(f"{error.status_code} {error.code}: {error.body['message']}")
    try:
        client.images.generate(prompt="a panda", extra_body={"colour": "red"})
    except BadRequestError as error:
        print(f"{error.status_code} {error.code}: {error.body['message']}")


if __name__ == "__main__":
    main()
