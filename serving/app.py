"""create_app: the aiohttp application around one engine.

Called by server.py and by tests. Knows which routes there are, and nothing of what they do.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aiohttp import web

from serving.errors import error_middleware
from serving.routes import ROUTES
from serving.state import STATE, ServerState, digests, key_middleware
from serving.tools import formats

if TYPE_CHECKING:
    from jax_engine import AsyncEngine

MAX_BODY_BYTES = 16 * 2**20


def create_app(
    engine: "AsyncEngine",
    *,
    served_model_names: Sequence[str] = (),
    api_keys: Sequence[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    max_prompts: int = 1024,
    keep_alive_s: float = 15.0,
    tool_call_parser: str = "auto",
    reasoning_parser: str = "auto",
) -> web.Application:
    """The application; run it with `handler_cancellation=True`, or clients that leave go on costing.

    Args:
        served_model_names: what clients may call the model; the engine's own name when empty.
        api_keys: accepted keys; none means that everybody is let in.
        max_body_bytes: of one request.
        max_prompts: in one request.
        keep_alive_s: silence after which a stream gets a comment.
        tool_call_parser, reasoning_parser: how the model writes them; see tools.formats.detect.
    """
    app = web.Application(middlewares=[error_middleware, key_middleware], client_max_size=max_body_bytes)
    app[STATE] = ServerState(
        engine=engine,
        model_names=tuple(served_model_names) or (engine.model_name,),
        created=int(time.time()),
        key_digests=digests(api_keys),
        max_prompts=max_prompts,
        keep_alive_s=keep_alive_s,
        output_format=formats.detect(
            engine.tokenizer.chat_template if engine.tokenizer else None,
            tools=tool_call_parser,
            reasoning=reasoning_parser,
        ),
    )
    for module in ROUTES:
        module.add_routes(app.router)
    return app
