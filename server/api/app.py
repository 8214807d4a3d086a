"""The HTTP application: routes, and the layers around them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from gossamer import __version__
from gossamer.server.api.admin import admin_routes
from gossamer.server.api.auth import OPEN_PATHS, RequireKey
from gossamer.server.api.boundary import Boundary
from gossamer.server.api.chat import chat_routes
from gossamer.server.api.completions import completion_routes
from gossamer.server.api.errors import error_response
from gossamer.server.api.facade import ServingEngine
from gossamer.server.api.service import Service
from gossamer.server.api.tokens import token_routes
from gossamer.server.config import ServerConfig
from gossamer.server.metrics import Metrics


def create_app(engine: ServingEngine, config: ServerConfig, metrics: Metrics | None = None) -> FastAPI:
    """The app for an engine, which the caller starts and stops. `app.state.service` is the Service behind it.

    `metrics` is what the engine was built with. Raises ConfigError when the API keys cannot be read.
    """
    metrics = metrics or Metrics(engine.model.name)
    metrics.watch(engine.stats)
    service = Service(engine, config, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    docs = not config.disable_fastapi_docs
    app = FastAPI(
        title="Gossamer",
        version=__version__,
        openapi_url="/openapi.json" if docs else None,
        docs_url="/docs" if docs else None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.service = service
    for routes in (chat_routes, completion_routes, token_routes, admin_routes):
        app.include_router(routes(service))
    for kind in (HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answer)

    # The last one added is the outermost: CORS around Boundary around the keys.
    keys = config.keys()
    if keys:
        open_paths = OPEN_PATHS | {"/metrics"} if config.open_metrics else OPEN_PATHS
        app.add_middleware(RequireKey, keys=keys, open_paths=open_paths)
    app.add_middleware(Boundary, count=metrics.http, access_log=config.access_log)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=config.allowed_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app


async def _answer(request: Request, error: Exception) -> Response:
    return error_response(error, request.state.request_id)
