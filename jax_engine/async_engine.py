"""AsyncEngine: one engine or several replicas of it, each in a thread of its own, for asyncio callers.

Takes requests in, chooses a replica for each, and stands before all of them as if they were one.
"""

import asyncio
import functools
import logging
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any, NamedTuple

import jax

from jax_engine.config import EngineConfig, Limits
from jax_engine.engine import Engine
from jax_engine.engine_thread import EngineThread, send
from jax_engine.engine_view import EngineView, look
from jax_engine.errors import EngineError, EngineStopped, InvalidRequest, QueueFull
from jax_engine.intake import Prompt
from jax_engine.metrics import Gauges, Metrics
from jax_engine.output_stream import OutputSink, OutputStream
from jax_engine.request import Request, RequestOutput
from jax_engine.router import Router
from jax_engine.sampling_params import SamplingParams, checked, embedding_params
from jax_engine.start import start_engines
from jax_engine.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

#: A profile ends by itself: jax keeps all of it in memory, on a CPU half a GiB for each second.
MAX_PROFILE_S = 5.0
#: Prompts longer than this are tokenized off the event loop, as grammars are compiled.
_LONG_PROMPT_CHARS = 4096


class _Placed(NamedTuple):
    """A request, and the replica that has it."""

    replica: int
    request: Request


