"""Bounds on what one client may take of the server: connections, slow bodies, requests at a time, header sizes.

Used by app.create_app (`client_limits`) and server.py (`Connections`). Bounds on bodies' content are in schema.py and
SamplingParams, those on the queue in the engine.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any, Protocol

import msgspec
from aiohttp import web

from serving.errors import ApiError, unavailable
from serving.keys import CLIENT

log = logging.getLogger("serving")


class ClientSlots:
    """Counts each client's POST requests at a time.

    Args:
        limit: of one client; 0 for none.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._running: Counter[str] = Counter()

    def enter(self, client: str) -> bool:
        """Counts one more, unless there are too many."""
        if self._limit and self._running[client] >= self._limit:
            return False
        self._running[client] += 1
        return True

    def leave(self, client: str) -> None:
        """Counts one less."""
        self._running[client] -= 1
        if not self._running[client]:
            del self._running[client]

    @contextlib.asynccontextmanager
    async def slot(self, client: str) -> AsyncGenerator[None]:
        """Holds a place for one request.

        Raises:
            ApiError: 429, the client has too many already.
        """
        if not self.enter(client):
            raise too_many_requests(self._limit)
        try:
            yield
        finally:
            self.leave(client)


class Slots(Protocol):
    """Where clients' requests are counted: here, or in another process for several servers together."""

    def slot(self, client: str) -> contextlib.AbstractAsyncContextManager[None]:
        """See ClientSlots.slot."""
        ...


def too_many_requests(limit: int) -> ApiError:
    """Status 429 of a client that has `limit` requests running."""
    return ApiError(
        429,
        f"This client has {limit} requests running; no more are allowed at a time.",
        type="rate_limit_error",
        code="too_many_requests",
        retry_after=1.0,
    )


def client_limits(body_timeout_s: float, slots: Slots) -> Any:
    """A middleware that reads the body, for at most `body_timeout_s` seconds, and counts each client's requests."""

    @web.middleware
    async def check(request: web.Request, handler: Any) -> web.StreamResponse:
        if request.method != "POST":
            return await handler(request)
        async with slots.slot(request[CLIENT]):
            await _read_body(request, body_timeout_s)
            return await handler(request)

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
