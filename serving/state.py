"""ServerState: what all routes share about one running server, and the two checks that stand before every request.

Made by app.create_app, read by routes, written by server.py when it drains.
"""

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aiohttp import web

from serving.errors import ApiError, unavailable
from serving.tools.formats import OutputFormat

if TYPE_CHECKING:
    from jax_engine import AsyncEngine

#: Answered without a key: what load balancers and probes ask.
PUBLIC_PATHS = frozenset({"/health", "/version"})


@dataclass
class ServerState:
    """One server.

    Attributes:
        model_names: the names clients may ask for; the first is the one in answers that ask for none.
        key_digests: SHA-256 of the accepted API keys; empty means that no key is asked for.
        max_prompts: most prompts in one request.
        keep_alive_s: silence after which a stream gets a comment.
        draining: no new requests are taken.
        live: request ids now in the engine.
        output_format: how the model writes tool calls and reasoning.
    """

    engine: "AsyncEngine"
    model_names: tuple[str, ...]
    created: int
    key_digests: tuple[bytes, ...] = ()
    max_prompts: int = 1024
    keep_alive_s: float = 15.0
    draining: bool = False
    live: set[str] = field(default_factory=set)
    output_format: OutputFormat = field(default_factory=OutputFormat)

    def check_open(self) -> None:
        """Raises ApiError 503 when no request can be taken."""
        if self.draining:
            raise unavailable("The server is shutting down.", "draining")
        if not self.engine.is_alive:
            raise unavailable("The engine has stopped.", "engine_stopped")

    def check_model(self, name: str | None) -> str:
        """The served name that was asked for.

        Raises:
            ApiError: 404, there is no such model here.
        """
        if name is None:
            return self.model_names[0]
        if name not in self.model_names:
            raise ApiError(
                404,
                f"The model {name[:200]!r} does not exist; served: {', '.join(self.model_names)}.",
                param="model",
                code="model_not_found",
            )
        return name


STATE: web.AppKey[ServerState] = web.AppKey("state", ServerState)


def digests(keys: Sequence[str]) -> tuple[bytes, ...]:
    """SHA-256 of each key."""
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)


@web.middleware
async def key_middleware(request: web.Request, handler: Any) -> web.StreamResponse:
    """Asks for `Authorization: Bearer KEY` where keys are configured."""
    state = request.app[STATE]
    if state.key_digests and request.path not in PUBLIC_PATHS:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not _accepted(key.strip(), state.key_digests):
            message = "A valid API key is needed: send the header `Authorization: Bearer KEY`."
            raise ApiError(401, message, code="invalid_api_key")
    return await handler(request)


def _accepted(key: str, accepted: Sequence[bytes]) -> bool:
    """Compares in a time that depends neither on the key nor on which one matches."""
    given = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return sum([hmac.compare_digest(given, digest) for digest in accepted]) > 0
