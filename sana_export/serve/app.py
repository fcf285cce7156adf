"""The routes. Everything that they do is elsewhere; docs/serving.md describes them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse

from sana_export import __version__
from sana_export.serve import answers, openapi
from sana_export.serve.bodies import BodyReader, HoldingResponse
from sana_export.serve.config import ServeConfig
from sana_export.serve.engine import Engine, ModelCard
from sana_export.serve.errors import Refusal, answer
from sana_export.serve.jobs import asked_timeout, image_job
from sana_export.serve.metrics import MEDIA_TYPE, Metrics
from sana_export.serve.schema import GenerationBody, ImagesAnswer, ModelItem, ModelList
from sana_export.serve.security import Guard
from sana_export.serve.url_files import UrlFiles

LOG = logging.getLogger(__name__)
Result = TypeVar("Result")
#: Errors of every route, and of those that draw.
_EVERYWHERE = ("invalid_http", "invalid_api_key", "forbidden_origin", "misdirected", "internal_error", "too_many_connections")
_DRAWING = (
    *_EVERYWHERE,
    *("invalid_value", "unknown_parameter", "content_policy_violation", "model_not_found", "request_timeout", "body_too_large"),
    *("unsupported_media_type", "queue_full", "model_damaged", "out_of_resources", "shutting_down", "timeout", "disk_full"),
)


def create_app(engine: Engine, config: ServeConfig) -> FastAPI:
    """The application over an engine, which the caller closes. Its routes need one event loop."""
    metrics, bodies = Metrics(engine), BodyReader(config.limits)
    files = UrlFiles(config.url_folder, config.url_seconds, config.url_bytes)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        expiring = asyncio.create_task(_expire(files))
        yield
        expiring.cancel()
        files.close()

    app = FastAPI(
        title="sana-export", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan
    )
    app.add_middleware(Guard, config=config, metrics=metrics)

    @app.exception_handler(HTTPException)
    async def not_a_route(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_http")
        metrics.failed(code)
        found = answer(Refusal(code, f"there is no {request.method} {request.scope['path'][:200]}", headers=error.headers))
        return JSONResponse(found.body, found.status, found.headers)

    async def draw(
        kind: str, request: Request, body: GenerationBody, image: bytes | None = None, mask: bytes | None = None
    ) -> Response:
        timeout = asked_timeout(request.headers.get("x-request-timeout"), config)
        job = image_job(body, engine.models(), config, request.scope["caller"], timeout=timeout, image=image, mask=mask)
        request.scope["model"] = job.model  # for errors
        if config.log_prompts:
            LOG.info("request %s: %s", job.request_id, dict(job.words))
        if body.stream:
            events = engine.submit(job)
            await unless_gone(request, answers.accepted(events))  # accepted, or refused with a status of its own
            return StreamingResponse(answers.stream(kind, body, job, events, metrics), media_type="text/event-stream")
        result = await unless_gone(request, answers.finished(engine, job))
        metrics.drew(job, result)
        root = (config.public_url or f"{request.scope['scheme']}://{request.headers.get('host')}").rstrip("/")

        async def store(content: bytes, media_type: str) -> str:
            return f"{root}/images/{await files.store(content, media_type)}"

        return Response(await answers.document(body, job, result, store), media_type="application/json")

    responses: Any = {200: {"content": {"text/event-stream": {}}}, **openapi.error_responses(*_DRAWING)}
    drawing: dict[str, Any] = {"response_model": ImagesAnswer, "responses": responses}
    models = engine.models()

    @app.post("/v1/images/generations", openapi_extra={"requestBody": openapi.generation_body(config, models)}, **drawing)
    async def generations(request: Request) -> Response:
        """Draw images of a prompt."""
        async with bodies.generation(request) as body:
            return await draw("image_generation", request, body)

    @app.post("/v1/images/edits", openapi_extra={"requestBody": openapi.edit_body(config, models)}, **drawing)
    async def edits(request: Request) -> Response:
        """Draw images that start from an image, everywhere or where a mask says."""
        async with AsyncExitStack() as held:
            body, image, mask = await held.enter_async_context(bodies.edit(request))
            found = await draw("image_edit", request, body, image, mask)
            return HoldingResponse(found, held.pop_all()) if body.stream else found

    everywhere = openapi.error_responses(*_EVERYWHERE)

    @app.get("/v1/models", response_model=ModelList, responses=everywhere)
    async def list_models() -> ModelList:
        """The models of this server, the default one first."""
        return ModelList(data=[_item(card) for card in engine.models()])

    @app.get("/v1/models/{name}", response_model=ModelItem, responses={**everywhere, **openapi.error_responses("model_not_found")})
    async def one_model(name: str) -> ModelItem:
        """One model."""
        for card in engine.models():
            if card.name == name:
                return _item(card)
        raise Refusal("model_not_found", f"the model {name[:100]!r} does not exist", param="model")

    @app.get("/images/{name}", response_class=FileResponse, responses={**everywhere, **openapi.error_responses("not_found")})
    async def image_file(name: str) -> Response:
        """An image that was asked for as a URL."""
        if (found := files.find(name)) is None or not found.path.is_file():
            raise Refusal("not_found", "there is no such image, or it has expired")
        return FileResponse(found.path, media_type=found.media_type, headers={"Cache-Control": "private"})

    @app.head("/health/live", include_in_schema=False)
    @app.get("/health/live", responses=everywhere)
    async def live() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.head("/health/ready", include_in_schema=False)
    @app.get("/health/ready", responses={**everywhere, **openapi.error_responses("not_ready")})
    async def ready() -> dict[str, str]:
        """Whether new requests are accepted and drawn."""
        status = engine.status()
        if not status.ready:
            raise Refusal("not_ready", f"the server is not ready: {status.reason}")
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse, responses=everywhere)
    async def prometheus() -> Response:
        """Metrics for Prometheus."""
        return Response(await asyncio.to_thread(metrics.text), media_type=MEDIA_TYPE)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(openapi.page(app.openapi()), headers=openapi.PAGE_HEADERS)

    return app


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client closes the connection. Raises Refusal "client_closed" then."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    drawing, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((drawing, leaving), return_when=asyncio.FIRST_COMPLETED)
        if drawing.done():
            return drawing.result()
        raise Refusal("client_closed", "the client closed the connection")
    finally:
        for task in (drawing, leaving):
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(drawing, leaving, return_exceptions=True)


async def _expire(files: UrlFiles) -> None:
    while True:
        files.expire()
        await asyncio.to_thread(files.expire_left)
        await asyncio.sleep(30)


def _item(card: ModelCard) -> ModelItem:
    return ModelItem(id=card.name, created=card.created, loaded=card.loaded, edits=card.edits, native_size=card.native_size)
