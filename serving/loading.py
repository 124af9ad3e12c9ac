"""What the server says before the engine is ready: a small application in place of the real one.

Run by server.py on the same port, so that probes see a process that is alive and not ready.
"""

from typing import Any

from aiohttp import web

from serving.errors import error_middleware, unavailable
from serving.routes.health import version
from serving.security import add_security_headers


def loading_app() -> web.Application:
    """GET /version answers; all else is 503 with Retry-After."""

    @web.middleware
    async def not_yet(request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path == "/version":
            return await handler(request)
        raise unavailable("The model is being loaded; try again soon.", "loading")

    app = web.Application(middlewares=[error_middleware, not_yet])
    app.on_response_prepare.append(add_security_headers)
    app.router.add_get("/version", version)
    return app
