"""What is served, and how the server is: models, health, readiness, version, load, metrics."""

from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from gossamer import __version__
from gossamer.server.api.errors import encode
from gossamer.server.api.service import Service
from gossamer.server.engine.request import Unavailable


def admin_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [_card(service, name) for name in service.engine.model.names]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return _json(_card(service, service.model_named(name)))

    @router.get("/health")
    @router.head("/health", include_in_schema=False)
    async def health() -> Response:
        """Can the engine still make progress? For liveness probes: 503 means restart."""
        state = service.engine.health()
        if not state.alive:
            raise Unavailable(state.reason or "The engine has stopped.")
        return _json({"status": "ok"})

    @router.get("/ready")
    @router.head("/ready", include_in_schema=False)
    async def ready() -> Response:
        """Does the server take new requests? For readiness probes and routers."""
        state = service.engine.health()
        if service.draining:
            raise Unavailable("The server is shutting down.")
        if not (state.alive and state.ready):
            raise Unavailable(state.reason or "The engine is not ready.")
        return _json({"status": "ready"})

    @router.get("/version")
    async def version() -> Response:
        return _json({"version": __version__})

    @router.get("/load")
    async def load() -> Response:
        return _json({"server_load": len(service.calls)})

    @router.get("/metrics")
    async def metrics() -> Response:
        body = await service.in_thread(service.metrics.text)
        return Response(body, media_type=CONTENT_TYPE_LATEST)

    return router


def _card(service: Service, name: str) -> dict[str, Any]:
    engine = service.engine
    return {
        "id": name,
        "object": "model",
        "created": engine.model.created,
        "owned_by": "gossamer",
        "root": engine.model.root,
        "parent": None,
        "max_model_len": engine.model.max_model_len,
        "permission": [],
        "attention_policies": list(engine.points),
        "default_attention_policy": engine.default_point,
    }


def _json(value: object) -> Response:
    return Response(encode(value), media_type="application/json")
