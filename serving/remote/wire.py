"""The language between the engine's process and the API processes: msgspec structs in frames with a length.

Used by hub.py and client.py. Frames go over a socket pair that was made before the process was started, so nobody else
can connect. Never pickle: what comes in is decoded into the types below or refused.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Literal

import msgspec
import numpy as np

from jax_engine import (
    CompletionOutput,
    EngineError,
    EngineStopped,
    FinishReason,
    InvalidRequest,
    Limits,
    QueueFull,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    SlowReader,
)
from jax_engine.request import PositionLogprobs
from jax_engine.tokenizer import PackedTokenizer
from serving.options import ServerOptions

log = logging.getLogger("serving")

#: Longest frame: a large tokenizer, or a prompt as long as any model's context.
MAX_FRAME_BYTES = 256 * 2**20
#: Bytes that may wait for a process that does not read, before it counts as broken.
MAX_UNSENT_BYTES = 256 * 2**20
_HEAD_BYTES = 4


class Submit(msgspec.Struct, tag=1, array_like=True):
    """A request. `number` names it on this connection from here on."""

    number: int
    request_id: str
    token_ids: list[int]
    params: SamplingParams
    priority: int
    embed: bool
    who: dict[str, str | None]


class StopAt(msgspec.Struct, tag=2, array_like=True):
    """A stop string was found in a completion's text."""

    number: int
    index: int
    stop: str


class Leave(msgspec.Struct, tag=3, array_like=True):
    """Nobody waits for a request any more."""

    number: int


class Abort(msgspec.Struct, tag=4, array_like=True):
    """A request is to end; its last output is waited for."""

    request_id: str


class Ask(msgspec.Struct, tag=5, array_like=True):
    """A question to the engine, to be answered by an Answer of the same number."""

    number: int
    what: Literal["view", "start_profile", "stop_profile", "reset_prefix_cache", "enter"]
    argument: float | str | None = None


class Exit(msgspec.Struct, tag=6, array_like=True):
    """The request that was let in by the question `number` (`enter`) has been answered, or given up."""

    number: int


class Serving(msgspec.Struct, tag=7, array_like=True):
    """The API process answers requests."""


class Beat(msgspec.Struct, tag=8, array_like=True):
    """The API process is alive."""


class Setup(msgspec.Struct, tag=1, array_like=True):
    """What an API process is told first. Keys come as digests."""

    options: ServerOptions
    api_keys: list[str]
    admin_keys: list[str]
    log_level: str
    log_format: str


class Ready(msgspec.Struct, tag=2, array_like=True):
    """The engine is there; what an API process has to know about it."""

    model_name: str
    limits: Limits
    tokenizer: PackedTokenizer | None
    sampling_defaults: dict[str, Any]
    eos_token_ids: list[int]
    max_unread_outputs: int


class Piece(msgspec.Struct, array_like=True):
    """What is new of one completion: a CompletionOutput without its text."""

    index: int
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[PositionLogprobs] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None


class Part(msgspec.Struct, tag=1, array_like=True):
    """What is new of one request. `metrics` come with the last part, prompt_logprobs with the first."""

    number: int
    pieces: list[Piece]
    finished: bool
    num_cached_tokens: int
    metrics: RequestMetrics | None = None
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    embedding: bytes | None = None
    error: str | None = None
    error_param: str | None = None


class Failure(msgspec.Struct, tag=2, array_like=True):
    """An EngineError that ends a request, or answers a question."""

    number: int
    kind: str
    message: str
    param: str | None = None
    retry_after: float = 0.0
    code: str | None = None


class Outputs(msgspec.Struct, tag=3, array_like=True):
    """What one step of the engine brought this process's requests."""

    parts: list[Part | Failure]


class Answer(msgspec.Struct, tag=4, array_like=True):
    """The answer to a question."""

    number: int
    value: msgspec.Raw
    failure: Failure | None = None


class Closing(msgspec.Struct, tag=5, array_like=True):
    """No new requests are to be taken."""

    reason: Literal["draining", "engine_stopped"]


