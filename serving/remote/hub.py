"""Hub: the engine's end of the connections to the API processes.

Made by supervisor.py, in the event loop of the engine's process. Requests that an API process has put in line end with
its connection. What a step brings the requests of one process goes out in one frame. Knows nothing of HTTP.
"""

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import msgspec

from jax_engine import EngineError, EngineStopped, RequestOutput
from jax_engine.tokenizer import TextTokenizer
from serving.front import ABORT_GRACE_S
from serving.limits import ClientSlots
from serving.remote import wire
from serving.remote.wire import Channel

if TYPE_CHECKING:
    from jax_engine import AsyncEngine

log = logging.getLogger("serving")

_NOTHING = msgspec.Raw(msgspec.msgpack.encode(None))
_POLL_S = 0.02


class Hub:
    """All connections of one engine.

    Args:
        setup: what every API process is told first.
    """

    def __init__(self, setup: wire.Setup):
        self.setup = setup
        self.slots = ClientSlots(setup.options.max_requests_per_client)
        self.links: set[Link] = set()
        self.engine: AsyncEngine | None = None
        self._ready: wire.Ready | None = None

    def show(self, engine: "AsyncEngine") -> None:
        """Lets the API processes serve."""
        tokenizer = engine.tokenizer
        assert tokenizer is None or isinstance(tokenizer, TextTokenizer), "only a model's own tokenizer can be sent"
        self.engine = engine
        self._ready = wire.Ready(
            engine.model_name,
            engine.limits,
            None if tokenizer is None else tokenizer.packed(),
            dict(engine.sampling_defaults),
            sorted(engine.eos_token_ids),
            engine.config.max_unread_outputs,
        )
        for link in self.links:
            link.channel.send(self._ready)

    @property
    def num_serving(self) -> int:
        """API processes that answer requests."""
        return sum(link.serving.is_set() for link in self.links)

    def greet(self, link: "Link") -> None:
        """Tells a new process what it needs."""
        if not link.ended.is_set():
            self.links.add(link)
        link.channel.send(self.setup)
        if self._ready is not None:
            link.channel.send(self._ready)

    async def drain(self, timeout_s: float) -> None:
        """See life.Clients.drain."""
        assert self.engine is not None
        self._close("draining")
        log.info("shutting down: %d requests may finish within %.0f s", self.engine.num_requests, timeout_s)
        await self.engine.drain(timeout_s)
        left = [sink.request_id for link in self.links for sink in link.sinks.values()]
        if left:
            log.warning("aborting %d requests that did not finish within %.0f s", len(left), timeout_s)
            for request_id in left:
                await self.engine.abort(request_id)
        await self._until_told(ABORT_GRACE_S)

    async def tell_all(self, grace_s: float) -> None:
        """See life.Clients.tell_all."""
        self._close("engine_stopped")
        await self._until_told(grace_s)

    async def _until_told(self, grace_s: float) -> None:
        """Until every request's last output is on its way."""
        deadline = time.monotonic() + grace_s
        while any(link.sinks for link in self.links) and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
        await asyncio.sleep(_POLL_S)  # for the last frames to be sent

    def _close(self, reason: Any) -> None:
        for link in self.links:
            link.channel.send(wire.Closing(reason))


class Sink:
    """Where the outputs of one request of an API process go; see output_stream.OutputSink."""

    def __init__(self, link: "Link", number: int, request_id: str):
        self.request_id = request_id
        self.loop = asyncio.get_running_loop()
        self._link, self._number = link, number
        self._first = True

    def put(self, output: RequestOutput | EngineError) -> None:
        """Adds it to the connection's next frame."""
        if self._link.sinks.get(self._number) is not self:
            return  # the reader has left
        if isinstance(output, EngineError):
            self._link.forward(wire.failure(self._number, output))
            self._link.drop(self._number, aborts=False)
            return
        self._link.forward(wire.part(self._number, output, first=self._first))
        self._first = False
        if output.finished:
            self._link.drop(self._number, aborts=False)


