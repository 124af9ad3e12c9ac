"""POST /v1/messages and /v1/messages/count_tokens: chats as Anthropic's API has them, whole or as typed events.

Errors have the shape of both APIs: Anthropic's `type` around OpenAI's `error`.
"""

import contextlib
import functools
import json
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from aiohttp import web

from jax_engine import CompletionOutput, FinishReason
from serving.chat import Chat, prepare
from serving.errors import ApiError, json_response, to_api_error
from serving.generation import Usage, read_request
from serving.messages_schema import CountTokensRequest, MessagesRequest
from serving.state import STATE
from serving.stream import Events, Framing, stream_events
from serving.tools.pieces import Piece

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def add_routes(router: web.UrlDispatcher) -> None:
    """Adds this file's addresses."""
    router.add_post("/v1/messages", _with_errors(create_message))
    router.add_post("/v1/messages/count_tokens", _with_errors(count_tokens))


def _with_errors(handler: _Handler) -> _Handler:
    @functools.wraps(handler)
    async def wrapped(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except ConnectionError:
            raise
        except Exception as error:
            api_error = to_api_error(error)
            response = api_error.response()
            response.body = json_response(_error_event(api_error)).body
            return response

    return wrapped


def _error_event(error: ApiError) -> dict[str, Any]:
    return {"type": "error", **error.body()}


_FRAMING = Framing(named=True, done=b"", error=_error_event)


async def count_tokens(request: web.Request) -> web.Response:
    """How many tokens a conversation has."""
    state = request.app[STATE]
    body, _ = await read_request(request, CountTokensRequest)
    chat = await prepare(state, body.to_chat(), "", num_bytes=len(await request.read()))
    return json_response({"input_tokens": len(chat.prompt.token_ids)})


async def create_message(request: web.Request) -> web.StreamResponse:
    """Answers the last message of a conversation."""
    state = request.app[STATE]
    body, model = await read_request(request, MessagesRequest)
    chat = await prepare(state, body.to_chat(), f"msg_{uuid.uuid4().hex}", num_bytes=len(await request.read()))
    answer = _Answer(chat, model)
    if body.stream:
        return await stream_events(request, answer.events(), state.keep_alive_s, _FRAMING)
    return json_response(await answer.whole())


class _Answer:
    """The message object, and the events that tell how it grows."""

    def __init__(self, chat: Chat, model: str):
        self._job, self._output = chat.job, chat.new_output()
        self._usage = Usage(prompt_tokens=len(chat.prompt.token_ids))
        self._blocks: list[dict[str, Any]] = []
        self._kind: str | None = None  # of the block under way
        self._parts: list[str] = []
        self._message: dict[str, Any] = {
            "id": chat.job.request_id,
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": self._blocks,
            "stop_reason": None,
            "stop_sequence": None,
        }

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        (output,) = await self._job.results()
        self._usage.add(0, output)
        for _ in self._completion_events(output.outputs[0]):
            pass
        for block in self._blocks:
            if block["type"] == "tool_use":
                block["input"] = _json_object(block["input"])
        return self._message | {"usage": self._usage_body()}

    async def events(self) -> AsyncGenerator[Events, None]:
        """The events, in the order of Anthropic's API."""
        begun = False
        async with contextlib.aclosing(self._job.outputs()) as outputs:
            async for _, output in outputs:
                events: Events = []
                if not begun:
                    begun = True
                    message = self._message | {"content": [], "usage": self._usage_body()}
                    events = [{"type": "message_start", "message": message}, {"type": "ping"}]
                self._usage.add(0, output)
                for completion in output.outputs:
                    events += self._completion_events(completion)
                yield events

    def _completion_events(self, completion: CompletionOutput) -> Events:
        events: Events = []
        ended = completion.finish_reason is not None
        for piece in self._output.push(completion.text, ended):
            events += self._piece_events(piece)
        if not ended:
            return events
        events += self._close_block()
        is_text = isinstance(completion.stop_reason, str)
        self._message["stop_sequence"] = completion.stop_reason if is_text else None
        self._message["stop_reason"] = self._stop_reason(completion.finish_reason, is_text)
        delta = {name: self._message[name] for name in ("stop_reason", "stop_sequence")}
        return [
            *events,
            {"type": "message_delta", "delta": delta, "usage": self._usage_body()},
            {"type": "message_stop"},
        ]

    def _stop_reason(self, reason: FinishReason | None, at_stop_sequence: bool) -> str:
        if reason is not FinishReason.STOP:
            return "max_tokens"
        if at_stop_sequence:
            return "stop_sequence"
        return "tool_use" if self._output.calls else "end_turn"

    def _piece_events(self, piece: Piece) -> Events:
        kind = "call" if piece.kind == "arguments" else piece.kind
        events: Events = []
        if kind != self._kind or piece.kind == "call":
            events += self._close_block() + self._open_block(kind, piece)
        if piece.kind == "call":
            return events
        self._parts.append(piece.text)
        delta = {
            "content": {"type": "text_delta", "text": piece.text},
            "reasoning": {"type": "thinking_delta", "thinking": piece.text},
            "call": {"type": "input_json_delta", "partial_json": piece.text},
        }[kind]
        return [*events, {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}]

    def _open_block(self, kind: str, piece: Piece) -> Events:
        self._kind, self._parts = kind, []
        if kind == "call":
            call_id = self._output.call_id(piece.call)
            block: dict[str, Any] = {"type": "tool_use", "id": call_id, "name": piece.text, "input": {}}
        elif kind == "content":
            block = {"type": "text", "text": ""}
        else:
            block = {"type": "thinking", "thinking": "", "signature": ""}
        self._blocks.append(block)
        return [{"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": dict(block)}]

    def _close_block(self) -> Events:
        if self._kind is None:
            return []
        key = {"content": "text", "reasoning": "thinking", "call": "input"}[self._kind]
        self._blocks[-1][key] = "".join(self._parts)
        self._kind = None
        return [{"type": "content_block_stop", "index": len(self._blocks) - 1}]

    def _usage_body(self) -> dict[str, Any]:
        usage = self._usage.body()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "output_tokens": usage["completion_tokens"],
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
        }


def _json_object(text: str) -> dict[str, Any]:
    """The arguments of a call; those that the model has not written as an object come under `raw`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"raw": text}
