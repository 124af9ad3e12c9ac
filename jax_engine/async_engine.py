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
from jax_engine.errors import EngineError, EngineStopped, InvalidRequest, QueueFull, SlowReader
from jax_engine.metrics import Gauges, Metrics
from jax_engine.request import Request, RequestOutput
from jax_engine.sampling_params import RequestOutputKind, SamplingParams
from jax_engine.start import start_engine
from jax_engine.timeline import Timeline
from jax_engine.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

#: Prompts longer than this are tokenized off the event loop, as grammars are compiled.
_LONG_PROMPT_CHARS = 4096


class _Stream:
    """Where one request's outputs go. `put` and `get` are for the thread of the caller's loop."""

    def __init__(self, request_id: str, kind: RequestOutputKind):
        self.request_id = request_id
        self.loop = asyncio.get_running_loop()
        self.num_unread = 0  # outputs since the last `get`, joined ones counted one by one
        self.overflowed = False
        self._is_delta = kind is RequestOutputKind.DELTA
        self._outputs: list[RequestOutput | EngineError] = []  # at most one, and an error after it
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: RequestOutput | EngineError) -> None:
        """Adds an output. One that has not been taken yet is joined with it: a reader who is slower than the engine
        gets several tokens at a time."""
        self.num_unread += 1
        last = self._outputs[-1] if self._outputs else None
        if isinstance(last, RequestOutput) and isinstance(output, RequestOutput):
            if self._is_delta:
                last.take_in(output)
            else:
                self._outputs[-1] = output
        else:
            self._outputs.append(output)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> RequestOutput | EngineError:
        """Waits for an output."""
        while not self._outputs:
            self._waiter = self.loop.create_future()
            await self._waiter
        self.num_unread = 0
        return self._outputs.pop(0)


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
        self._streams: dict[str, _Stream] = {}
        self._open: set[_Stream] = set()  # all that are read, also those whose request has not reached the thread
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
        user: str | None = None,
        slo_class: str | None = None,
        cache_salt: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Yields outputs as `sampling_params.output_kind` says, the last with `finished` set.

        See Request for the other arguments.

        Closing the iterator, or cancelling the task that reads it, aborts the request.

        Raises:
            InvalidRequest, QueueFull, EngineStopped: before the first output.
            EngineStopped: at any time, if the engine dies.
            SlowReader: after the outputs that were in time.
        """
        if self._draining or not self.is_alive:
            raise EngineStopped("the engine takes no more requests")
        if len(self._open) >= self.config.max_queued_requests + self.limits.max_num_seqs:
            # The engine's thread counts exactly; this spares it, and the tokenizer, what cannot fit.
            problem = f"{len(self._open)} requests run or wait; try again later"
            raise QueueFull(problem, self._engine.queue.retry_after())
        make = functools.partial(self._engine.make_request, user=user, slo_class=slo_class, cache_salt=cache_salt)
        request_id = request_id or uuid.uuid4().hex
        done = False
        stream = _Stream(request_id, sampling_params.output_kind)
        self._open.add(stream)
        try:
            long = isinstance(prompt, str) and len(prompt) > _LONG_PROMPT_CHARS
            if long or sampling_params.structured_outputs is not None:
                request = await asyncio.to_thread(make, request_id, prompt, sampling_params, priority, embed=embed)
            else:
                request = make(request_id, prompt, sampling_params, priority, embed=embed)
            if self._stopped:
                raise EngineStopped("the engine has stopped")
            self._inbox.put(lambda: self._add(request, stream))
            while not done:
                output = await stream.get()
                done = isinstance(output, EngineError) or output.finished
                if isinstance(output, EngineError):
                    raise output
                yield output
        finally:
            self._open.discard(stream)
            if not done:
                self._inbox.put(lambda: self._abort(request_id, stream))

    async def embed(self, prompt: str | AbstractSequence[int], *, truncate: bool = False) -> RequestOutput:
        """The output that holds a prompt's `embedding`. truncate: keep the end of a prompt that is too long.

        Raises:
            InvalidRequest, QueueFull, EngineStopped: as for generate.
        """
        params = SamplingParams(
            temperature=0,
            max_tokens=1,
            detokenize=False,
            truncate_prompt_tokens=-1 if truncate else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        stream = self.generate(prompt, params, embed=True)
        try:
            return await anext(stream)
        finally:
            await stream.aclose()  # type: ignore[attr-defined]

    async def abort(self, request_id: str) -> None:
        """Ends a request; its iterator gives a last output with finish_reason `abort`."""
        self._inbox.put(lambda: self._abort(request_id, None))

    def start_profile(self, folder: str) -> None:
        """Lets jax record host and device into a folder, for TensorBoard or Perfetto; slows steps down.

        Raises:
            InvalidRequest: it is recording already.
        """
        try:
            jax.profiler.start_trace(folder)
        except RuntimeError as error:
            raise InvalidRequest(f"no profile can be started: {error}") from None

    def stop_profile(self) -> None:
        """Writes what was recorded; takes seconds.

        Raises:
            InvalidRequest: nothing is being recorded.
        """
        try:
            jax.profiler.stop_trace()
        except RuntimeError as error:
            raise InvalidRequest(f"no profile can be stopped: {error}") from None

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

    def _add(self, request: Request, stream: _Stream) -> None:
        try:
            self._engine.submit(request, bounded=True)
        except EngineError as error:
            self._send(stream.loop, [(stream, error)])
        else:
            self._streams[request.request_id] = stream

    def _abort(self, request_id: str, reader_gone: _Stream | None) -> None:
        """Aborts a request; `reader_gone` is set when nobody reads its stream any more."""
        stream = self._streams.get(request_id)
        if stream is None or (reader_gone is not None and reader_gone is not stream):
            return
        output = self._engine.abort(request_id)
        if output is not None and reader_gone is None:
            self._deliver([(request_id, output)])
        del self._streams[request_id]

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
        self, loop: asyncio.AbstractEventLoop, entries: list[tuple[_Stream, RequestOutput | EngineError]]
    ) -> None:
        try:
            loop.call_soon_threadsafe(self._put, entries)
        except RuntimeError:
            _log.debug("a caller's event loop is closed; its outputs are dropped")

    def _put(self, entries: list[tuple[_Stream, RequestOutput | EngineError]]) -> None:
        """In the readers' event loop: hands over outputs; a reader that has left too many unread gets no more."""
        limit = self.config.max_unread_outputs
        for stream, output in entries:
            if stream.num_unread < limit:
                stream.put(output)
            elif not stream.overflowed:
                stream.overflowed = True
                stream.put(SlowReader(f"{limit} outputs were left unread; the request was aborted"))
                self._inbox.put(lambda stream=stream: self._abort(stream.request_id, stream))
