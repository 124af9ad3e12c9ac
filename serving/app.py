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
) -> web.Application:
    """The application; run it with `handler_cancellation=True`, or clients that leave go on costing.

    Args:
        served_model_names: what clients may call the model; the engine's own name when empty.
        api_keys: accepted keys; none means that everybody is let in.
        max_body_bytes: of one request.
        max_prompts: in one request.
        keep_alive_s: silence after which a stream gets a comment.
    """
    app = web.Application(middlewares=[error_middleware, key_middleware], client_max_size=max_body_bytes)
    app[STATE] = ServerState(
        engine=engine,
        model_names=tuple(served_model_names) or (engine.model_name,),
        created=int(time.time()),
        key_digests=digests(api_keys),
        max_prompts=max_prompts,
        keep_alive_s=keep_alive_s,
    )
    for module in ROUTES:
        module.add_routes(app.router)
    return app
