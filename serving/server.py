"""Runs the application on a port until a signal: the server whose engine and HTTP side are one process.

Called by the serve command. remote/supervisor.py is the one with processes for the HTTP side; life.py is what the two
have in common.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from serving.app import AppSettings, create_app
from serving.front import ABORT_GRACE_S, address, open_front
from serving.life import end, live, loaded, stop_on_signals
from serving.observe import measure_lag
from serving.options import ServerOptions
from serving.state import STATE, ServerState

if TYPE_CHECKING:
    from jax_engine import AsyncEngine

log = logging.getLogger("serving")


async def run_server(
    build: Callable[[], "AsyncEngine"],
    options: ServerOptions,
    listener: socket.socket,
    keys: Sequence[str] = (),
    admin: Sequence[str] = (),
) -> None:
    """Builds the engine, serves until SIGTERM or SIGINT, then drains. A second signal ends the process at once, as does
    the first one while the engine is being built.

    Args:
        build: makes the engine; called in a thread, while the port already answers that the model is being loaded.
        listener: bound; see front.bind.
        keys, admin: see AppSettings.

    Raises:
        ConfigError: the port was taken by another process in the meantime, or what `build` raises.
        EngineStopped: see life.live.
    """
    stop = stop_on_signals()
    async with open_front(options, listener) as front:
        log.info("listening on %s", address(listener, options))
        engine = await loaded(build, stop)
        try:
            app = create_app(engine, AppSettings.of(options, keys, admin))
            await front.show(app)
            state = app[STATE]
            log.info("serving %s at %s", ", ".join(state.model_names), address(listener, options))
            lag = asyncio.create_task(measure_lag(state.metrics))
            try:
                await live(engine, OwnClients(state, engine), options, stop)
            finally:
                lag.cancel()
                await front.close()
        finally:
            await end(engine, options)


class OwnClients:
    """The clients of this process; see life.Clients."""

    def __init__(self, state: ServerState, engine: "AsyncEngine"):
        self._state, self._engine = state, engine

    async def drain(self, timeout_s: float) -> None:
        """See life.Clients.drain."""
        state, engine = self._state, self._engine
        state.draining = True
        log.info("shutting down: %d requests may finish within %.0f s", engine.num_requests, timeout_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s + 1.0):  # one second for the engine to keep its own promise
                await engine.drain(timeout_s)
        left = list(state.live)
        if left:
            log.warning("aborting %d requests that did not finish within %.0f s", len(left), timeout_s)
            for request_id in left:
                await engine.abort(request_id)
        await self.tell_all(ABORT_GRACE_S)

    async def tell_all(self, grace_s: float) -> None:
        """See life.Clients.tell_all."""
        deadline = asyncio.get_running_loop().time() + grace_s
        while self._state.live and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
