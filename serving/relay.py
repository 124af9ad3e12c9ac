"""relay: one request to one of several engines, and to another when the first is lost before its answer has begun.

Used by ray_app.py; knows nothing of Ray. Until the answer begins nobody has seen any of it, and a request changes
nothing in an engine: it may be asked again, so that it is late and not lost. Comments that keep a stream alive are no
beginning. A stream that has begun ends with an error event `engine_lost` instead, for what another engine would sample
need not continue what the client has. See docs/adr/0021-a-begun-stream-is-not-resumed.md.
"""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Callable

import msgspec

from serving.errors import ApiError, unavailable

log = logging.getLogger("serving")

_TRIES = 4
_FIRST_PAUSE_S = 0.1
#: In the body of a 503 of an engine that is gone, or going.
_GOING = (b"draining", b"engine_stopped")


class EngineLost(Exception):
    """An engine went away before its answer was complete."""


@dataclasses.dataclass(frozen=True)
class Forwarded:
    """A request on its way to an engine. `digests`: see prefix_digests.prefix_digests."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes
    digests: tuple[bytes, ...] = ()


@dataclasses.dataclass(frozen=True)
class Head:
    """How an answer begins. `body`: all of it; None for a stream, whose events follow."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes | None


#: An engine's answer: a Head, then the whole events of a stream.
Answer = AsyncGenerator[Head | bytes, None]


async def relay(
    ask: Callable[[Forwarded], Answer], request: Forwarded, first_pause_s: float = _FIRST_PAUSE_S
) -> Answer:
    """The answer as the client is to have it. Closing this closes the engine's.

    Args:
        ask: sends the request to some engine, another one where that can be had; raises EngineLost.
        first_pause_s: before the second try; each further one waits four times as long.

    Raises:
        ApiError: 503, no engine answered; or what `ask` raises.
    """
    opened = False
    for attempt in range(_TRIES):
        await asyncio.sleep(attempt and first_pause_s * 4 ** (attempt - 1))
        begun = False
        try:
            async with contextlib.aclosing(ask(request)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, Head):
                        _check(piece, opened)
                        if opened:
                            continue  # of a second try; the client has one already
                        opened = True
                    else:
                        begun = begun or not _only_comments(piece)
                    yield piece
            return
        except EngineLost as error:
            log.warning("an engine was lost, its answer %s: %s", "had begun" if begun else "had not begun", error)
            if begun:
                break
    failure = unavailable("The engine of this request was lost; send it again.", "engine_lost")
    if not opened:
        raise failure
    yield error_event(request.path, failure)


def _check(head: Head, opened: bool) -> None:
    """Raises EngineLost for an answer that is no use: the engine is going, or it refuses what another had begun to
    stream (then all of its tries will do, and the stream ends with an error)."""
    if head.status == 503 and any(code in (head.body or b"") for code in _GOING):
        raise EngineLost("it is shutting down, or has stopped")
    if opened and head.body is not None:
        raise EngineLost(f"the next one answers with status {head.status}")


async def whole_events(chunks: AsyncIterable[bytes]) -> AsyncGenerator[bytes, None]:
    """The same bytes, cut between events only: of an event that breaks off, nothing comes."""
    held = b""
    async for chunk in chunks:
        whole, end, held = (held + chunk).rpartition(b"\n\n")
        if end:
            yield whole + end


def _only_comments(events: bytes) -> bool:
    return all(line.startswith(b":") for line in events.split(b"\n") if line)


def error_event(path: str, error: ApiError) -> bytes:
    """The last event of a stream that failed, as each protocol has it."""
    if path.startswith("/v1/messages"):
        return b"event: error\ndata: " + msgspec.json.encode({"type": "error", **error.body()}) + b"\n\n"
    if path.startswith("/v1/responses"):
        body = {"type": "error", "code": error.code, "message": error.message, "param": None, "sequence_number": 0}
        return b"event: error\ndata: " + msgspec.json.encode(body) + b"\n\ndata: [DONE]\n\n"
    return b"data: " + msgspec.json.encode(error.body()) + b"\n\ndata: [DONE]\n\n"
