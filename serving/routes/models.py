"""GET /v1/models and GET /v1/models/{id}: the names this server answers to. An id may contain slashes."""

from typing import Any

from aiohttp import web

from serving.errors import json_response
from serving.state import STATE, ServerState


def add_routes(router: web.UrlDispatcher) -> None:
    """Adds this file's addresses."""
    router.add_get("/v1/models", list_models)
    router.add_get("/v1/models/{id:.+}", get_model)


async def list_models(request: web.Request) -> web.Response:
    """All served names."""
    state = request.app[STATE]
    return json_response({"object": "list", "data": [_model(state, name) for name in state.model_names]})


async def get_model(request: web.Request) -> web.Response:
    """One served name, or 404."""
    state = request.app[STATE]
    return json_response(_model(state, state.check_model(request.match_info["id"])))


def _model(state: ServerState, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "jax-engine",
        "root": state.engine.model_name,
        "max_model_len": state.engine.limits.max_model_len,
    }
