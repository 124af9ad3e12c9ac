"""The server with --api_processes: starts them, builds the engine, restarts those that die, and ends all in order.

Called by the serve command, in the process that then holds the engine. An API process that dies takes its clients'
connections and requests with it, nothing else; one that does not come up ends the server.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING

from serving.front import ABORT_GRACE_S, address
from serving.keys import as_digest
from serving.life import end, live, loaded, stop_on_signals
from serving.metrics import SHARED_FOLDER
from serving.options import ServerOptions
from serving.remote import wire
from serving.remote.hub import Hub, Link

if TYPE_CHECKING:
    from jax_engine import AsyncEngine

log = logging.getLogger("serving")

#: Seconds without a sign of life after which an API process counts as hung.
_SILENCE_S = 60.0
#: Seconds between the death of an API process and its successor's start.
_PAUSE_S = 1.0
_POLL_S = 0.02
#: Seconds that an API process gets to tell its clients and to end.
_END_S = 3 * ABORT_GRACE_S


async def run_processes(
    build: Callable[[], "AsyncEngine"],
    options: ServerOptions,
    listeners: Sequence[socket.socket],
    keys: Sequence[str],
    admin: Sequence[str],
    log_level: str,
    log_format: str,
) -> None:
    """As server.run_server, with one API process per listener.

    Raises:
        ConfigError: what `build` raises.
        EngineStopped: see life.live; or an API process did not come up.
    """
    stop = stop_on_signals()
    api_keys, admin_keys = ([as_digest(key) for key in some] for some in (keys, admin))
    hub = Hub(wire.Setup(options, api_keys, admin_keys, log_level, log_format))
    with tempfile.TemporaryDirectory(prefix="jax-engine-metrics-") as folder:
        async with _processes(hub, listeners, folder) as failed:
            log.info("listening on %s", address(listeners[0], options))
            engine = await loaded(build, stop, lambda: shutil.rmtree(folder, ignore_errors=True))
            try:
                hub.show(engine)
                while hub.num_serving < len(listeners) and not failed.done() and not stop.is_set():
                    await asyncio.sleep(_POLL_S)
                names = ", ".join(options.served_model_name or (engine.model_name,))
                log.info("serving %s at %s", names, address(listeners[0], options))
                await live(engine, hub, options, stop, failed)
            finally:
                await end(engine, options)


@contextlib.asynccontextmanager
async def _processes(hub: Hub, listeners: Sequence[socket.socket], folder: str) -> AsyncGenerator[asyncio.Future[str]]:
    """Keeps one API process per listener. The future is set to the reason when that cannot be done."""
    failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    keepers = [asyncio.create_task(_keep(hub, listener, folder, failed)) for listener in listeners]
    try:
        yield failed
    finally:
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)


async def _keep(hub: Hub, listener: socket.socket, folder: str, failed: asyncio.Future[str]) -> None:
    """Starts an API process, and another one whenever it has ended."""
    while True:
        link, process = await _start(hub, listener, folder)
        silent = asyncio.create_task(_silence(link))
        try:
            await asyncio.wait([asyncio.ensure_future(link.ended.wait()), silent], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            link.channel.close()
            await asyncio.to_thread(_end, process, _END_S)
            raise
        finally:
            silent.cancel()
        link.channel.abort()
        await asyncio.to_thread(_end, process, 0.0)
        log.error("an API process (%d) has ended with exit code %s", process.pid, process.returncode)
        if not link.serving.is_set() and hub.engine is not None and not failed.done():
            failed.set_result("an API process has ended before it served")
            return
        await asyncio.sleep(_PAUSE_S)


async def _start(hub: Hub, listener: socket.socket, folder: str) -> tuple[Link, subprocess.Popen[bytes]]:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "serving.remote.worker", str(theirs.fileno()), str(listener.fileno())],
            pass_fds=(theirs.fileno(), listener.fileno()),
            env=os.environ | {SHARED_FOLDER: folder},
            stdin=subprocess.DEVNULL,
        )
    link = Link(hub)
    await asyncio.get_running_loop().create_unix_connection(lambda: link.channel, sock=ours)
    hub.greet(link)
    return link, process


async def _silence(link: Link) -> None:
    """Returns when the process has given no sign of life for too long."""
    while time.monotonic() - link.heard < _SILENCE_S:
        await asyncio.sleep(1.0)
    log.error("an API process has not been heard of for %.0f s", _SILENCE_S)


def _end(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Waits for the process, and ends it if it takes too long."""
    try:
        process.wait(timeout_s or 0.1)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
