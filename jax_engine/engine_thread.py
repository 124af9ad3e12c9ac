"""EngineThread: one engine's loop in a thread of its own.

async_engine.py has one for each replica of the model. Commands reach the thread through an inbox; outputs come back
with one wake-up of an event loop per step. The thread sleeps on the inbox when there is no work.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Iterable

from jax_engine.engine import Engine
from jax_engine.errors import EngineError
from jax_engine.output_stream import OutputSink
from jax_engine.request import Request, RequestOutput

_log = logging.getLogger(__name__)

_Outputs = list[tuple[OutputSink, RequestOutput | EngineError]]


class EngineThread:
    """Runs an engine until it is told to stop, or dies.

    Args:
        name: of the thread.
        ended: called from the thread at its end, with whether the engine has died.
    """

    def __init__(self, engine: Engine, name: str, ended: Callable[[bool], None]):
        self._engine = engine
        self._ended = ended
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, OutputSink] = {}
        self._turn_started: float | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def turn_seconds(self) -> float:
        """How long the thread has been in the present turn of its loop; 0 while it waits for requests."""
        started = self._turn_started
        return 0.0 if started is None else self._engine.clock() - started

    def submit(self, request: Request, seed: int, sink: OutputSink) -> None:
        """Puts a request in line; the queue's refusal goes to the sink, as all outputs do. See Engine.submit."""
        self._inbox.put(lambda: self._add(request, seed, sink))

    def abort(self, request_id: str, reader_gone: OutputSink | None = None) -> None:
        """Aborts a request; `reader_gone` is set when nobody reads its stream any more."""
        self._inbox.put(lambda: self._abort(request_id, reader_gone))

    def stop_at(self, request_id: str, index: int, stop_string: str) -> None:
        """Ends a completion in whose text the reader has found a stop string."""
        self._inbox.put(lambda: self._stop_at(request_id, index, stop_string))

    def reset_prefix_cache(self) -> None:
        """See Engine.reset_prefix_cache."""
        self._inbox.put(self._engine.reset_prefix_cache)

    def end(self) -> None:
        """Lets the thread end after its present turn."""
        self._inbox.put(None)

    def join(self) -> None:
        """Waits until the thread has ended."""
        self._thread.join()

    def _run(self) -> None:
        died = True
        try:
            while self._take_inbox():
                self._turn_started = self._engine.clock()
                for request_id, error in self._engine.refuse_expired():
                    self._deliver([(request_id, error)])
                    self._streams.pop(request_id, None)
                outputs = self._engine.step()
                self._turn_started = None
                if outputs:
                    self._deliver([(output.request_id, output) for output in outputs])
                    for output in outputs:
                        if output.finished:
                            self._streams.pop(output.request_id, None)
            died = False
        except BaseException:
            _log.exception("the engine has died")
        finally:
            self._turn_started = None
            self._engine.step_log.close()
            self._ended(died)

    def _take_inbox(self) -> bool:
        """Carries out what has come in; waits for it if there is no other work. False means: stop."""
        wait = not self._engine.has_work
        started = self._engine.clock() if wait else 0.0
        try:
            while True:
                command = self._inbox.get(block=wait)
                if wait:
                    ended = self._engine.clock()
                    self._engine.metrics.add_no_work(ended - started)
                    self._engine.timeline.add_phase("no_work", started, ended)
                    wait = False
                if command is None:
                    return False
                command()
        except queue.Empty:
            return True

    def _add(self, request: Request, seed: int, sink: OutputSink) -> None:
        try:
            self._engine.submit(request, bounded=True, seed=seed)
        except EngineError as error:
            send([(sink, error)])
        else:
            self._streams[request.request_id] = sink

    def _abort(self, request_id: str, reader_gone: OutputSink | None) -> None:
        sink = self._streams.get(request_id)
        if sink is None or (reader_gone is not None and reader_gone is not sink):
            return
        output = self._engine.abort(request_id)
        if output is not None and reader_gone is None:
            self._deliver([(request_id, output)])
        del self._streams[request_id]

    def _stop_at(self, request_id: str, index: int, stop_string: str) -> None:
        output = self._engine.stop(request_id, index, stop_string)
        if output is not None:
            self._deliver([(request_id, output)])
            if output.finished:
                self._streams.pop(request_id, None)

    def _deliver(self, outputs: Iterable[tuple[str, RequestOutput | EngineError]]) -> None:
        send([(sink, output) for name, output in outputs if (sink := self._streams.get(name)) is not None])


def send(outputs: _Outputs) -> None:
    """Hands outputs to their sinks, with one wake-up of each event loop; from any thread."""
    by_loop: dict[asyncio.AbstractEventLoop, _Outputs] = {}
    for sink, output in outputs:
        by_loop.setdefault(sink.loop, []).append((sink, output))
    for loop, entries in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put, entries)
        except RuntimeError:
            _log.debug("a caller's event loop is closed; its outputs are dropped")


def _put(outputs: _Outputs) -> None:
    """In the readers' event loop: hands over outputs."""
    for sink, output in outputs:
        sink.put(output)
