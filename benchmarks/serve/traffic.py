"""The requests of a load: valid, invalid, aborted and malformed ones, and what each of them has to get."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import httpx

from benchmarks.serve.images import Drawn, References

PATH = "/v1/images/generations"
#: Statuses of a server that has too much to do. The client may try again.
BUSY = (429, 503)
#: Seconds after which a request counts as lost.
PATIENCE = 300.0
#: An aborting client leaves after at most this many seconds.
ABORT_SECONDS = 0.3

#: What valid requests ask for beside their image, with weights. Images of a stream with previews are drawn alone.
WAYS: Mapping[str, tuple[Mapping[str, Any], int]] = {
    "png": ({}, 6),
    "webp": ({"output_format": "webp"}, 1),
    "stream": ({"stream": True, "partial_images": 1}, 1),
}
#: Bodies that the server has to refuse: what is wrong with them, and the status.
INVALID: Mapping[str, tuple[Mapping[str, Any], int]] = {
    "no prompt": ({"n": 1}, 400),
    "an unknown field": ({"prompt": "x", "colour": "red"}, 400),
    "a seed that is a text": ({"prompt": "x", "seed": "7"}, 400),
    "a size that is no multiple": ({"prompt": "x", "size": "100x99999"}, 400),
    "eleven images": ({"prompt": "x", "n": 11}, 400),
    "a million steps": ({"prompt": "x", "num_inference_steps": 1_000_000}, 400),
    "an unknown model": ({"prompt": "x", "model": "dall-e-9"}, 404),
    "an unknown scheduler": ({"prompt": "x", "scheduler": "none-of-ours"}, 400),
    "an endless prompt": ({"prompt": "x" * 10_000}, 400),
}


def _head(method: str, *headers: str) -> bytes:
    return "\r\n".join((f"{method} {PATH} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", *headers, "", "")).encode()


def _post(body: bytes, *headers: str, length: int | None = None, content_type: str = "application/json") -> bytes:
    size = len(body) if length is None else length
    return _head("POST", f"Content-Type: {content_type}", f"Content-Length: {size}", *headers) + body


#: Bytes that are not a request, or not one of ours: what they are, and the statuses that fit.
MALFORMED: Mapping[str, tuple[bytes, tuple[int, ...]]] = {
    "half of a JSON document": (_post(b'{"prompt": "a red ap'), (400,)),
    "a JSON array": (_post(b"[1, 2, 3]"), (400,)),
    "bytes that are not UTF-8": (_post(b'{"prompt": "\xff\xfe\xfa"}'), (400,)),
    "10,000 nested lists": (_post(b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"), (400,)),
    "a JSON document of 1 MiB": (_post(b'{"prompt": "' + b"x" * 2**20 + b'"}'), (413,)),
    "a body that claims 10 GiB": (_post(b'{"prompt": "x"}', length=10 * 2**30), (413,)),
    "a text": (_post(b"prompt=x", content_type="text/plain"), (415,)),
    "a form": (_post(b"prompt=x", content_type="application/x-www-form-urlencoded"), (415,)),
    "a header of 1 MiB": (_post(b"{}", f"X-Long: {'y' * 2**20}"), (431,)),
    "5000 headers": (_post(b"{}", *(f"X-{number}: y" for number in range(5000))), (431,)),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS hello\r\n\r\n", (400,)),
    "a wrong length in chunks": (
        _head("POST", "Content-Type: application/json", "Transfer-Encoding: chunked") + b"zz\r\n{}\r\n",
        (400,),
    ),
    "a method that no route has": (_head("BREW"), (405,)),
}


@dataclass(frozen=True)
class Outcome:
    """What one request got."""

    #: "valid", "invalid", "aborted" or "malformed".
    kind: str
    #: "ok", "busy" (429 or 503), "lost" (no answer), "crossed", "differs", "unexpected" (another status) or "form" (an error that
    #: is not in OpenAI's form).
    verdict: str
    #: Seconds from its arrival to the last byte of the answer.
    seconds: float
    #: 0: no answer.
    status: int = 0
    images: int = 0
    #: What was asked and answered, if the verdict is not "ok" or "busy".
    detail: str = ""


class Client:
    """Sends requests of all kinds to one server."""

    def __init__(self, url: str, references: References, *, key: str | None = None, most: int = 0) -> None:
        """`most`: see `References.judge`."""
        self.references, self._most = references, most
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self.http = httpx.AsyncClient(base_url=url, headers=headers, timeout=PATIENCE, limits=limits)

    async def send(self, kind: str, rng: random.Random, arrival: float | None = None) -> Outcome:
        """One request of a kind. `arrival`: when it should have been sent, by `perf_counter`. Default: now."""
        start = perf_counter() if arrival is None else arrival
        verdict, status, images, detail = await getattr(self, f"_{kind}")(rng)
        return Outcome(kind, verdict, perf_counter() - start, status, images, detail)

    def _body(self, item: Drawn) -> dict[str, Any]:
        size = self.references.size
        words = {"negative_prompt": item.negative_prompt} if item.negative_prompt else {}
        steps = self.references.steps
        return {
            "prompt": item.prompt,
            "seed": item.seed,
            "n": item.images,
            "size": f"{size}x{size}",
            "num_inference_steps": steps,
            **words,
        }

    async def _valid(self, rng: random.Random) -> tuple[str, int, int, str]:
        item = rng.choice(self.references.drawn)
        ((way, _),) = rng.choices(tuple(WAYS.values()), [weight for _, weight in WAYS.values()])
        body = {**self._body(item), **way}
        try:
            answer = await self.http.post(PATH, json=body)
        except httpx.HTTPError as error:
            return "lost", 0, 0, f"{body}: {error!r}"
        if answer.status_code != 200:
            return self._refused(answer, BUSY, "busy", str(body))
        if body.get("stream"):
            events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
            if any("error" in event for event in events):
                return "unexpected", 200, 0, f"{body}: {events[-1]}"
            files = [event["b64_json"] for event in events if event["type"] == "image_generation.completed"]
        else:
            files = [data["b64_json"] for data in answer.json()["data"]]
        verdict = self.references.judge(item, [base64.b64decode(file) for file in files], self._most)
        return verdict, 200, item.images, "" if verdict == "ok" else str(body)

    async def _invalid(self, rng: random.Random) -> tuple[str, int, int, str]:
        name = rng.choice(tuple(INVALID))
        body, status = INVALID[name]
        try:
            answer = await self.http.post(PATH, json=body)
        except httpx.HTTPError as error:
            return "lost", 0, 0, f"{name}: {error!r}"
        return self._refused(answer, (status, *BUSY), "ok", name)

    async def _aborted(self, rng: random.Random) -> tuple[str, int, int, str]:
        item = rng.choice(self.references.drawn)
        try:
            async with asyncio.timeout(rng.uniform(0, ABORT_SECONDS)):
                answer = await self.http.post(PATH, json=self._body(item))
        except TimeoutError:
            return "ok", 0, 0, ""
        except httpx.HTTPError as error:
            return "lost", 0, 0, repr(error)
        if answer.status_code == 200:
            return "ok", 200, item.images, ""
        return self._refused(answer, BUSY, "busy", "aborted")

    async def _malformed(self, rng: random.Random) -> tuple[str, int, int, str]:
        name = rng.choice(tuple(MALFORMED))
        content, statuses = MALFORMED[name]
        try:
            status, body = await raw_answer(self.http.base_url.port or 80, content)
        except (OSError, TimeoutError, ValueError) as error:
            return "lost", 0, 0, f"{name}: {error!r}"
        return self._refused(httpx.Response(status, content=body), (*statuses, *BUSY), "ok", name)

    def _refused(self, answer: httpx.Response, statuses: tuple[int, ...], verdict: str, asked: str) -> tuple[str, int, int, str]:
        shown = f"{asked}: {answer.status_code} {answer.text[:300]}"
        if answer.status_code not in statuses:
            return "unexpected", answer.status_code, 0, shown
        if not has_error_form(answer.content):
            return "form", answer.status_code, 0, shown
        return verdict, answer.status_code, 0, ""


def has_error_form(content: bytes) -> bool:
    """Whether the body of an answer is an error in OpenAI's form."""
    try:
        error = json.loads(content)["error"]
    except (ValueError, KeyError, TypeError):
        return False
    return set(error) == {"message", "type", "param", "code"} and isinstance(error["message"], str)


async def raw_answer(port: int, content: bytes, patience: float = 60.0) -> tuple[int, bytes]:
    """Send bytes to a port of loopback. Returns the answer's status and body.

    Raises OSError or ValueError if the server closes the connection without an answer, TimeoutError if it stays silent.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(patience):
            sending = asyncio.ensure_future(_send(writer, content))
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            length = next((int(line[15:]) for line in head.split("\r\n") if line.startswith("content-length:")), None)
            body = await (reader.read() if length is None else reader.readexactly(length))
            sending.cancel()
            return int(head.split()[1]), body
    except asyncio.IncompleteReadError as error:
        raise ConnectionError("closed without an answer") from error
    finally:
        writer.close()


async def _send(writer: asyncio.StreamWriter, content: bytes) -> None:
    try:
        writer.write(content)
        await writer.drain()
    except OSError:
        pass  # the server has answered and closed before it read everything
