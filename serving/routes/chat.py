"""POST /v1/chat/completions: a conversation, answered whole or as a stream of server-sent events."""

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from aiohttp import web

from jax_engine import CompletionOutput, RequestOutput
from serving import logprobs
from serving.chat import Chat, prepare
from serving.chat_output import ChatOutput
from serving.chat_schema import ChatRequest
from serving.errors import json_response
from serving.generation import Usage, read_request
from serving.state import STATE
from serving.stream import Events, stream_events


def add_routes(router: web.UrlDispatcher) -> None:
    """Adds this file's addresses."""
    router.add_post("/v1/chat/completions", create_chat_completion)


async def create_chat_completion(request: web.Request) -> web.StreamResponse:
    """Answers the last message of a conversation."""
    state = request.app[STATE]
    body, model = await read_request(request, ChatRequest)
    chat = await prepare(state, body, f"chatcmpl-{uuid.uuid4().hex}", num_bytes=len(await request.read()))
    answer = _Answer(chat, model)
    if body.stream:
        return await stream_events(request, answer.events(), state.keep_alive_s)
    return json_response(await answer.whole())


class _Answer:
    """The messages, logprobs and usage of one HTTP request, built as outputs come in."""

    def __init__(self, chat: Chat, model: str):
        self._body, self._job, self._forced = chat.body, chat.job, chat.forced
        self._choices = [chat.new_output() for _ in range(chat.job.params.n)]
        self._tokenizer: Any = chat.job.state.engine.tokenizer
        self._usage = Usage(prompt_tokens=len(chat.prompt.token_ids))
        self._head = {"id": chat.job.request_id, "created": int(time.time()), "model": model}
        options = chat.body.stream_options
        self._with_usage = bool(options and options.include_usage)
        self._running_usage = bool(options and options.continuous_usage_stats)

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        (output,) = await self._job.results()
        self._usage.add(0, output)
        answer = {
            **self._head,
            "object": "chat.completion",
            "choices": [
                self._choice(completion) for completion in sorted(output.outputs, key=lambda choice: choice.index)
            ],
            "usage": self._usage.body(),
        }
        if self._body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = logprobs.prompt_logprobs(output.prompt_logprobs, self._tokenizer.token_text)
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = self._job.prompts[0].token_ids
        return answer

    def _choice(self, completion: CompletionOutput) -> dict[str, Any]:
        output = self._choices[completion.index]
        output.push(completion.text, ended=True)
        choice = {
            "index": completion.index,
            "message": output.message(),
            "logprobs": self._logprobs(completion),
            "finish_reason": output.finish_reason(completion.finish_reason, forced=self._forced),
            "stop_reason": completion.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = completion.token_ids
        return choice

    async def events(self) -> AsyncGenerator[Events, None]:
        """The answer in chunks: for each choice its role, its text, its finish reason; then the usage."""
        begun = False
        async with contextlib.aclosing(self._job.outputs()) as outputs:
            async for _, output in outputs:
                self._usage.add(0, output)
                events = [] if begun else self._role_chunks()
                begun = True
                yield events + self._output_chunks(output)
        if self._with_usage:
            yield [self._chunk([]) | {"usage": self._usage.body()}]

    def _role_chunks(self) -> Events:
        delta = {"role": "assistant", "content": ""}
        chunks = [self._chunk([_delta(index, dict(delta))]) for index in range(self._job.params.n)]
        if self._body.return_token_ids:
            chunks[0]["prompt_token_ids"] = self._job.prompts[0].token_ids
        return chunks

    def _output_chunks(self, output: RequestOutput) -> Events:
        chunks = []
        for completion in output.outputs:
            chunks += self._completion_chunks(completion, self._choices[completion.index])
        return chunks

    def _completion_chunks(self, completion: CompletionOutput, output: ChatOutput) -> Events:
        ended = completion.finish_reason is not None
        deltas = [output.delta(piece) for piece in output.push(completion.text, ended)]
        if not deltas and (self._body.logprobs or self._body.return_token_ids):
            deltas = [{"content": ""}]
        choices = [_delta(completion.index, delta) for delta in deltas]
        if choices:
            choices[0]["logprobs"] = self._logprobs(completion)
            if self._body.return_token_ids:
                choices[0]["token_ids"] = completion.token_ids
        if ended:
            reason = output.finish_reason(completion.finish_reason, forced=self._forced)
            choices.append(
                _delta(completion.index, {}) | {"finish_reason": reason, "stop_reason": completion.stop_reason}
            )
        return [self._chunk([choice]) for choice in choices]

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        if self._with_usage or self._running_usage:
            chunk["usage"] = self._usage.body() if self._running_usage else None
        return chunk

    def _logprobs(self, completion: CompletionOutput) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return logprobs.chat_logprobs(
            completion.logprobs or (), completion.token_ids, self._tokenizer, num_top=self._body.top_logprobs or 0
        )


def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