class Link:
    """One connection to an API process.

    Attributes:
        sinks: its unfinished requests by number.
        serving: it has said that it answers requests.
        heard: when it last said anything, seconds on the monotonic clock.
        ended: set once it is gone.
    """

    def __init__(self, hub: Hub):
        self.hub = hub
        self.channel = Channel(wire.ToEngine, self._receive, self._lost)
        self.sinks: dict[int, Sink] = {}
        self.serving = asyncio.Event()
        self.ended = asyncio.Event()
        self.heard = time.monotonic()
        self._slots: dict[int, str] = {}
        self._parts: list[wire.Part | wire.Failure] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def forward(self, part: wire.Part | wire.Failure) -> None:
        """Sends it with whatever else this turn of the event loop brings."""
        if not self._parts:
            asyncio.get_running_loop().call_soon(self._flush)
        self._parts.append(part)

    def _flush(self) -> None:
        parts, self._parts = self._parts, []
        self.channel.send(wire.Outputs(parts))

    def drop(self, number: int, *, aborts: bool) -> None:
        """Forgets a request; aborts: it has not ended."""
        sink = self.sinks.pop(number, None)
        if sink is not None and self.hub.engine is not None:
            self.hub.engine.close(sink, aborts=aborts)

    def _lost(self) -> None:
        self.hub.links.discard(self)
        for task in self._tasks:
            task.cancel()
        for number in list(self.sinks):
            self.drop(number, aborts=True)
        for client in self._slots.values():
            self.hub.slots.leave(client)
        self._slots.clear()
        self.ended.set()

    def _receive(self, message: wire.ToEngine) -> None:
        self.heard = time.monotonic()
        match message:
            case wire.Submit():
                self._start(self._submit(message))
            case wire.StopAt():
                sink = self.sinks.get(message.number)
                if sink is not None and self.hub.engine is not None:
                    self._start(self.hub.engine.stop(sink.request_id, message.index, message.stop))
            case wire.Leave():
                self.drop(message.number, aborts=True)
            case wire.Abort():
                if self.hub.engine is not None:
                    self._start(self.hub.engine.abort(message.request_id))
            case wire.Ask():
                self._start(self._answer(message))
            case wire.Exit():
                client = self._slots.pop(message.number, None)
                if client is not None:
                    self.hub.slots.leave(client)
            case wire.Serving():
                self.serving.set()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _submit(self, message: wire.Submit) -> None:
        sink = self.sinks[message.number] = Sink(self, message.number, message.request_id)
        try:
            if self.hub.engine is None:
                raise EngineStopped("the engine is not ready")
            await self.hub.engine.submit(
                sink, message.token_ids, message.params, message.priority, embed=message.embed, **message.who
            )
        except EngineError as error:
            sink.put(error)
        except Exception as error:  # a library that fails on what a client sent; the client is told nothing of it
            log.error("request %s could not be made", message.request_id, exc_info=error)
            sink.put(EngineError("the request could not be made"))

    async def _answer(self, ask: wire.Ask) -> None:
        try:
            value = msgspec.Raw(msgspec.msgpack.encode(await self._value(ask)))
        except EngineError as error:
            self.channel.send(wire.Answer(ask.number, _NOTHING, wire.failure(ask.number, error)))
        else:
            self.channel.send(wire.Answer(ask.number, value))

    async def _value(self, ask: wire.Ask) -> Any:
        if ask.what == "enter":
            client = str(ask.argument)
            entered = self.hub.slots.enter(client)
            if entered:
                self._slots[ask.number] = client
            return entered
        engine = self.hub.engine
        if engine is None:
            raise EngineStopped("the engine is not ready")
        if ask.what == "view":
            return await engine.view(float(ask.argument or 0.0))
        if ask.what == "start_profile":
            return await engine.start_profile(str(ask.argument))
        return await (engine.stop_profile() if ask.what == "stop_profile" else engine.reset_prefix_cache())
