"""What the server says about itself while it runs: request ids, counts of answers, loop lag, a line of figures.

`request_middleware` is the outermost middleware of app.create_app; the two loops are run by server.py. Never looks into
requests.
"""

import asyncio
import logging
import re
import uuid
from typing import Any

from aiohttp import web

from jax_engine.engine_view import EngineView
from serving import logs, tracing
from serving.engine_client import EngineClient
from serving.metrics import ServerMetrics
from serving.state import STATE

log = logging.getLogger("serving")

REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)
REQUEST_ID_HEADER = "X-Request-Id"
_SAFE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_LAG_INTERVAL_S = 0.25


@web.middleware
async def request_middleware(request: web.Request, handler: Any) -> web.StreamResponse:
    """Gives each request an id (the client's own, where it sent a harmless one) and counts the answers."""
    given = request.headers.get(REQUEST_ID_HEADER, "")
    request[REQUEST_ID] = identifier = given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
    token, parent = logs.request_id.set(identifier), tracing.headers.set(request.headers)
    status = "499"  # the client left
    try:
        response = await handler(request)
        status = str(response.status)
        return response
    finally:
        logs.request_id.reset(token)
        tracing.headers.reset(parent)
        request.app[STATE].metrics.http_requests.labels(_route(request), status).inc()


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """Puts the id into the answer's head."""
    if REQUEST_ID in request:
        response.headers[REQUEST_ID_HEADER] = request[REQUEST_ID]


def _route(request: web.Request) -> str:
    """The address as it was registered: one label per route, whatever clients ask for."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "unknown"


async def measure_lag(metrics: ServerMetrics) -> None:
    """Observes for ever how late the event loop is."""
    loop = asyncio.get_running_loop()
    while True:
        wanted = loop.time() + _LAG_INTERVAL_S
        await asyncio.sleep(_LAG_INTERVAL_S)
        metrics.loop_lag.observe(max(0.0, loop.time() - wanted))


async def log_figures(engine: EngineClient, interval_s: float) -> None:
    """Writes a line every `interval_s` seconds in which the engine had work."""
    before = await engine.view()
    while True:
        await asyncio.sleep(interval_s)
        now = await engine.view()
        if now.figures["steps"] != before.figures["steps"] or now.num_requests:
            log.info(figures(before.figures, now))
        before = now


def figures(before: dict[str, Any], view: EngineView) -> str:
    """One line about what has happened since `before`."""
    now, gauges = view.figures, view.gauges
    seconds = max(1e-9, now["wall_seconds"] - before["wall_seconds"])

    def rate(name: str, kind: str | None = None) -> float:
        later, earlier = (snapshot[name] if kind is None else snapshot[name][kind] for snapshot in (now, before))
        return (later - earlier) / seconds

    idle = {cause: rate("device_idle_seconds", cause) for cause in now["device_idle_seconds"]}
    others = sum(share for cause, share in idle.items() if cause != "no_work")
    idle["no_work"] = min(idle["no_work"], max(0.0, 1 - others))  # counted when it ends: it may have begun before
    batched = rate("batched_tokens")
    padding = rate("padding_tokens") / batched if batched else 0.0
    causes = ", ".join(f"{cause} {share:.0%}" for cause, share in idle.items() if share >= 0.005)
    return (
        f"running {gauges.running}, waiting {gauges.waiting}, KV {gauges.used_pages / gauges.num_pages:.0%}; "
        f"prompt {rate('tokens_by_kind', 'prompt'):.0f} tok/s, output {rate('generated_tokens'):.0f} tok/s, "
        f"{rate('steps'):.1f} steps/s, padding {padding:.0%}; "
        f"device idle {sum(idle.values()):.0%}" + (f" ({causes})" if causes else "")
    )
