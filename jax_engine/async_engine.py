"""AsyncEngine: the engine in a thread of its own, for asyncio callers.

Requests reach the thread through an inbox; outputs come back with one wake-up of the event loop per step. The thread
sleeps on the inbox when there is no work.
"""

import asyncio
import functools
import logging
import queue
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence as AbstractSequence
from typing import Any

import jax

from jax_engine.config import EngineConfig, Limits
from jax_engine.engine import Engine
from jax_engine.engine_view import EngineView, look
from jax_engine.errors import EngineError, EngineStopped, InvalidRequest, QueueFull
from jax_engine.metrics import Gauges, Metrics
from jax_engine.output_stream import OutputSink, OutputStream
from jax_engine.request import Request, RequestOutput
from jax_engine.sampling_params import SamplingParams, embedding_params
from jax_engine.start import start_engine
from jax_engine.timeline import Timeline
from jax_engine.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

#: Prompts longer than this are tokenized off the event loop, as grammars are compiled.
_LONG_PROMPT_CHARS = 4096


class AsyncEngine:
    """Serves requests as asynchronous iterators. Building it blocks until every step is compiled.

    Args:
        config: the operator's choices.
        engine: one that exists already, in place of one built from the config.

    Raises:
        ConfigError, CheckpointError: the model cannot be served.
    """

    def __init__(self, config: EngineConfig, engine: Engine | None = None):
        self.config = config
        self._engine = start_engine(config) if engine is None else engine
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, OutputSink] = {}
        self._open: set[OutputSink] = set()  # all that are read, also those whose request has not reached the thread
        self._draining = False
        self._stopped = False
        self._turn_started: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def limits(self) -> Limits:
        """The sizes in force."""
        return self._engine.limits

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, or None."""
        return self._engine.tokenizer

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        """Fields of SamplingParams that the model would have where a caller says nothing."""
        return self._engine.sampling_defaults

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an output."""
        return self._engine.eos_token_ids

    @property
    def model_name(self) -> str:
        """The model as the operator named it."""
        return self.config.model

    @property
    def metrics(self) -> Metrics:
        """Counters."""
        return self._engine.metrics

    @property
    def gauges(self) -> Gauges:
        """What the engine holds now."""
        return self._engine.gauges

    def page_references(self) -> list[int]:
        """How many sequences hold each KV page; -1 for one that is kept in the prefix cache alone."""
        return self._engine.scheduler.pool.references()

    @property
    def timeline(self) -> Timeline:
        """What host and device did lately."""
        return self._engine.timeline

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs and `fail` has not been called."""
        return self._thread.is_alive() and not self._stopped

    @property
    def turn_seconds(self) -> float:
        """How long the engine's thread has been in the present turn of its loop; 0 while it waits for requests.

        A turn dispatches one step and waits for one, so a figure far above a step's time means that the device or a
        thread hangs.
        """
        started = self._turn_started
        return 0.0 if started is None else self._engine.clock() - started

    @property
    def num_requests(self) -> int:
        """Requests that have not finished."""
        return len(self._open)

    async def generate(
        self,
        prompt: str | AbstractSequence[int],
        sampling_params: SamplingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        embed: bool = False,
        **who: str | None,
    ) -> AsyncIterator[RequestOutput]:
        """Yields outputs as `sampling_params.output_kind` says, the last with `finished` set.

        Args:
            who: user, slo_class and cache_salt; these, and the other arguments, are those of Request.

        Closing the iterator, or cancelling the task that reads it, aborts the request.

        Raises:
            InvalidRequest, QueueFull, EngineStopped: before the first output.
            EngineStopped: at any time, if the engine dies.
            SlowReader: after the outputs that were in time.
        """
        stream = OutputStream(
            request_id or uuid.uuid4().hex, sampling_params.output_kind, self.config.max_unread_outputs, self.close
        )
        done = False
        try:
            await self.submit(stream, prompt, sampling_params, priority, embed=embed, **who)
            while not done:
                output = await stream.get()
                done = isinstance(output, EngineError) or output.finished
                if isinstance(output, EngineError):
                    raise output
                yield output
        finally:
            self.close(stream, aborts=not done)

    async def submit(
        self,
        sink: OutputSink,
        prompt: str | AbstractSequence[int],
        sampling_params: SamplingParams,
        priority: int = 0,
        *,
        embed: bool = False,
        **who: str | None,
    ) -> None:
        """Puts a request in line whose outputs a sink is given. See `generate`; whoever calls this calls `close` too,
        also when it raises.

        Raises:
            InvalidRequest, QueueFull, EngineStopped: it is not in line. The queue's refusal may come to the sink.
        """
        if self._draining or not self.is_alive:
            raise EngineStopped("the engine takes no more requests")
        if len(self._open) >= self.config.max_queued_requests + self.limits.max_num_seqs:
            # The engine's thread counts exactly; this spares it, and the tokenizer, what cannot fit.
            problem = f"{len(self._open)} requests run or wait; try again later"
            raise QueueFull(problem, self._engine.queue.retry_after())
        self._open.add(sink)
        make = functools.partial(self._engine.make_request, sink.request_id, prompt, sampling_params, priority)
        long = isinstance(prompt, str) and len(prompt) > _LONG_PROMPT_CHARS
        in_thread = long or sampling_params.structured_outputs is not None
        request = await asyncio.to_thread(make, embed=embed, **who) if in_thread else make(embed=embed, **who)
        if self._stopped:
            raise EngineStopped("the engine has stopped")
        self._inbox.put(lambda: self._add(request, sink))

    def close(self, sink: OutputSink, *, aborts: bool = True) -> None:
        """Nobody waits for a sink's outputs any more; aborts: its request has not ended."""
        self._open.discard(sink)
        if aborts:
            self._inbox.put(lambda: self._abort(sink.request_id, sink))

    async def stop(self, request_id: str, index: int, stop_string: str) -> None:
        """Ends a completion in whose text the reader has found a stop string."""
        self._inbox.put(lambda: self._stop(request_id, index, stop_string))

    async def view(self, seconds: float = 0.0) -> EngineView:
        """What the engine shows of itself, with what happened in the last `seconds`."""
        return await asyncio.to_thread(look, self, seconds) if seconds else look(self, 0.0)

    async def embed(self, prompt: str | AbstractSequence[int], *, truncate: bool = False) -> RequestOutput:
        """The output that holds a prompt's `embedding`. truncate: keep the end of a prompt that is too long.

        Raises:
            InvalidRequest, QueueFull, EngineStopped: as for generate.
        """
        stream = self.generate(prompt, embedding_params(truncate), embed=True)
        try:
            return await anext(stream)
        finally:
            await stream.aclose()  # type: ignore[attr-defined]

    async def abort(self, request_id: str) -> None:
        """Ends a request; its reader gets a last output with finish_reason `abort`."""
        self._inbox.put(lambda: self._abort(request_id, None))

    async def start_profile(self, folder: str) -> None:
        """Lets jax record host and device into a folder, for TensorBoard or Perfetto; slows steps down.

        Raises:
            InvalidRequest: it is recording already.
        """
        try:
            await asyncio.to_thread(jax.profiler.start_trace, folder)
        except RuntimeError as error:
            raise InvalidRequest(f"no profile can be started: {error}") from None

    async def stop_profile(self) -> None:
        """Writes what was recorded; takes seconds.

        Raises:
            InvalidRequest: nothing is being recorded.
        """
        try:
            await asyncio.to_thread(jax.profiler.stop_trace)
        except RuntimeError as error:
            raise InvalidRequest(f"no profile can be stopped: {error}") from None

    async def reset_prefix_cache(self) -> None:
        """Forgets what the KV pages hold, so that no later request uses them again; running requests keep theirs."""
        self._inbox.put(self._engine.reset_prefix_cache)

    async def drain(self, timeout_s: float) -> None:
        """Takes no more requests, and waits for those that run, but at most `timeout_s` seconds."""
        self._draining = True
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._open and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)

    def shutdown(self) -> None:
        """Stops the thread; iterators that are still read raise EngineStopped. Calling it twice changes nothing."""
        self._draining = True
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
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
        except BaseException:
            _log.exception("the engine has died")
        finally:
            self._turn_started = None
            self._engine.step_log.close()
            self._stop_streams()

    def fail(self) -> None:
        """Gives the engine up, from another thread, because its own hangs: every iterator raises EngineStopped, and no
        request is taken any more. The thread is left alone; the process should end."""
        self._stop_streams()

    def _stop_streams(self) -> None:
        self._draining = self._stopped = True
        stopped = EngineStopped("the engine has stopped")
        for stream in list(self._open):
            self._send(stream.loop, [(stream, stopped)])

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

    def _add(self, request: Request, stream: OutputSink) -> None:
        try:
            self._engine.submit(request, bounded=True)
        except EngineError as error:
            self._send(stream.loop, [(stream, error)])
        else:
            self._streams[request.request_id] = stream

    def _abort(self, request_id: str, reader_gone: OutputSink | None) -> None:
        """Aborts a request; `reader_gone` is set when nobody reads its stream any more."""
        stream = self._streams.get(request_id)
        if stream is None or (reader_gone is not None and reader_gone is not stream):
            return
        output = self._engine.abort(request_id)
        if output is not None and reader_gone is None:
            self._deliver([(request_id, output)])
        del self._streams[request_id]

    def _stop(self, request_id: str, index: int, stop_string: str) -> None:
        output = self._engine.stop(request_id, index, stop_string)
        if output is not None:
            self._deliver([(request_id, output)])
            if output.finished:
                self._streams.pop(request_id, None)

    def _deliver(self, outputs: list[tuple[str, RequestOutput | EngineError]]) -> None:
        """Hands outputs to their streams, with one wake-up of each event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list] = {}
        for request_id, output in outputs:
            stream = self._streams.get(request_id)
            if stream is not None:
                by_loop.setdefault(stream.loop, []).append((stream, output))
        for loop, entries in by_loop.items():
            self._send(loop, entries)

    def _send(
        self, loop: asyncio.AbstractEventLoop, entries: list[tuple[OutputSink, RequestOutput | EngineError]]
    ) -> None:
        try:
            loop.call_soon_threadsafe(self._put, entries)
        except RuntimeError:
            _log.debug("a caller's event loop is closed; its outputs are dropped")

    def _put(self, entries: list[tuple[OutputSink, RequestOutput | EngineError]]) -> None:
        """In the readers' event loop: hands over outputs."""
        for sink, output in entries:
            sink.put(output)
