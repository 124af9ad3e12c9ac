"""An API process: `python -m serving.remote.worker ENGINE_FD LISTENER_FD`, started by supervisor.py.

Serves HTTP until the connection to the engine's process ends, which is also how it is told to go. Signals are the
engine process's matter: a terminal or a service manager may send them to all. Never imports jax.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from typing import Any

from serving import logs
from serving.app import AppSettings, create_app
from serving.event_loop import loop_factory
from serving.front import ABORT_GRACE_S, open_front
from serving.observe import measure_lag
from serving.remote import wire
from serving.remote.client import RemoteEngine
from serving.remote.wire import Channel
from serving.state import STATE

log = logging.getLogger("serving")

BEAT_S = 1.0


class _Worker:
    """What has been heard from the engine's process."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.setup: asyncio.Future[wire.Setup] = loop.create_future()
        self.ready: asyncio.Future[wire.Ready] = loop.create_future()
        self.lost = asyncio.Event()
        self.channel = Channel(wire.ToApi, self._receive, self._lose)
        self.closing: str | None = None
        self.engine: RemoteEngine | None = None
        self.app: Any = None

    def _receive(self, message: wire.ToApi) -> None:
        match message:
            case wire.Setup():
                self.setup.set_result(message)
            case wire.Ready():
                self.ready.set_result(message)
            case wire.Closing():
                self.closing = message.reason
                self.close_door()
            case _ if self.engine is not None:
                self.engine.receive(message)

    def close_door(self) -> None:
        """Takes no new requests, where that has been said."""
        if self.engine is not None and self.closing == "engine_stopped":
            self.engine.is_alive = False
        if self.app is not None and self.closing == "draining":
            self.app[STATE].draining = True

    def _lose(self) -> None:
        self.lost.set()
        if self.engine is not None:
            self.engine.lose()

    async def or_lost[T](self, wanted: asyncio.Future[T]) -> T | None:
        """What is waited for, or None if the connection ends first."""
        lost = asyncio.ensure_future(self.lost.wait())
        await asyncio.wait([wanted, lost], return_when=asyncio.FIRST_COMPLETED)
        lost.cancel()
        return wanted.result() if wanted.done() else None


async def serve(engine_socket: socket.socket, listener: socket.socket) -> None:
    """Serves until the engine's process closes the connection."""
    worker = _Worker()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, lambda: None)
    await asyncio.get_running_loop().create_unix_connection(lambda: worker.channel, sock=engine_socket)
    setup = await worker.or_lost(worker.setup)
    if setup is None:
        return
    logs.set_up(setup.log_level, setup.log_format)
    beating = asyncio.create_task(_beat(worker.channel))
    try:
        async with open_front(setup.options, listener) as front:
            facts = await worker.or_lost(worker.ready)
            if facts is None:
                return
            engine = worker.engine = RemoteEngine(worker.channel, facts, setup.options.max_requests_per_client)
            settings = AppSettings.of(setup.options, setup.api_keys, setup.admin_keys)
            app = worker.app = create_app(engine, settings, slots=engine)
            worker.close_door()
            await front.show(app)
            worker.channel.send(wire.Serving())
            lag = asyncio.create_task(measure_lag(app[STATE].metrics))
            await worker.lost.wait()
            await _all_told(app)
            lag.cancel()
    finally:
        beating.cancel()


async def _all_told(app: Any) -> None:
    """Until the handlers of all requests have answered, but at most for a short grace."""
    deadline = asyncio.get_running_loop().time() + ABORT_GRACE_S
    while app[STATE].live and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.01)


async def _beat(channel: Channel) -> None:
    while True:
        channel.send(wire.Beat())
        await asyncio.sleep(BEAT_S)


def main(argv: list[str]) -> int:
    """Takes over the two sockets that were opened for this process."""
    engine_socket, listener = (socket.socket(fileno=int(number)) for number in argv[1:3])
    with listener, asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(serve(engine_socket, listener))
    logging.shutdown()
    os._exit(0)  # threads that tokenize for clients who are gone are not waited for


if __name__ == "__main__":
    sys.exit(main(sys.argv))
