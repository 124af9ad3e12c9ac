"""The port: bound before weights are loaded, answering that they are, then answering for the application.

Used by server.py and by each process of remote/. Owns sockets and connections; knows no route and no engine.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncGenerator

from aiohttp import web
from aiohttp.http import HttpProcessingError

from jax_engine import ConfigError
from serving.limits import Connections, raise_file_limit
from serving.loading import loading_app
from serving.options import ServerOptions

log = logging.getLogger("serving")

#: Seconds that failed or aborted streams get to tell their clients.
ABORT_GRACE_S = 2.0
_BACKLOG = 1024
#: Open files that are no client's: weights, compiled steps, logs.
_OTHER_FILES = 128
_MAX_FAULT_CHARS = 200


def _in_one_line(record: logging.LogRecord) -> bool:
    """What is no HTTP, or beyond the limits, is the client's fault: no traceback, with which it could fill a disk."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError):
        what = " ".join(error.message.split())
        record.levelno, record.levelname = logging.INFO, logging.getLevelName(logging.INFO)
        record.msg, record.exc_info = f"{record.msg}: %s", None
        record.args = (*(record.args or ()), what[:_MAX_FAULT_CHARS])
    return _connections_log.isEnabledFor(record.levelno)


_connections_log = logging.getLogger("serving.connections")
_connections_log.addFilter(_in_one_line)


def bind(options: ServerOptions) -> socket.socket:
    """Takes the port, without listening yet: a taken one is found before weights are loaded.

    Raises:
        ConfigError: the address is taken or is none.
    """
    return bind_all(options, 1)[0]


def bind_all(options: ServerOptions, count: int) -> list[socket.socket]:
    """Takes the port with several sockets, among which the system shares out the connections. They listen already:
    who connects waits until a process accepts.

    Raises:
        ConfigError: as for `bind`.
    """
    try:
        found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        first = _bound(found[0], found[4], shared=False)
        if count == 1:
            return [first]
        # A shared port can be taken twice without a word. So it was taken for one alone first, to see that it is free.
        taken = first.getsockname()
        first.close()
        with contextlib.ExitStack() as opened:
            listeners = [opened.enter_context(_bound(found[0], taken, shared=True)) for _ in range(count)]
            for listener in listeners:
                listener.listen(_BACKLOG)  # only from now on is the port taken for others
            opened.pop_all()
            return listeners
    except OSError as error:
        raise cannot_listen(options, error) from None


def _bound(family: int, address: tuple, *, shared: bool) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def cannot_listen(options: ServerOptions, error: OSError) -> ConfigError:
    """What to tell the operator."""
    reason = error.strerror or str(error)
    return ConfigError(
        f"cannot listen on {options.host}:{options.port}: {reason}; choose another with --port or --host"
    )


def address(listener: socket.socket, options: ServerOptions | None = None) -> str:
    """The URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    scheme = "https" if options is not None and options.tls_cert_file is not None else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class Front:
    """An open port."""

    def __init__(self, options: ServerOptions, connections: Connections, runner: web.AppRunner):
        self._options, self._connections, self._runner = options, connections, runner

    async def show(self, app: web.Application) -> None:
        """Lets `app` answer from now on."""
        before, self._runner = self._runner, make_runner(app, self._options)
        await self._runner.setup()
        self._connections.target = self._runner.server  # type: ignore[assignment]
        await before.cleanup()

    async def close(self) -> None:
        """Ends every connection, after a short grace for those that have something left to say."""
        await self._runner.cleanup()


@contextlib.asynccontextmanager
async def open_front(options: ServerOptions, listener: socket.socket) -> AsyncGenerator[Front]:
    """Listens, and says of everything that the model is being loaded.

    Args:
        listener: bound; see `bind`.

    Raises:
        ConfigError: the port was taken by another process in the meantime.
    """
    loading = make_runner(loading_app(), options)
    await loading.setup()
    connections = Connections(_max_connections(options), loading.server)  # type: ignore[arg-type]
    try:
        acceptor = await asyncio.get_running_loop().create_server(
            connections, sock=listener, backlog=_BACKLOG, ssl=options.ssl_context()
        )
    except OSError as error:
        raise cannot_listen(options, error) from None
    front = Front(options, connections, loading)
    try:
        yield front
    finally:
        acceptor.close()
        await front.close()


def make_runner(app: web.Application, options: ServerOptions) -> web.AppRunner:
    """What serves an application within the operator's limits."""
    return web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=logging.getLogger("aiohttp.access") if log.isEnabledFor(logging.DEBUG) else None,
        logger=_connections_log,
        shutdown_timeout=ABORT_GRACE_S,
        keepalive_timeout=options.idle_timeout_s,
        max_line_size=options.max_header_kib * 2**10,
        max_field_size=options.max_header_kib * 2**10,
    )


def _max_connections(options: ServerOptions) -> int:
    """As many as the operator allows and the system's limit on open files leaves room for."""
    wanted = -(-options.max_connections // max(1, options.api_processes))
    allowed = raise_file_limit(wanted + _OTHER_FILES) - _OTHER_FILES
    if allowed < wanted:
        log.warning("the limit on open files leaves room for %d connections", allowed)
    return max(1, min(allowed, wanted))
