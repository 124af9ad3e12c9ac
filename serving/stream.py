"""Server-sent events: one response whose events are JSON, with keep-alive comments while nothing comes.

Called by the generation routes. Knows framing and failure, nothing of what the events say. A slow reader holds up only
its own stream: each write waits for room in the socket's buffer.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Any, NamedTuple

import msgspec
from aiohttp import web

from serving.errors import ApiError, to_api_error
from serving.state import STATE

_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_KEEP_ALIVE = b": keep-alive\n\n"
_DONE = b"data: [DONE]\n\n"
_encoder = msgspec.json.Encoder()

#: Events that are sent together, in one write.
Events = list[dict[str, Any]]


def _openai_error(error: ApiError) -> dict[str, Any]:
    return error.body()


class Framing(NamedTuple):
    """How a protocol frames its events.

    Attributes:
        named: each event has its `type` as the event's name.
        done: sent after the last one.
        error: the event of a failure that comes too late for a status.
    """

    named: bool = False
    done: bytes = _DONE
    error: Callable[[ApiError], dict[str, Any]] = _openai_error

    def encode(self, event: dict[str, Any]) -> bytes:
        """One event."""
        data = b"data: %b\n\n" % _encoder.encode(event)
        return b"event: %b\n%b" % (str(event["type"]).encode(), data) if self.named else data


OPENAI = Framing()


async def stream_events(
    request: web.Request,
    events: AsyncGenerator[Events, None],
    keep_alive_s: float,
    framing: Framing = OPENAI,
) -> web.StreamResponse:
    """Sends events until they end, then what the framing ends with. Closes `events` in any case.

    Raises:
        Exception: what `events` raised before the first one, while an answer with a status is still possible. Later
            failures become an event with an OpenAI error body.
    """
    stream = _EventStream(request)
    keep_alive = asyncio.create_task(_keep_alive(stream, keep_alive_s))
    try:
        async with contextlib.aclosing(events):
            await _send_all(stream, events, framing)
    except ConnectionError:
        pass  # the client went away; the engine's requests have been closed
    finally:
        keep_alive.cancel()
        await asyncio.gather(keep_alive, return_exceptions=True)
    return stream.response


async def _send_all(stream: "_EventStream", events: AsyncGenerator[Events, None], framing: Framing) -> None:
    try:
        async for group in events:
            if group:
                await stream.write(b"".join([framing.encode(event) for event in group]))
    except ConnectionError:
        raise
    except Exception as error:
        if not stream.opened:
            raise
        await stream.write(framing.encode(framing.error(to_api_error(error))))
    await stream.write(framing.done)
    await stream.response.write_eof()


async def _keep_alive(stream: "_EventStream", interval_s: float) -> None:
    """Sends a comment whenever the stream has been silent for `interval_s`."""
    loop = asyncio.get_running_loop()
    while True:
        silent_s = loop.time() - stream.last_write
        if silent_s >= interval_s:
            await stream.write(_KEEP_ALIVE)
            silent_s = 0.0
        await asyncio.sleep(interval_s - silent_s)


class _EventStream:
    """The response, opened by its first write."""

    def __init__(self, request: web.Request):
        self.response = web.StreamResponse(headers=_HEADERS)
        self.last_write = asyncio.get_running_loop().time()
        self.opened = False
        self._request = request
        self._opening = asyncio.Lock()

    async def write(self, data: bytes) -> None:
        """Sends whole events; waits while the socket's buffer is full, for as long as the server allows.

        Raises:
            ConnectionError: the client is gone, or does not read.
        """
        if not self.opened:
            async with self._opening:
                if not self.opened:
                    await self.response.prepare(self._request)
                    self.opened = True
        self.last_write = asyncio.get_running_loop().time()
        state = self._request.app[STATE]
        try:
            async with asyncio.timeout(state.write_timeout_s or None):
                await self.response.write(data)
        except TimeoutError:
            state.metrics.aborted_readers.inc()
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError("the client does not read") from None
