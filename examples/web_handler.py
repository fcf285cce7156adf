"""Serve images over HTTP from one runtime, with the standard library alone. `ImageService` is the part to copy.

python examples/web_handler.py engines/out/tiny --port 8000
curl "http://127.0.0.1:8000/?prompt=a+red+apple&seed=1&steps=20" -o apple.png

One thread draws one image at a time. At most `--places` requests draw or wait; the next one gets 503. A request that takes
longer than `--timeout` gets 504. A timeout, or a client that goes away, frees the place at once and stops drawing after the current
stage, step or tile.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from urllib.parse import parse_qsl, urlsplit

from sana_export import SanaRuntime
from sana_export.errors import DependencyError, SanaExportError, UsageError

USAGE = b"ask for /?prompt=TEXT&seed=NUMBER&steps=NUMBER"


class ImageService:
    def __init__(self, runtime: SanaRuntime, *, places: int, timeout: float, max_steps: int) -> None:
        self.runtime, self.timeout, self.max_steps = runtime, timeout, max_steps
        self.places = asyncio.Semaphore(places)
        self.worker = ThreadPoolExecutor(max_workers=1)  # a second thread would only wait for the runtime

    async def draw(self, prompt: str, seed: int | None, steps: int | None) -> bytes:
        """A PNG. If the task is cancelled, drawing never starts, or stops soon."""
        cancelled = threading.Event()

        def work() -> bytes:
            result = self.runtime(prompt, seed=seed, num_inference_steps=steps, cancelled=cancelled.is_set)
            buffer = io.BytesIO()
            result.images[0].save(buffer, "PNG")
            return buffer.getvalue()

        try:
            return await asyncio.get_running_loop().run_in_executor(self.worker, work)
        finally:
            cancelled.set()

    async def answer(self, request: str, client: asyncio.StreamReader) -> tuple[HTTPStatus, bytes]:
        try:
            query = dict(parse_qsl(urlsplit(request.split()[1]).query))
            prompt = query["prompt"]
            seed, steps = (int(query[name]) if name in query else None for name in ("seed", "steps"))
        except (IndexError, KeyError, ValueError):
            return HTTPStatus.BAD_REQUEST, USAGE
        if steps is not None and steps > self.max_steps:
            return HTTPStatus.BAD_REQUEST, f"at most {self.max_steps} steps".encode()
        if self.places.locked():
            return HTTPStatus.SERVICE_UNAVAILABLE, b"all places are taken"
        async with self.places:
            drawing = asyncio.create_task(self.draw(prompt, seed, steps))
            leaving = asyncio.create_task(closed(client))
            await asyncio.wait({drawing, leaving}, timeout=self.timeout, return_when=asyncio.FIRST_COMPLETED)
            leaving.cancel()
            if not drawing.done():
                drawing.cancel()  # too late, or the client is not there to read this
                return HTTPStatus.GATEWAY_TIMEOUT, b"it took too long"
            try:
                return HTTPStatus.OK, drawing.result()
            except UsageError as error:  # not str(error): that has commands and paths of the server
                text = error.message if error.wanted is None else f"{error.message}\nwanted: {error.wanted}"
                return HTTPStatus.BAD_REQUEST, text.encode()
            except DependencyError as error:  # for example, too little memory; the same request may succeed later
                logging.error("%s", error)
                return HTTPStatus.SERVICE_UNAVAILABLE, b"this machine cannot draw the image now"
            except SanaExportError as error:
                logging.error("%s", error)
                return HTTPStatus.INTERNAL_SERVER_ERROR, b"drawing failed"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request and close the connection."""
        ends = (EOFError, OSError, asyncio.LimitOverrunError, asyncio.CancelledError)  # of the client, or of the server
        with contextlib.closing(writer), contextlib.suppress(*ends):
            request = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), timeout=10)
            status, body = await self.answer(request.decode("latin-1"), reader)
            kind = "image/png" if status == HTTPStatus.OK else "text/plain; charset=utf-8"
            head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
            writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
            await writer.drain()


async def closed(client: asyncio.StreamReader) -> None:
    """Return when the client has closed the connection."""
    with contextlib.suppress(OSError):
        while await client.read(1024):
            pass


async def serve(service: ImageService, port: int) -> None:
    with contextlib.closing(await asyncio.start_server(service.handle, "127.0.0.1", port)) as server:
        print("http://{}:{}/".format(*server.sockets[0].getsockname()), flush=True)
        await asyncio.Event().wait()  # until Ctrl-C, which cancels open requests; `serve_forever` would wait for them


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--port", type=int, default=8000, help="0: any free port")
    parser.add_argument("--places", type=int, default=4, help="requests that draw or wait")
    parser.add_argument("--timeout", type=float, default=60, help="seconds")
    parser.add_argument("--max-steps", type=int, default=50)
    args = parser.parse_args()
    with SanaRuntime.from_pretrained(args.bundle) as runtime, contextlib.suppress(KeyboardInterrupt):
        service = ImageService(runtime, places=args.places, timeout=args.timeout, max_steps=args.max_steps)
        asyncio.run(serve(service, args.port))
