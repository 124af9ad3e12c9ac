"""create_app: the aiohttp application around one engine.

Called by server.py, by each process of remote/, and by tests. Knows which routes there are and what stands before them,
and nothing of what they do.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp import web

from serving.engine_client import EngineClient
from serving.errors import error_middleware
from serving.keys import digests, key_middleware
from serving.limits import ClientSlots, Slots, client_limits
from serving.metrics import ServerMetrics
from serving.observe import add_request_id, request_middleware
from serving.options import ServerOptions
from serving.routes import ROUTES, page
from serving.security import add_security_headers, cors
from serving.state import STATE, ServerState
from serving.tools import formats
from serving.tracing import Tracing


@dataclass(frozen=True, kw_only=True)
class AppSettings:
    """What an application is told. `of` makes it of the operator's options.

    Attributes:
        served_model_names: what clients may call the model; the engine's own name when empty.
        api_keys: accepted keys; none means that everybody is let in.
        admin_keys: keys for the addresses under /admin/; none means that there are no such addresses.
        max_body_bytes: of one request.
        max_prompts: in one request.
        max_requests_per_client: at a time; 0 for no limit.
        body_timeout_s: for a request's body to arrive. write_timeout_s: for a client to make room for more of a stream.
        keep_alive_s: silence after which a stream gets a comment.
        tool_call_parser, reasoning_parser: how the model writes them; see tools.formats.detect.
        cors_origins: web origins that may call from a browser.
        vllm_metrics: export metrics under vLLM's names too.
        profile_dir: where profiles are written; None switches profiling off.
        with_page: serve the page at /.
        otel: send a span of each request; see tracing.Tracing.
    """

    served_model_names: Sequence[str] = ()
    api_keys: Sequence[str] = ()
    admin_keys: Sequence[str] = ()
    max_body_bytes: int = 16 * 2**20
    max_prompts: int = 1024
    max_requests_per_client: int = 0
    body_timeout_s: float = 60.0
    write_timeout_s: float = 60.0
    keep_alive_s: float = 15.0
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    cors_origins: Sequence[str] = ()
    vllm_metrics: bool = False
    profile_dir: str | None = None
    with_page: bool = True
    otel: bool = False

    @classmethod
    def of(cls, options: ServerOptions, api_keys: Sequence[str], admin_keys: Sequence[str]) -> "AppSettings":
        """The operator's choices."""
        same = ("max_requests_per_client", "body_timeout_s", "write_timeout_s", "tool_call_parser", "reasoning_parser")
        same += ("cors_origins", "vllm_metrics", "profile_dir", "otel")
        return cls(
            served_model_names=options.served_model_name,
            api_keys=api_keys,
            admin_keys=admin_keys,
            max_body_bytes=options.max_body_mib * 2**20,
            with_page=options.page,
            **{name: getattr(options, name) for name in same},
        )


def create_app(
    engine: EngineClient, settings: AppSettings | None = None, slots: Slots | None = None
) -> web.Application:
    """The application; run it with `handler_cancellation=True`, or clients that leave go on costing.

    Args:
        slots: counts each client's requests, where several applications do so together.
    """
    settings = settings or AppSettings()
    app = web.Application(client_max_size=settings.max_body_bytes)
    app.middlewares.extend([request_middleware, error_middleware])
    if settings.cors_origins:
        app.middlewares.append(cors(app, settings.cors_origins))
    app.middlewares.append(key_middleware(digests(settings.api_keys), digests(settings.admin_keys)))
    slots = slots or ClientSlots(settings.max_requests_per_client)
    app.middlewares.append(client_limits(settings.body_timeout_s, slots))
    app[STATE] = _state(engine, settings)
    app.on_response_prepare.append(add_request_id)
    app.on_response_prepare.append(add_security_headers)
    for module in ROUTES:
        module.add_routes(app.router)
    if settings.with_page:
        page.add_routes(app.router)
    app.on_cleanup.append(_send_traces)
    return app


async def _send_traces(app: web.Application) -> None:
    tracing = app[STATE].tracing
    if tracing is not None:
        await asyncio.to_thread(tracing.shutdown)


def _state(engine: EngineClient, settings: AppSettings) -> ServerState:
    names = tuple(settings.served_model_names) or (engine.model_name,)
    return ServerState(
        engine=engine,
        model_names=names,
        created=int(time.time()),
        metrics=ServerMetrics(names[0], vllm_names=settings.vllm_metrics),
        max_prompts=settings.max_prompts,
        keep_alive_s=settings.keep_alive_s,
        output_format=formats.detect(
            engine.tokenizer.chat_template if engine.tokenizer else None,
            tools=settings.tool_call_parser,
            reasoning=settings.reasoning_parser,
        ),
        write_timeout_s=settings.write_timeout_s,
        profile_dir=settings.profile_dir,
        tracing=Tracing() if settings.otel else None,
    )
