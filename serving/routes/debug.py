"""GET /debug/engine and /debug/trace: what host and device did lately. Holds no text and no token ids.

The page draws the one; Perfetto (https://ui.perfetto.dev) opens the other.
"""

import asyncio
import dataclasses
import math
from typing import Any

from aiohttp import web

from jax_engine.engine_view import EngineView
from serving.errors import bad_request, json_response
from serving.state import STATE, ServerState
from serving.trace import chrome_trace, idle_spans

_MAX_SECONDS = 10.0
_MAX_CELLS = 1024
_FIGURES = (
    "wall_seconds",
    "steps",
    "generated_tokens",
    "batched_tokens",
    "padding_tokens",
    "preemptions",
    "compiles_after_ready",
    "device_idle_seconds",
)


def add_routes(router: web.UrlDispatcher) -> None:
    """Adds this file's addresses."""
    router.add_get("/debug/engine", engine)
    router.add_get("/debug/trace", trace)


async def engine(request: web.Request) -> web.Response:
    """The last `seconds` (default 2, at most 10) of the engine's life, and its state now.

    Spans and pages are those of one `replica` (default 0), all else is of all of them.
    """
    try:
        seconds = float(request.query.get("seconds", "2"))
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= _MAX_SECONDS:
        raise bad_request(f"seconds must be a number in (0, {_MAX_SECONDS:g}]", "seconds")
    state = request.app[STATE]
    view = await state.engine.view(seconds)
    asked, count = request.query.get("replica", "0"), len(view.replicas)
    if not asked.isdecimal() or int(asked) >= count:
        raise bad_request(f"replica must be an integer in [0, {count})", "replica")
    return json_response(await asyncio.to_thread(_picture, state, view, int(asked)))


async def trace(request: web.Request) -> web.Response:
    """Everything the timeline holds, as a file for Perfetto."""
    view = await request.app[STATE].engine.view(math.inf)
    response = json_response(await asyncio.to_thread(chrome_trace, view.replicas))
    response.headers["Content-Disposition"] = 'attachment; filename="jax-engine-trace.json"'
    return response


def _picture(state: ServerState, view: EngineView, number: int) -> dict[str, Any]:
    figures, limits, replica = view.figures, state.engine.limits, view.replicas[number]
    return {
        "now": view.now,
        "model": state.model_names[0],
        "draining": state.draining,
        "limits": {
            "max_num_seqs": limits.max_num_seqs,
            "max_num_batched_tokens": limits.max_num_batched_tokens,
            "max_model_len": limits.max_model_len,
            "page_size": limits.page_size,
            "scheduling": limits.scheduling,
        },
        "gauges": dataclasses.asdict(view.gauges),
        "num_replicas": len(view.replicas),
        "host": replica.host,
        "steps": [step._asdict() for step in replica.steps],
        "inflight": replica.inflight,
        "idle": idle_spans(replica.host, replica.steps),
        "figures": {name: figures[name] for name in _FIGURES},
        "histograms": {name: figures["histograms"][name] for name in ("time_to_first_token", "inter_token")},
        "pages": _pages(replica.pages),
    }


def _pages(references: list[int]) -> dict[str, Any]:
    """The pool as at most 1024 cells, each of as many pages; a cell tells how many of its pages are held, or, where it
    is one page, by how many sequences (-1: by the prefix cache alone)."""
    per_cell = -(-len(references) // _MAX_CELLS)
    if per_cell == 1:
        return {"per_cell": 1, "cells": references}
    cells = [
        sum(1 for count in references[first : first + per_cell] if count > 0)
        for first in range(0, len(references), per_cell)
    ]
    return {"per_cell": per_cell, "cells": cells}
