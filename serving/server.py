"""Runs the application on a port until a signal: the life of a server from `ready` to the last stream's end.

Called by the serve command. Owns the socket, the signals and the order of shutting down; knows no route.
"""

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aiohttp import web

from jax_engine import ConfigError
from serving.app import MAX_BODY_BYTES, create_app
from serving.state import STATE, ServerState
from serving.tools.formats import REASONING_MARKS, TOOL_FORMATS

if TYPE_CHECKING:
    from jax_engine import AsyncEngine

log = logging.getLogger("serving")

#: Seconds that aborted streams get to tell their clients.
_ABORT_GRACE_S = 2.0
_BACKLOG = 1024


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """The operator's choices about the server, as against the engine.

    Every field is a flag of `jax-engine serve`.

    Raises:
        ConfigError: a value is out of range.
    """

    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 for all."})
    port: int = field(default=8000, metadata={"help": "Port to listen on; 0 for any free one."})
    served_model_name: tuple[str, ...] = field(
        default=(), metadata={"help": "Names that clients may use for the model. Default: the model's own."}
    )
    api_key_file: str | None = field(
        default=None, metadata={"help": "File of accepted API keys, one per line; also JAX_ENGINE_API_KEY."}
    )
    drain_timeout_s: float = field(
        default=30.0, metadata={"help": "Seconds that running requests may go on after SIGTERM."}
    )
    max_body_mib: int = field(default=MAX_BODY_BYTES // 2**20, metadata={"help": "Largest request body, in MiB."})

    tool_call_parser: str = field(
        default="auto",
        metadata={"help": "How the model writes tool calls: auto (by its chat template), none, hermes, ..."},
    )
    reasoning_parser: str = field(
        default="auto", metadata={"help": "How the model marks its reasoning: auto, none, think (<think>), mistral."}
    )

    def __post_init__(self) -> None:
        for name, allowed in (("tool_call_parser", TOOL_FORMATS), ("reasoning_parser", REASONING_MARKS)):
            if getattr(self, name) not in ("auto", "none", *allowed):
                raise ConfigError(f"{name} must be auto, none, {', '.join(allowed)}; got {getattr(self, name)!r}")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be in [0, 65535], got {self.port}")
        if not 0 <= self.drain_timeout_s < math.inf:
            raise ConfigError(f"drain_timeout_s must be finite and at least 0, got {self.drain_timeout_s}")
        if self.max_body_mib < 1:
            raise ConfigError(f"max_body_mib must be at least 1, got {self.max_body_mib}")


def api_keys(options: ServerOptions) -> list[str]:
    """The accepted keys, from the environment and the file.

    Raises:
        ConfigError: the file cannot be read or holds no key.
    """
    keys = [key] if (key := os.environ.get("JAX_ENGINE_API_KEY", "").strip()) else []
    if options.api_key_file is not None:
        try:
            with open(options.api_key_file, encoding="utf-8") as lines:
                found = [line.strip() for line in lines]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"api_key_file cannot be read: {error}") from None
        found = [line for line in found if line and not line.startswith("#")]
        if not found:
            raise ConfigError(f"api_key_file {options.api_key_file} holds no key")
        keys += found
    return keys


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


def address(listener: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def run_server(
    engine: "AsyncEngine", options: ServerOptions, listener: socket.socket, keys: Sequence[str] = ()
) -> None:
    """Serves until SIGTERM or SIGINT, then drains. A second signal ends the process at once.

    Raises:
        ConfigError: the port was taken by another process in the meantime.
    """
    app = create_app(
        engine,
        served_model_names=options.served_model_name,
        api_keys=keys,
        max_body_bytes=options.max_body_mib * 2**20,
        tool_call_parser=options.tool_call_parser,
        reasoning_parser=options.reasoning_parser,
    )
    access_log = logging.getLogger("aiohttp.access") if log.isEnabledFor(logging.DEBUG) else None
    runner = web.AppRunner(app, handler_cancellation=True, access_log=access_log, shutdown_timeout=_ABORT_GRACE_S)
    await runner.setup()
    try:
        try:
            await web.SockSite(runner, listener, backlog=_BACKLOG).start()
        except OSError as error:
            raise _cannot_listen(options.host, options.port, error) from None
        stop = _stop_on_signals()
        log.info("serving %s at %s", ", ".join(app[STATE].model_names), address(listener))
        await stop.wait()
        await drain(app[STATE], options.drain_timeout_s)
    finally:
        await runner.cleanup()


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
    deadline = asyncio.get_running_loop().time() + _ABORT_GRACE_S
    while state.live and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.01)
