"""create_app: the aiohttp application around one engine.

Called by server.py and by tests. Knows which routes there are and what stands before them, and nothing of what they do.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aiohttp import web

from serving.errors import error_middleware
from serving.keys import digests, key_middleware
from serving.limits import client_limits
from serving.metrics import ServerMetrics
from serving.observe import add_request_id, request_middleware
from serving.routes import ROUTES, page
from serving.security import add_security_headers, cors
from serving.state import STATE, ServerState
from serving.tools import formats

if TYPE_CHECKING:
    from jax_engine import AsyncEngine

MAX_BODY_BYTES = 16 * 2**20


def create_app(
    engine: "AsyncEngine",
    *,
    served_model_names: Sequence[str] = (),
    api_keys: Sequence[str] = (),
    admin_keys: Sequence[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    max_prompts: int = 1024,
    max_requests_per_client: int = 0,
    body_timeout_s: float = 60.0,
    write_timeout_s: float = 60.0,
    keep_alive_s: float = 15.0,
    tool_call_parser: str = "auto",
    reasoning_parser: str = "auto",
    cors_origins: Sequence[str] = (),
    vllm_metrics: bool = False,
    profile_dir: str | None = None,
    with_page: bool = True,
) -> web.Application:
    """The application; run it with `handler_cancellation=True`, or clients that leave go on costing.

    Args:
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
    """
    names = tuple(served_model_names) or (engine.model_name,)
    app = web.Application(client_max_size=max_body_bytes)
    app.middlewares.extend([request_middleware, error_middleware])
    if cors_origins:
        app.middlewares.append(cors(app, cors_origins))
    app.middlewares.append(key_middleware(digests(api_keys), digests(admin_keys)))
    app.middlewares.append(client_limits(body_timeout_s, max_requests_per_client))
    app[STATE] = ServerState(
        engine=engine,
        model_names=names,
        created=int(time.time()),
        metrics=ServerMetrics(engine, names[0], vllm_names=vllm_metrics),
        max_prompts=max_prompts,
        keep_alive_s=keep_alive_s,
        output_format=formats.detect(
            engine.tokenizer.chat_template if engine.tokenizer else None,
            tools=tool_call_parser,
            reasoning=reasoning_parser,
        ),
        write_timeout_s=write_timeout_s,
        profile_dir=profile_dir,
    )
    app.on_response_prepare.append(add_request_id)
    app.on_response_prepare.append(add_security_headers)
    for module in ROUTES:
        module.add_routes(app.router)
    if with_page:
        page.add_routes(app.router)
    return app