ToEngine = Submit | StopAt | Leave | Abort | Ask | Exit | Serving | Beat
ToApi = Setup | Ready | Outputs | Answer | Closing

_KINDS: dict[str, type[EngineError]] = {
    kind.__name__: kind for kind in (InvalidRequest, QueueFull, EngineStopped, SlowReader)
}


def part(number: int, output: RequestOutput, *, first: bool) -> Part:
    """An output as it is sent."""
    return Part(
        number,
        [
            Piece(o.index, o.token_ids, o.cumulative_logprob, o.logprobs, o.finish_reason, o.stop_reason)
            for o in output.outputs
        ],
        output.finished,
        output.num_cached_tokens,
        output.metrics if output.finished else None,
        output.prompt_logprobs if first else None,
        None if output.embedding is None else output.embedding.astype("<f4").tobytes(),
        output.error,
        output.error_param,
    )


def completion(piece: Piece, text: str) -> CompletionOutput:
    """A piece with its text."""
    return CompletionOutput(
        piece.index,
        text,
        piece.token_ids,
        piece.cumulative_logprob,
        piece.logprobs,
        piece.finish_reason,
        piece.stop_reason,
    )


def embedding(data: bytes | None) -> np.ndarray | None:
    """[D] float32."""
    return None if data is None else np.frombuffer(data, "<f4")


def failure(number: int, error: EngineError) -> Failure:
    """An error as it is sent."""
    kind = next((name for name, kind in _KINDS.items() if isinstance(error, kind)), "EngineError")
    retry_after = getattr(error, "retry_after", 0.0)
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    return Failure(number, kind, str(error), param, retry_after, code)


def error(failure: Failure) -> EngineError:
    """The error that was sent."""
    if failure.kind == "InvalidRequest":
        return InvalidRequest(failure.message, failure.param, failure.code)
    if failure.kind == "QueueFull":
        return QueueFull(failure.message, failure.retry_after)
    return _KINDS.get(failure.kind, EngineError)(failure.message)


class Channel(asyncio.Protocol):
    """One end of a connection.

    Args:
        kind: of the messages that come in. receive: takes each. lost: called once, when there will be no more.
    """

    def __init__(self, kind: Any, receive: Callable[[Any], None], lost: Callable[[], None]):
        self._decode = msgspec.msgpack.Decoder(kind).decode
        self._encode = msgspec.msgpack.Encoder().encode
        self._receive, self._lost = receive, lost
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._transport = None
        self._lost()

    def data_received(self, data: bytes) -> None:
        """Takes the whole frames out of what has come in."""
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= _HEAD_BYTES:
            begin = start + _HEAD_BYTES
            size = int.from_bytes(self._buffer[start:begin], "big")
            if size > MAX_FRAME_BYTES:
                self._refuse(f"a frame of {size} bytes; at most {MAX_FRAME_BYTES} are allowed")
                return
            if len(self._buffer) - begin < size:
                break
            start = begin + size
            try:
                message = self._decode(self._buffer[begin:start])
            except msgspec.MsgspecError as problem:
                self._refuse(str(problem))
                return
            self._receive(message)
        del self._buffer[:start]

    def _refuse(self, problem: str) -> None:
        log.error("a message between the server's processes is not understood: %s", problem)
        self.abort()

    def send(self, message: Any) -> None:
        """Sends one message; after the end of the connection nothing happens.

        Raises:
            ValueError: it is longer than a frame may be.
        """
        if self._transport is None:
            return
        data = self._encode(message)
        if len(data) > MAX_FRAME_BYTES:
            raise ValueError(f"a message of {len(data)} bytes; at most {MAX_FRAME_BYTES} are allowed")
        self._transport.write(len(data).to_bytes(_HEAD_BYTES, "big") + data)
        if self._transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self._refuse("the other side does not read")

    def close(self) -> None:
        """Ends the connection once everything is sent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Ends the connection now."""
        self._buffer.clear()
        if self._transport is not None:
            self._transport.abort()
