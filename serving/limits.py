"""Bounds on what one client may take of the server: connections, slow bodies, requests at a time, header sizes.

Used by app.create_app (`client_limits`) and server.py (`Connections`). Bounds on bodies' content are in schema.py and
SamplingParams, those on the queue in the engine.
"""

import asyncio
import logging
from collections import Counter
from typing import Any

import msgspec
from aiohttp import web

from serving.errors import ApiError, unavailable
from serving.keys import CLIENT

log = logging.getLogger("serving")


def client_limits(body_timeout_s: float, max_requests_per_client: int) -> Any:
    """A middleware that reads the body, for at most `body_timeout_s` seconds, and counts each client's requests.

    Args:
        max_requests_per_client: POST requests of one client at a time; 0 for no limit.
    """
    running: Counter[str] = Counter()

    @web.middleware
    async def check(request: web.Request, handler: Any) -> web.StreamResponse:
        if request.method != "POST":
            return await handler(request)
        client = request[CLIENT]
        if max_requests_per_client and running[client] >= max_requests_per_client:
            raise ApiError(
                429,
                f"This client has {running[client]} requests running; {max_requests_per_client} are allowed at a time.",
                type="rate_limit_error",
                code="too_many_requests",
                retry_after=1.0,
            )
        running[client] += 1
        try:
            await _read_body(request, body_timeout_s)
            return await handler(request)
        finally:
            running[client] -= 1
            if not running[client]:
                del running[client]

    return check


async def _read_body(request: web.Request, timeout_s: float) -> None:
    """Reads the body, which aiohttp keeps for the handler."""
    try:
        async with asyncio.timeout(timeout_s or None):
            await request.read()
    except TimeoutError:
        raise ApiError(
            408, f"The body did not arrive within {timeout_s:g} s.", code="request_timeout", retry_after=1.0
        ) from None


class Connections:
    """Makes a protocol for each new connection; the one over the limit is answered 503 and closed.

    Attributes:
        target: makes the protocols; may be exchanged while connections come in.
    """

    def __init__(self, max_connections: int, target: web.Server):
        self.target = target
        self._max = max_connections
        self._refused = 0

    def __call__(self) -> asyncio.Protocol:
        if len(self.target.connections) < self._max:
            return self.target()
        self._refused += 1
        if self._refused & (self._refused - 1) == 0:  # at the 1st, 2nd, 4th, 8th ...
            log.warning("%d connections were refused; max_connections is %d", self._refused, self._max)
        return _Refusal()


class _Refusal(asyncio.Protocol):
    """Says that there are too many connections, without reading what the client has to say."""

    def connection_made(self, transport: Any) -> None:
        error = unavailable("Too many connections are open; try again later.", "too_many_connections")
        body = msgspec.json.encode(error.body())
        head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        head += f"Retry-After: {error.retry_after:.0f}\r\nConnection: close\r\n\r\n"
        transport.write(head.encode() + body)
        transport.close()


def raise_file_limit(wanted: int) -> int:
    """Lets the process open `wanted` files, as far as it may. Returns how many it may open."""
    import resource  # not there on Windows, where nothing of this applies

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft
