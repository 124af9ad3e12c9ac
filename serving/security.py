"""What browsers are told: headers on every answer, and which other web origins may call (none, unless configured).

Used by app.create_app. Keys are keys.py's.
"""

from collections.abc import Sequence
from typing import Any

from aiohttp import web

_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
_PREFLIGHT_HEADERS = {
    "Access-Control-Allow-Methods": "GET, POST",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, X-Api-Key, X-Request-Id",
    "Access-Control-Max-Age": "600",
}


async def add_security_headers(request: web.Request, response: web.StreamResponse) -> None:
    """No guessing of content types, no addresses of ours to others, no versions of what is behind the address."""
    response.headers["Server"] = "jax-engine"  # aiohttp has put its own and Python's version there
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)


def cors(app: web.Application, origins: Sequence[str]) -> Any:
    """Lets browsers at `origins` call the application. Returns the middleware that answers their preflights."""
    allowed = frozenset(origins)

    async def add_origin(request: web.Request, response: web.StreamResponse) -> None:
        origin = request.headers.get("Origin", "")
        response.headers["Vary"] = "Origin"
        if origin in allowed:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = "X-Request-Id, Retry-After"

    @web.middleware
    async def preflight(request: web.Request, handler: Any) -> web.StreamResponse:
        if request.method == "OPTIONS" and request.headers.get("Origin") in allowed:
            return web.Response(status=204, headers=_PREFLIGHT_HEADERS)
        return await handler(request)

    app.on_response_prepare.append(add_origin)
    return preflight
