"""Bodies of requests: read up to a size and a time, and checked against `schema.py`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sana_export.serve.config import RequestLimits
from sana_export.serve.errors import Refusal
from sana_export.serve.images import from_data_url
from sana_export.serve.multipart import FormField, parse_form
from sana_export.serve.schema import EditFields, Fields, GenerationBody

Body = TypeVar("Body", bound=Fields)
#: The code of an error by pydantic's type. Others are "invalid_value".
_CODES = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter", "json_invalid": "invalid_json"}
#: Digits of a content length.
_MOST_DIGITS = 18
#: Fields of a form that are files.
FILES = ("image", "mask")


class BodyReader:
    """Reads bodies. All that are held at a time have a limit together."""

    def __init__(self, limits: RequestLimits) -> None:
        self._limits, self._held = limits, 0

    @asynccontextmanager
    async def generation(self, request: Request) -> AsyncIterator[GenerationBody]:
        """The body of POST /v1/images/generations. Raises Refusal."""
        _check_type(request, "application/json")
        async with self._body(request, self._limits.json_bytes) as content:
            body = from_json(GenerationBody, content)
        yield body

    @asynccontextmanager
    async def edit(self, request: Request) -> AsyncIterator[tuple[EditFields, bytes, bytes | None]]:
        """The fields of POST /v1/images/edits, its image and its mask, which count as held until the block ends. Raises Refusal."""
        content_type = _check_type(request, "multipart/form-data")
        async with self._body(request, self._limits.body_bytes) as content:
            form = await asyncio.to_thread(parse_form, content_type, content)
            files = {name: await asyncio.to_thread(_file, form.pop(name)) for name in FILES if name in form}
            if "image" not in files:
                raise Refusal("missing_required_parameter", "image is missing", param="image")
            yield from_strings(EditFields, {name: field.text for name, field in form.items()}), files["image"], files.get("mask")

    @asynccontextmanager
    async def _body(self, request: Request, most: int) -> AsyncIterator[bytes]:
        """The whole body, which counts as held until the block ends."""
        content = bytearray()
        try:
            await self._read(request, most, content)
            yield bytes(content)
        finally:
            self._held -= len(content)

    async def _read(self, request: Request, most: int, content: bytearray) -> None:
        """Read the body into `content`. Raises Refusal for one that is too large or too slow, or a client that goes away."""
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > _MOST_DIGITS or int(length) > most:
            raise Refusal("body_too_large", f"the body has {length[:_MOST_DIGITS]} bytes; at most {most} are allowed")
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for chunk in request.stream():
                    if len(content) + len(chunk) > most:
                        raise Refusal("body_too_large", f"the body has more than {most} bytes")
                    if self._held + len(chunk) > self._limits.held_bytes:
                        raise Refusal("out_of_resources", "the server holds too many bodies of requests now; try again later")
                    content += chunk
                    self._held += len(chunk)
        except TimeoutError:
            raise Refusal("request_timeout", f"the body did not arrive in {self._limits.body_seconds:g} seconds") from None
        except ClientDisconnect:
            raise Refusal("client_closed", "the client closed the connection") from None


class HoldingResponse(Response):
    """Another response, with what is held until it has been sent or has failed."""

    def __init__(self, response: Response, held: AsyncExitStack) -> None:
        super().__init__(status_code=response.status_code)
        self._response, self._held = response, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As of ASGI."""
        async with self._held:
            await self._response(scope, receive, send)


def from_json(kind: type[Body], content: bytes) -> Body:
    """A checked body from JSON. Raises Refusal."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise _refusal(error) from None


def from_strings(kind: type[Body], fields: Mapping[str, str]) -> Body:
    """A checked body from the texts of a form. Raises Refusal."""
    try:
        return kind.model_validate_strings(dict(fields))
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> Refusal:
    """The first error of a body, with the name of its field. The value is not repeated: it may be long, or a prompt."""
    first: Any = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = str(first["loc"][0])[:100] if first["loc"] else None
    code = _CODES.get(first["type"], "invalid_value")
    if code == "unknown_parameter":
        return Refusal(code, f"unknown field: {name}", param=name)
    if code == "missing_required_parameter":
        return Refusal(code, f"{name} is missing", param=name)
    return Refusal(code, f"{name}: {first['msg']}" if name else str(first["msg"]), param=name)


def _check_type(request: Request, wanted: str) -> str:
    """The content type. Raises Refusal for another one than `wanted`."""
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != wanted:
        raise Refusal("unsupported_media_type", f"unsupported content type {content_type[:100]!r}; send {wanted}")
    return content_type


def _file(field: FormField) -> bytes:
    """The bytes of an uploaded file, or of a data URL in a text field."""
    return field.content if field.is_file else from_data_url(field.name, field.text)
