"""GET /metrics: Prometheus' text format."""

from aiohttp import web

from serving.metrics import CONTENT_TYPE
from serving.state import STATE


def add_routes(router: web.UrlDispatcher) -> None:
    """Adds this file's address."""
    router.add_get("/metrics", metrics)


async def metrics(request: web.Request) -> web.Response:
    """All metrics of this server and its engine."""
    state = request.app[STATE]
    body = state.metrics.exposition(await state.engine.view())
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})
