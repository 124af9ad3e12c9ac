"""POST /v1/responses: a conversation, answered whole or as typed events. Nothing is kept between requests."""

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from aiohttp import web

from jax_engine import CompletionOutput, FinishReason
from serving.chat import Chat, prepare
from serving.errors import ApiError, json_response
from serving.generation import Usage, read_request
from serving.responses_schema import ResponsesRequest
from serving.state import STATE
from serving.stream import Events, Framing, stream_events
from serving.tools.pieces import Piece

_ITEM_IDS = {"content": "msg", "reasoning": "rs", "call": "fc", "arguments": "fc"}


def add_routes(router: web.UrlDispatcher) -> None:
    """Adds this file's addresses."""
    router.add_post("/v1/responses", create_response)


async def create_response(request: web.Request) -> web.StreamResponse:
    """Answers the last message of a conversation."""
    state = request.app[STATE]
    body, model = await read_request(request, ResponsesRequest)
    chat = await prepare(state, body.to_chat(), f"resp_{uuid.uuid4().hex}", num_bytes=len(await request.read()))
    answer = _Answer(chat, body, model)
    if body.stream:
        framing = Framing(named=True, error=answer.failed)
        return await stream_events(request, answer.events(), state.keep_alive_s, framing)
    return json_response(await answer.whole())


class _Answer:
    """The response object, and the events that tell how it grows."""

    def __init__(self, chat: Chat, body: ResponsesRequest, model: str):
        self._job, self._output = chat.job, chat.new_output()
        self._usage = Usage(prompt_tokens=len(chat.prompt.token_ids))
        self._items: list[dict[str, Any]] = []
        self._parts: list[str] = []  # of the text of the item under way
        self._kind: str | None = None  # of the item under way
        self._number = 0
        form = msgspec.to_builtins(body.text.format) if body.text and body.text.format else {"type": "text"}
        self._response: dict[str, Any] = {
            "id": chat.job.request_id,
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": model,
            "output": self._items,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": chat.job.params.temperature,
            "text": {"format": form},
            "tool_choice": "auto" if body.tool_choice is None else msgspec.to_builtins(body.tool_choice),
            "tools": msgspec.to_builtins(body.tools or []),
            "top_p": chat.job.params.top_p,
            "truncation": body.truncation or "disabled",
            "usage": None,
            "user": body.user,
        }

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        (output,) = await self._job.results()
        self._usage.add(0, output)
        for _ in self._completion_events(output.outputs[0]):
            pass
        return self._response

    async def events(self) -> AsyncGenerator[Events, None]:
        """The events, in the order of OpenAI's API."""
        begun = False
        async with contextlib.aclosing(self._job.outputs()) as outputs:
            async for _, output in outputs:
                self._usage.add(0, output)
                events: Events = []
                if not begun:
                    begun = True
                    events += [self._state_event("created"), self._state_event("in_progress")]
                for completion in output.outputs:
                    events += self._completion_events(completion)
                yield events

    def failed(self, error: ApiError) -> dict[str, Any]:
        """The event of a failure in the middle."""
        return self._event("error", code=error.code, message=error.message, param=error.param)

    def _completion_events(self, completion: CompletionOutput) -> Events:
        events: Events = []
        ended = completion.finish_reason is not None
        for piece in self._output.push(completion.text, ended):
            events += self._piece_events(piece)
        if ended:
            cut = completion.finish_reason in (FinishReason.LENGTH, FinishReason.ABORT)
            status = "incomplete" if cut else "completed"
            events += self._close_item(status)
            self._response["status"] = status
            if completion.finish_reason is FinishReason.LENGTH:
                self._response["incomplete_details"] = {"reason": "max_output_tokens"}
            self._response["usage"] = self._usage_body()
            events.append(self._state_event(status))
        return events

    def _piece_events(self, piece: Piece) -> Events:
        kind = "call" if piece.kind == "arguments" else piece.kind
        events: Events = []
        if kind != self._kind or piece.kind == "call":
            events += self._close_item("completed")
            events += self._open_item(kind, piece)
        if piece.kind == "call":
            return events
        self._parts.append(piece.text)
        name = {"content": "output_text", "reasoning": "reasoning_text", "call": "function_call_arguments"}[kind]
        extra = {} if kind == "call" else {"content_index": 0}
        extra |= {"logprobs": []} if kind == "content" else {}
        return [*events, self._item_event(f"{name}.delta", delta=piece.text, **extra)]

    def _open_item(self, kind: str, piece: Piece) -> Events:
        self._kind, self._parts = kind, []
        item: dict[str, Any] = {"id": f"{_ITEM_IDS[kind]}_{uuid.uuid4().hex}", "status": "in_progress"}
        if kind == "call":
            call_id = self._output.call_id(piece.call)
            item |= {"type": "function_call", "call_id": call_id, "name": piece.text, "arguments": ""}
        elif kind == "content":
            item |= {"type": "message", "role": "assistant", "content": []}
        else:
            item |= {"type": "reasoning", "summary": [], "content": []}
        self._items.append(item)
        events = [self._event("output_item.added", output_index=len(self._items) - 1, item=dict(item))]
        if kind != "call":
            events.append(self._item_event("content_part.added", content_index=0, part=self._part("")))
        return events

    def _part(self, text: str) -> dict[str, Any]:
        if self._kind == "content":
            return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {"type": "reasoning_text", "text": text}

    def _close_item(self, status: str) -> Events:
        if self._kind is None:
            return []
        item, text = self._items[-1], "".join(self._parts)
        item["status"] = status
        if self._kind == "call":
            item["arguments"] = text
            events = [self._item_event("function_call_arguments.done", arguments=text, name=item["name"])]
        else:
            item["content"] = [self._part(text)]
            name = "output_text" if self._kind == "content" else "reasoning_text"
            extra = {"logprobs": []} if self._kind == "content" else {}
            events = [
                self._item_event(f"{name}.done", content_index=0, text=text, **extra),
                self._item_event("content_part.done", content_index=0, part=self._part(text)),
            ]
        self._kind = None
        return [*events, self._event("output_item.done", output_index=len(self._items) - 1, item=item)]

    def _item_event(self, name: str, /, **fields: Any) -> dict[str, Any]:
        return self._event(name, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **fields)

    def _state_event(self, name: str) -> dict[str, Any]:
        return self._event(name, response=dict(self._response) | {"output": list(self._items)})

    def _event(self, name: str, /, **fields: Any) -> dict[str, Any]:
        event = {"type": name if name == "error" else f"response.{name}", "sequence_number": self._number, **fields}
        self._number += 1
        return event

    def _num_reasoning_tokens(self) -> int:
        """As the reasoning's text is tokenized again, for the text alone shows what is reasoning."""
        tokenizer, text = self._job.state.engine.tokenizer, self._output.reasoning
        return len(tokenizer.encode(text, add_special_tokens=False)) if tokenizer and text else 0

    def _usage_body(self) -> dict[str, Any]:
        usage = self._usage.body()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._num_reasoning_tokens()},
            "total_tokens": usage["total_tokens"],
        }
