"""The paths of the server.

In: models, limits, who may ask. Out: an ASGI application; its end closes the models' engines.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from lfm2_export import json_values
from lfm2_export.server import chat_answer, completion_answer, metrics
from lfm2_export.server.access import Access, Guarded
from lfm2_export.server.answering import respond
from lfm2_export.server.chat_page import page_routes
from lfm2_export.server.chat_request import parse_chat
from lfm2_export.server.completion_request import parse_completion
from lfm2_export.server.embeddings import parse_embedding, to_json
from lfm2_export.server.errors import ApiError, translated
from lfm2_export.server.limits import Limits
from lfm2_export.server.preparing import Preparing
from lfm2_export.server.served import Models

logger = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]


def create_app(models: Models, limits: Limits, access: Access) -> Starlette:
    paths = _Paths(models, limits)
    routes = {
        "/health": (paths.health, "GET"),
        "/metrics": (paths.metrics, "GET"),
        "/v1/models": (paths.list_models, "GET"),
        "/v1/models/{name:path}": (paths.show_model, "GET"),
        "/v1/chat/completions": (paths.chat, "POST"),
        "/v1/completions": (paths.completion, "POST"),
        "/v1/embeddings": (paths.embedding, "POST"),
    }
    made = [Route(path, _told(handler, path, models), methods=[method]) for path, (handler, method) in routes.items()]
    made += page_routes()
    middleware = [Middleware(Guarded, access=access)]
    if access.origins:
        allowed = {"allow_origins": list(access.origins), "allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
        middleware.insert(0, Middleware(CORSMiddleware, **allowed))  # type: ignore[arg-type]
    return Starlette(
        routes=made, middleware=middleware, exception_handlers={HTTPException: _no_path}, lifespan=_closing(models)
    )


def _closing(models: Models) -> Callable[[Starlette], contextlib.AbstractAsyncContextManager[None]]:
    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(models.close)

    return lifespan


def _told(handler: Handler, path: str, models: Models) -> Handler:
    """Its errors as JSON, its responses counted."""

    async def told(request: Request) -> Response:
        try:
            response = await handler(request)
        except ClientDisconnect:
            response = Response(status_code=499)
        except Exception as error:
            response = _error(error)
        models.metrics.responded(path, response.status_code)
        return response

    return told


def _error(error: Exception) -> Response:
    told = translated(error)
    if told.status == 500:
        logger.error("a request failed (%s: %s)", type(error).__name__, error, exc_info=error)
    headers = {"Retry-After": "1"} if told.status == 429 else None
    return JSONResponse(told.to_json(), status_code=told.status, headers=headers)


async def _no_path(request: Request, error: Exception) -> Response:
    """Unknown paths, and known ones with another method."""
    assert isinstance(error, HTTPException)
    fault = "takes another method" if error.status_code == 405 else "there is no such path here"
    told = ApiError(error.status_code, f"{request.method} {request.url.path}: {fault}")
    return JSONResponse(told.to_json(), status_code=told.status, headers=error.headers)


class _Paths:
    """The handlers."""

    def __init__(self, models: Models, limits: Limits):
        self._models, self._limits = models, limits
        self._preparing = Preparing(limits)

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        gauges = {served.model.name: served.engine.gauges() for served in self._models.all()}
        text = self._models.metrics.text(gauges, self._models.reports())
        return PlainTextResponse(text, headers={"Content-Type": metrics.CONTENT_TYPE})

    async def list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": self._models.to_json()})

    async def show_model(self, request: Request) -> Response:
        return JSONResponse(self._models.show(request.path_params["name"]))

    async def chat(self, request: Request) -> Response:
        asked_for = parse_chat(await self._body(request))
        served = self._models.find(asked_for.model)
        prepare = partial(chat_answer.prepare, served.model, asked_for, self._limits)
        asked, answer = await self._preparing.run(request, served, prepare)
        return await respond(request, served.engine, asked, answer, stream=asked_for.sampling.stream)

    async def completion(self, request: Request) -> Response:
        asked_for = parse_completion(await self._body(request))
        served = self._models.find(asked_for.model)
        prepare = partial(completion_answer.prepare, served.model, asked_for, self._limits)
        asked, answer = await self._preparing.run(request, served, prepare)
        return await respond(request, served.engine, asked, answer, stream=asked_for.sampling.stream)

    async def embedding(self, request: Request) -> Response:
        asked_for = parse_embedding(await self._body(request))
        encoder = self._models.find_encoder(asked_for.model)
        embedded = await encoder.embed(asked_for, request)
        return JSONResponse(to_json(encoder.name, embedded, as_base64=asked_for.base64))

    async def _body(self, request: Request) -> dict[str, Any]:
        """The request's JSON object, of a size that is allowed."""
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > self._limits.body:
                raise ApiError(413, f"the request has more than {self._limits.body} bytes; shorten it")
        try:
            body = json_values.parse(bytes(data))
        except json_values.JsonError as error:
            raise ApiError(400, f"the request {error}; give one JSON object") from error
        if not isinstance(body, dict):
            raise ApiError(400, 'the request is no JSON object; give one, such as {"messages": [...]}')
        return body