class AsyncEngine:
    """Serves requests as asynchronous iterators. Building it blocks until every step is compiled.

    Args:
        config: the operator's choices.
        engines: those that exist already, in place of ones built from the config: all alike, sharing a queue.

    Attributes:
        replicas: the engines, each run by its own thread.

    Raises:
        ConfigError, CheckpointError: the model cannot be served.
    """

    def __init__(self, config: EngineConfig, *engines: Engine):
        self.config = config
        self.replicas = list(engines) or start_engines(config)
        self._engine = self.replicas[0]  # for what they have alike
        self._router = Router(len(self.replicas), self._engine.limits)
        self._open: dict[OutputSink, _Placed | None] = {}  # all that are read; None: its request is being made
        self._ids: dict[str, OutputSink] = {}
        self._draining = False
        self._stopped = False
        self._profile_end: asyncio.Task | None = None
        self._threads: list[EngineThread] = []
        for number, engine in enumerate(self.replicas):
            ended = functools.partial(self._thread_ended, number)
            self._threads.append(EngineThread(engine, f"engine {number}" if number else "engine", ended))

    @property
    def limits(self) -> Limits:
        """The sizes in force, of each replica."""
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
        """Counters; those of several replicas added up as they are now."""
        return Metrics.total([engine.metrics for engine in self.replicas])

    @property
    def gauges(self) -> Gauges:
        """What the engine holds now."""
        return Gauges.total([engine.gauges for engine in self.replicas])

    @property
    def is_alive(self) -> bool:
        """Whether all threads run and `fail` has not been called."""
        return not self._stopped and all(thread.is_alive for thread in self._threads)

    @property
    def turn_seconds(self) -> float:
        """How long a thread has been in the present turn of its loop, the longest of all; 0 while all wait for work.

        A turn dispatches one step and waits for one, so a figure far above a step's time means that the device or a
        thread hangs.
        """
        return max(thread.turn_seconds for thread in self._threads)

    @property
    def num_requests(self) -> int:
        """Requests that have not finished."""
        return len(self._open)

    async def generate(
        self,
        prompt: Prompt,
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
            request_id or uuid.uuid4().hex,
            checked(sampling_params).output_kind,
            self.config.max_unread_outputs,
            self.close,
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
        prompt: Prompt,
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
        if sink.request_id in self._ids:
            raise InvalidRequest(f"request id {sink.request_id!r} is in use", "request_id")
        if len(self._open) >= self.config.max_queued_requests + self.limits.max_num_seqs * len(self.replicas):
            # The queue counts exactly; this spares the threads, and the tokenizer, what cannot fit.
            problem = f"{len(self._open)} requests run or wait; try again later"
            raise QueueFull(problem, self._engine.queue.retry_after())
        self._open[sink] = None
        self._ids[sink.request_id] = sink
        make = functools.partial(self._engine.make_request, sink.request_id, prompt, sampling_params, priority)
        long = isinstance(prompt, str) and len(prompt) > _LONG_PROMPT_CHARS
        in_thread = long or sampling_params.structured_outputs is not None
        request = await asyncio.to_thread(make, embed=embed, **who) if in_thread else make(embed=embed, **who)
        if self._stopped:
            raise EngineStopped("the engine has stopped")
        if sink not in self._open:
            return  # its reader left while the request was made
        # Seeds come in the order of the requests, so that they do not depend on the replica.
        placed = self._open[sink] = _Placed(self._router.choose(request), request)
        self._threads[placed.replica].submit(request, self._engine.draw_seed(request), sink)

    def close(self, sink: OutputSink, *, aborts: bool = True) -> None:
        """Nobody waits for a sink's outputs any more; aborts: its request has not ended."""
        placed = self._open.pop(sink, None)
        if self._ids.get(sink.request_id) is sink:
            del self._ids[sink.request_id]
        if placed is not None:
            self._router.release(*placed)
            if aborts:
                self._threads[placed.replica].abort(sink.request_id, reader_gone=sink)

    async def stop(self, request_id: str, index: int, stop_string: str) -> None:
        """Ends a completion in whose text the reader has found a stop string."""
        if (thread := self._thread_of(request_id)) is not None:
            thread.stop_at(request_id, index, stop_string)

    async def view(self, seconds: float = 0.0) -> EngineView:
        """What the engine shows of itself, with what happened in the last `seconds`."""
        return await asyncio.to_thread(look, self, seconds) if seconds else look(self, 0.0)

    async def embed(self, prompt: Prompt, *, truncate: bool = False) -> RequestOutput:
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
        if (thread := self._thread_of(request_id)) is not None:
            thread.abort(request_id)

    def _thread_of(self, request_id: str) -> EngineThread | None:
        """The thread that has the request, if there is one."""
        sink = self._ids.get(request_id)
        placed = None if sink is None else self._open[sink]
        return None if placed is None else self._threads[placed.replica]

    async def start_profile(self, folder: str) -> None:
        """Lets jax record host and device into a folder, for TensorBoard or Perfetto; slows steps down. It is written
        by `stop_profile`, or after MAX_PROFILE_S.

        Raises:
            InvalidRequest: it is recording already.
        """
        try:
            await asyncio.to_thread(jax.profiler.start_trace, folder)
        except RuntimeError as error:
            raise InvalidRequest(f"no profile can be started: {error}") from None
        self._profile_end = asyncio.create_task(self._end_profile())

    async def _end_profile(self) -> None:
        await asyncio.sleep(MAX_PROFILE_S)
        self._profile_end = None
        try:
            await self.stop_profile()
            _log.warning("the profile has ended after %g s and is written", MAX_PROFILE_S)
        except InvalidRequest as error:
            _log.warning("the profile has ended after %g s: %s", MAX_PROFILE_S, error)

    async def stop_profile(self) -> None:
        """Writes what was recorded; takes seconds.

        Raises:
            InvalidRequest: nothing is being recorded, or it cannot be written.
        """
        if self._profile_end is not None:
            self._profile_end.cancel()
            self._profile_end = None
        try:
            await asyncio.to_thread(jax.profiler.stop_trace)
        except RuntimeError as error:
            raise InvalidRequest(f"no profile can be stopped: {error}") from None

    async def reset_prefix_cache(self) -> None:
        """Forgets what the KV pages hold, so that no later request uses them again; running requests keep theirs."""
        for thread in self._threads:
            thread.reset_prefix_cache()

    async def drain(self, timeout_s: float) -> None:
        """Takes no more requests, and waits for those that run, but at most `timeout_s` seconds."""
        self._draining = True
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._open and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)

    def shutdown(self) -> None:
        """Stops the threads; iterators that are still read raise EngineStopped. Calling it twice changes nothing."""
        self._draining = True
        for thread in self._threads:
            thread.end()
        for thread in self._threads:
            thread.join()

    def fail(self) -> None:
        """Gives the engine up, from another thread, because its own hangs: every iterator raises EngineStopped, and no
        request is taken any more. The threads are left alone; the process should end."""
        self._stop_streams("the engine has stopped")

    def _thread_ended(self, replica: int, died: bool) -> None:
        """In a replica's thread: without it, requests that are sent to it would wait for ever, so all end."""
        several = died and len(self.replicas) > 1
        self._stop_streams(f"replica {replica} of the engine has died" if several else "the engine has stopped")
        if several:
            for thread in self._threads:
                thread.end()

    def _stop_streams(self, reason: str) -> None:
        self._draining = self._stopped = True
        stopped = EngineStopped(reason)
        send([(sink, stopped) for sink in list(self._open)])
