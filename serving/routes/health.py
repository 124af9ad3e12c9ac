"""GET /health, /ready, /load and /version: what probes, load balancers and routers ask. Never touches the device."""

from importlib import metadata

from aiohttp import web

from serving.errors import json_response
from serving.state import STATE


def add_routes(router: web.UrlDispatcher) -> None:
    """Adds this file's addresses."""
    router.add_get("/health", health)
    router.add_get("/ready", health)
    router.add_get("/load", load)
    router.add_get("/version", version)


async def health(request: web.Request) -> web.Response:
    """200 while requests are taken, else 503: loading, draining, or the engine has stopped or hangs."""
    request.app[STATE].check_open()
    return json_response({"status": "ok"})


async def load(request: web.Request) -> web.Response:
    """What a router needs to choose among servers; `server_load` (unfinished requests) is vLLM's field."""
    view = await request.app[STATE].engine.view()
    gauges = view.gauges
    return json_response(
        {
            "server_load": view.num_requests,
            "running": gauges.running,
            "waiting": gauges.waiting,
            "kv_pages_used": gauges.used_pages,
            "kv_pages": gauges.num_pages,
        }
    )


async def version(request: web.Request) -> web.Response:
    """The distribution's version."""
    return json_response({"version": package_version()})


def package_version() -> str:
    """The version of the installed distribution; `unknown` when the source folder is used without installing it."""
    try:
        return metadata.version("jax-engine")
    except metadata.PackageNotFoundError:
        return "unknown"
