"""Clients that send one request after the other, without retries, and compare every image with the runtime's (ray_faults.py)."""

from __future__ import annotations

import base64
import io
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
from PIL import Image

PROMPT, SEEDS, STEPS = "a red apple", 32, 20
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Answer:
    """What a client got."""

    request_id: str
    status: int
    #: The error's code, or "" for an image.
    code: str
    #: Whether the image is the runtime's for its seed.
    right: bool
    started: float
    seconds: float
    retry_after: str | None = None

    @property
    def ended(self) -> float:
        """When it came, by `time.monotonic()`."""
        return self.started + self.seconds

    @property
    def lost(self) -> bool:
        """Whether the client did not get its image."""
        return self.status != 200 or not self.right


@dataclass
class Clients:
    """Clients that send one request after the other until they are stopped."""

    url: str
    #: What the runtime draws for `PROMPT` and each seed in `STEPS` steps.
    images: Sequence[Pixels]
    answers: list[Answer] = field(default_factory=list)

    @contextmanager
    def sending(self, count: int) -> Iterator[None]:
        """`count` clients, while the block runs. At its end, each finishes the request that it has sent."""
        seeds, stop = itertools.cycle(range(SEEDS)), threading.Event()

        def work() -> None:
            with httpx.Client(timeout=120) as client:
                while not stop.is_set():
                    self.answers.append(self.ask(client, next(seeds)))

        threads = [threading.Thread(target=work) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def ask(self, client: httpx.Client, seed: int) -> Answer:
        """One request."""
        body = {"prompt": PROMPT, "seed": seed, "num_inference_steps": STEPS}
        name, started, right, code = f"faults-{next(_NUMBERS)}", time.monotonic(), False, ""
        try:
            reply = client.post(f"{self.url}/v1/images/generations", json=body, headers={"x-request-id": name})
        except httpx.HTTPError as error:
            return Answer(name, 0, type(error).__name__, False, started, time.monotonic() - started)
        seconds = time.monotonic() - started
        if reply.status_code == 200:
            pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(reply.json()["data"][0]["b64_json"]))))
            right = np.array_equal(pixels, self.images[seed])
        else:
            code = reply.json()["error"]["code"]  # not OpenAI's form: the script fails
        if reply.headers["x-request-id"] != name:
            raise SystemExit(f"the request {name} was answered as {reply.headers['x-request-id']}")
        return Answer(name, reply.status_code, code, right, started, seconds, reply.headers.get("retry-after"))


_NUMBERS = itertools.count(1)


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Counts and seconds of answers."""
    seconds = sorted(answer.seconds for answer in answers)
    return {
        "requests": len(answers),
        "lost": sum(answer.lost for answer in answers),
        "wrong_images": sum(answer.status == 200 and not answer.right for answer in answers),
        "statuses": dict(Counter(str(answer.status) for answer in answers)),
        "error_codes": dict(Counter(answer.code for answer in answers if answer.code)),
        "p50_s": rounded(seconds[len(seconds) // 2]),
        "p99_s": rounded(seconds[int(len(seconds) * 0.99)]),
        "slowest_s": rounded(seconds[-1]),
    }


def rounded(seconds: float) -> float:
    """Seconds as reports show them."""
    return round(seconds, 2)
