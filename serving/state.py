"""ServerState: what all routes share about one running server, and the checks that stand before a request.

Made by app.create_app, read by routes, written by server.py when it drains.
"""

from dataclasses import dataclass, field

from aiohttp import web

from serving.engine_client import EngineClient
from serving.errors import ApiError, unavailable
from serving.metrics import ServerMetrics
from serving.tools.formats import OutputFormat
from serving.tracing import Tracing


@dataclass
class ServerState:
    """One server.

    Attributes:
        model_names: the names clients may ask for; the first is the one in answers that ask for none.
        metrics: what /metrics exports.
        max_prompts: most prompts in one request.
        keep_alive_s: silence after which a stream gets a comment.
        write_timeout_s: how long a client may leave no room for more of a stream.
        draining: no new requests are taken.
        live: request ids now in the engine.
        output_format: how the model writes tool calls and reasoning.
        profile_dir: where /admin/start_profile writes; None where it is off.
        tracing: where spans go; None where tracing is off.
    """

    engine: EngineClient
    model_names: tuple[str, ...]
    created: int
    metrics: ServerMetrics
    max_prompts: int = 1024
    keep_alive_s: float = 15.0
    write_timeout_s: float = 60.0
    draining: bool = False
    live: set[str] = field(default_factory=set)
    output_format: OutputFormat = field(default_factory=OutputFormat)
    profile_dir: str | None = None
    tracing: Tracing | None = None

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
