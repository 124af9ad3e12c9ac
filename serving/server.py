"""Runs the application on a port until a signal: the life of a server from `ready` to the last stream's end.

Called by the serve command. Owns the socket, the signals and the order of shutting down; knows no route.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from aiohttp import web

from jax_engine import ConfigError, EngineStopped
from serving.app import create_app
from serving.limits import Connections, raise_file_limit
from serving.loading import loading_app
from serving.observe import log_figures, measure_lag
from serving.options import ServerOptions
from serving.state import STATE, ServerState
from serving.trace import write_trace
from serving.watchdog import dump_stacks, watch

if TYPE_CHECKING:
    from jax_engine import AsyncEngine

log = logging.getLogger("serving")

#: Seconds that failed or aborted streams get to tell their clients.
_ABORT_GRACE_S = 2.0
_BACKLOG = 1024
#: Open files that are no client's: weights, compiled steps, logs.
_OTHER_FILES = 128
EXIT_FAILED = 1


def bind(options: ServerOptions) -> socket.socket:
    """Takes the port, without listening yet: a taken one is found before weights are loaded.

    Raises:
        ConfigError: the address is taken or is none.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise _cannot_listen(options.host, options.port, error) from None
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    reason = error.strerror or str(error)
    return ConfigError(f"cannot listen on {host}:{port}: {reason}; choose another with --port or --host")


def address(listener: socket.socket, options: ServerOptions | None = None) -> str:
    """The URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    scheme = "https" if options is not None and options.tls_cert_file is not None else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


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
        listener: bound; see `bind`.
        keys, admin: see create_app.

    Raises:
        ConfigError: the port was taken by another process in the meantime, or what `build` raises.
        EngineStopped: the engine died, or hung for longer than options.step_timeout_s.
    """
    stop = _stop_on_signals()
    loading = make_runner(loading_app(), options)
    await loading.setup()
    connections = Connections(_max_connections(options), loading.server)  # type: ignore[arg-type]
    try:
        acceptor = await asyncio.get_running_loop().create_server(
            connections, sock=listener, backlog=_BACKLOG, ssl=options.ssl_context()
        )
    except OSError as error:
        raise _cannot_listen(options.host, options.port, error) from None
    async with acceptor:
        log.info("listening on %s", address(listener, options))
        engine = await _loaded(build, stop)
        try:
            app = make_app(engine, options, keys, admin)
            runner = make_runner(app, options)
            await runner.setup()
            connections.target = runner.server  # type: ignore[assignment]
            await loading.cleanup()
            log.info("serving %s at %s", ", ".join(app[STATE].model_names), address(listener, options))
            try:
                await _serve(app[STATE], options, stop)
            finally:
                acceptor.close()
                await runner.cleanup()
        finally:
            engine.shutdown()
            _write_trace(engine, options)


def make_app(
    engine: "AsyncEngine", options: ServerOptions, keys: Sequence[str], admin: Sequence[str]
) -> web.Application:
    """The application that the operator asked for. See create_app."""
    return create_app(
        engine,
        served_model_names=options.served_model_name,
        api_keys=keys,
        admin_keys=admin,
        max_body_bytes=options.max_body_mib * 2**20,
        tool_call_parser=options.tool_call_parser,
        reasoning_parser=options.reasoning_parser,
        max_requests_per_client=options.max_requests_per_client,
        body_timeout_s=options.body_timeout_s,
        write_timeout_s=options.write_timeout_s,
        cors_origins=options.cors_origins,
        vllm_metrics=options.vllm_metrics,
        profile_dir=options.profile_dir,
        with_page=options.page,
    )


def _write_trace(engine: "AsyncEngine", options: ServerOptions) -> None:
    if options.trace_file is not None:
        try:
            write_trace(options.trace_file, engine.timeline.spans())
        except OSError as error:
            log.error("trace_file cannot be written: %s", error)


def make_runner(app: web.Application, options: ServerOptions) -> web.AppRunner:
    """What serves an application within the operator's limits."""
    return web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=logging.getLogger("aiohttp.access") if log.isEnabledFor(logging.DEBUG) else None,
        shutdown_timeout=_ABORT_GRACE_S,
        keepalive_timeout=options.idle_timeout_s,
        max_line_size=options.max_header_kib * 2**10,
        max_field_size=options.max_header_kib * 2**10,
    )


def _max_connections(options: ServerOptions) -> int:
    """As many as the operator allows and the system's limit on open files leaves room for."""
    allowed = raise_file_limit(options.max_connections + _OTHER_FILES) - _OTHER_FILES
    if allowed < options.max_connections:
        log.warning("the limit on open files leaves room for %d connections", allowed)
    return max(1, min(allowed, options.max_connections))


async def _loaded(build: Callable[[], "AsyncEngine"], stop: asyncio.Event) -> "AsyncEngine":
    building = asyncio.create_task(asyncio.to_thread(build))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([building, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not building.done():  # nobody waits for anything yet, and a compiling thread cannot be stopped
        log.info("stopped while loading")
        logging.shutdown()
        os._exit(128 + signal.SIGTERM)
    return building.result()


async def _serve(state: ServerState, options: ServerOptions, stop: asyncio.Event) -> None:
    """Until a signal comes or the engine fails."""
    watching = asyncio.create_task(watch(state.engine, options.step_timeout_s))
    stopping = asyncio.create_task(stop.wait())
    tasks = [watching, stopping, asyncio.create_task(measure_lag(state.metrics))]
    if options.log_interval_s:
        tasks.append(asyncio.create_task(log_figures(state, options.log_interval_s)))
    try:
        await asyncio.wait([watching, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not watching.done():
            state.draining = True
            draining = asyncio.create_task(drain(state, options.drain_timeout_s))
            await asyncio.wait([watching, draining], return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            await _give_up(state, watching.result())
    finally:
        for task in tasks:
            task.cancel()


async def _give_up(state: ServerState, reason: str) -> None:
    """Tells the running requests, then the operator.

    Raises:
        EngineStopped: always, unless the engine's thread hangs: then nothing can wait for it, and the process ends.
    """
    log.critical("%s; ending the process. What its threads are doing:", reason)
    hangs = state.engine.is_alive
    dump_stacks()
    state.engine.fail()
    await _until_all_told(state)
    if hangs:
        logging.shutdown()
        os._exit(EXIT_FAILED)
    raise EngineStopped(reason)


async def _until_all_told(state: ServerState) -> None:
    """Until the handlers of all requests have answered, but at most for a short grace."""
    deadline = asyncio.get_running_loop().time() + _ABORT_GRACE_S
    while state.live and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.01)


def _stop_on_signals() -> asyncio.Event:
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


async def drain(state: ServerState, timeout_s: float) -> None:
    """Takes no new requests, lets the running ones finish, then aborts those that did not in time."""
    state.draining = True
    log.info("shutting down: %d requests may finish within %.0f s", state.engine.num_requests, timeout_s)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s + 1.0):  # one second for the engine to keep its own promise
            await state.engine.drain(timeout_s)
    left = list(state.live)
    if left:
        log.warning("aborting %d requests that did not finish within %.0f s", len(left), timeout_s)
        for request_id in left:
            await state.engine.abort(request_id)
    await _until_all_told(state)
