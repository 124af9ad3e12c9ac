"""Where the outputs of one request go: OutputSink, what an engine hands them to, and OutputStream, one that is read.

Made by async_engine.py and by servers whose engine is in another process. Everything here belongs to the thread of the
reader's event loop. Never imports jax.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

from jax_engine.errors import EngineError, SlowReader
from jax_engine.request import RequestOutput
from jax_engine.sampling_params import RequestOutputKind


class OutputSink(Protocol):
    """What an engine's thread needs to know of a reader. Hashed by identity."""

    request_id: str
    loop: asyncio.AbstractEventLoop

    def put(self, output: RequestOutput | EngineError) -> None:
        """Takes an output, in the thread of `loop`; an error is the last."""
        ...


class OutputStream:
    """The outputs of one request, for one reader.

    Args:
        limit: outputs that may be left unread.
        on_overflow: called once, when one more comes; the stream takes nothing more, and ends with SlowReader.
    """

    def __init__(
        self, request_id: str, kind: RequestOutputKind, limit: int, on_overflow: Callable[["OutputStream"], None]
    ):
        self.request_id = request_id
        self.loop = asyncio.get_running_loop()
        self._limit, self._on_overflow = limit, on_overflow
        self._num_unread = 0  # outputs since the last `get`, joined ones counted one by one
        self._overflowed = False
        self._is_delta = kind is RequestOutputKind.DELTA
        self._outputs: list[RequestOutput | EngineError] = []  # at most one, and an error after it
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: RequestOutput | EngineError) -> None:
        """Adds an output. One that has not been taken yet is joined with it: a reader who is slower than the engine
        gets several tokens at a time."""
        if self._overflowed:
            return
        if self._num_unread >= self._limit and not isinstance(output, EngineError):
            self._overflowed = True
            output = SlowReader(f"{self._limit} outputs were left unread; the request was aborted")
            self._on_overflow(self)
        self._num_unread += 1
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
        self._num_unread = 0
        return self._outputs.pop(0)
