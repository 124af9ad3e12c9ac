"""API keys: kept as SHA-256 digests, compared in constant time, asked for before anything else is looked at.

Used by app.create_app as a middleware. Plain keys are forgotten once they are hashed; nothing logs them.
"""

import hashlib
import hmac
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from serving.errors import ApiError

#: Answered without a key: what load balancers and probes ask, and the page's files, which hold no secret.
PUBLIC_PATHS = frozenset({"/", "/health", "/ready", "/version"})
PUBLIC_PREFIXES = ("/page/",)
ADMIN_PREFIX = "/admin/"

#: Who sent a request: a few digits of its key's digest, or its address where no keys are configured.
CLIENT: web.RequestKey[str] = web.RequestKey("client", str)


def digests(keys: Sequence[str]) -> tuple[bytes, ...]:
    """SHA-256 of each key; one written as sha256:HEX is a digest already."""
    return tuple(
        bytes.fromhex(key.removeprefix("sha256:"))
        if key.startswith("sha256:")
        else hashlib.sha256(key.encode()).digest()
        for key in keys
    )


def as_digest(key: str) -> str:
    """A key as sha256:HEX, whichever way it is written."""
    return f"sha256:{digests([key])[0].hex()}"


def key_middleware(api: Sequence[bytes], admin: Sequence[bytes]) -> Any:
    """Asks for `Authorization: Bearer KEY` (or `x-api-key: KEY`) where keys are configured.

    Args:
        api: digests of the accepted keys; none means that everybody is let in.
        admin: digests of the keys for addresses under /admin/, which do not exist without one.
    """

    @web.middleware
    async def check(request: web.Request, handler: Any) -> web.StreamResponse:
        given = _digest(request)
        request[CLIENT] = given.hex()[:12] if api and given else (request.remote or "unknown")
        if request.path.startswith(ADMIN_PREFIX):
            if not admin:
                raise web.HTTPNotFound
            _check(given, admin, "An admin key")
        elif api and request.path not in PUBLIC_PATHS and not request.path.startswith(PUBLIC_PREFIXES):
            _check(given, api, "A valid API key")
        return await handler(request)

    return check


def _check(given: bytes, accepted: Sequence[bytes], what: str) -> None:
    """Takes a time that depends neither on the key nor on which one matches."""
    if not sum([hmac.compare_digest(given, digest) for digest in accepted]):
        raise ApiError(401, f"{what} is needed: send the header `Authorization: Bearer KEY`.", code="invalid_api_key")


def _digest(request: web.Request) -> bytes:
    """SHA-256 of the key that came with a request; empty if none did."""
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        key = request.headers.get("x-api-key", "")  # Anthropic's clients
    key = key.strip()
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest() if key else b""
