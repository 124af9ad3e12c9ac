"""From ready to the end: signals, the watch over the engine, the figures in the log, and the order of shutting down.

Used by server.py, where one process does it all, and by remote/supervisor.py, where others serve. Owns no socket.
"""

import asyncio
import logging
import math
import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from jax_engine import EngineStopped
from serving.front import ABORT_GRACE_S
from serving.observe import log_figures
from serving.options import ServerOptions
from serving.trace import write_trace
from serving.watchdog import dump_stacks, watch

if TYPE_CHECKING:
    from jax_engine import AsyncEngine

log = logging.getLogger("serving")

EXIT_FAILED = 1


class Clients(Protocol):
    """Those who have requests in the engine."""

    async def drain(self, timeout_s: float) -> None:
        """Takes no new requests, lets the running ones finish, then aborts those that did not in time."""
        ...

    async def tell_all(self, grace_s: float) -> None:
        """Waits until all requests are answered, but at most `grace_s` seconds."""
        ...


def stop_on_signals() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; the second ends the process."""
    stop = asyncio.Event()

    def on_signal(number: int) -> None:
        if stop.is_set():
            log.warning("second signal: ending at once")
            logging.shutdown()
            os._exit(128 + number)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return stop


async def loaded(
    build: Callable[[], "AsyncEngine"], stop: asyncio.Event, before_exit: Callable[[], None] | None = None
) -> "AsyncEngine":
    """Builds the engine in a thread; a signal meanwhile ends the process at once."""
    building = asyncio.create_task(asyncio.to_thread(build))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([building, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not building.done():  # nobody waits for anything yet, and a compiling thread cannot be stopped
        log.info("stopped while loading")
        if before_exit is not None:
            before_exit()
        logging.shutdown()
        os._exit(128 + signal.SIGTERM)
    return building.result()


async def live(
    engine: "AsyncEngine",
    clients: Clients,
    options: ServerOptions,
    stop: asyncio.Event,
    failed: asyncio.Future[str] | None = None,
) -> None:
    """Until a signal comes, which lets the running requests finish; or until the engine fails, or `failed` is set.

    Raises:
        EngineStopped: the engine died, or hung for longer than options.step_timeout_s, or `failed` says why.
    """
    watching = asyncio.ensure_future(watch(engine, options.step_timeout_s))
    stopping = asyncio.ensure_future(stop.wait())
    ends = [watching] if failed is None else [watching, failed]
    tasks: list[asyncio.Future] = [watching, stopping]
    if options.log_interval_s:
        tasks.append(asyncio.ensure_future(log_figures(engine, options.log_interval_s)))
    try:
        await asyncio.wait([*ends, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not any(end.done() for end in ends):
            draining = asyncio.ensure_future(clients.drain(options.drain_timeout_s))
            tasks.append(draining)
            await asyncio.wait([*ends, draining], return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            if end.done():
                await _give_up(engine, clients, end.result(), hangs=end is watching and engine.is_alive)
    finally:
        for task in tasks:
            task.cancel()


async def _give_up(engine: "AsyncEngine", clients: Clients, reason: str, *, hangs: bool) -> None:
    """Tells the running requests, then the operator.

    Raises:
        EngineStopped: always, unless the engine's thread hangs: then nothing can wait for it, and the process ends.
    """
    log.critical("%s; ending the process. What its threads are doing:", reason)
    dump_stacks()
    engine.fail()
    await clients.tell_all(ABORT_GRACE_S)
    if hangs:
        logging.shutdown()
        os._exit(EXIT_FAILED)
    raise EngineStopped(reason)


async def end(engine: "AsyncEngine", options: ServerOptions) -> None:
    """Stops the engine and writes what the operator wants to keep."""
    engine.shutdown()
    if options.trace_file is not None:
        view = await engine.view(math.inf)
        try:
            write_trace(options.trace_file, view.replicas)
        except OSError as error:
            log.error("trace_file cannot be written: %s", error)
