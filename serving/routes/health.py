"""GET /health and GET /version: what probes and load balancers ask. Never needs a key, never touches the device."""

from importlib import metadata

from aiohttp import web

from serving.errors import json_response
from serving.state import STATE


def add_routes(router: web.UrlDispatcher) -> None:
    """Adds this file's addresses."""
    router.add_get("/health", health)
    router.add_get("/version", version)


async def health(request: web.Request) -> web.Response:
    """200 while requests are taken, else 503."""
    request.app[STATE].check_open()
    return json_response({"status": "ok"})


async def version(request: web.Request) -> web.Response:
    """The distribution's version."""
    return json_response({"version": package_version()})


def package_version() -> str:
    """The version of the installed distribution; `unknown` when the source folder is used without installing it."""
    try:
        return metadata.version("jax-engine")
    except metadata.PackageNotFoundError:
        return "unknown"
