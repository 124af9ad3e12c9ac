"""POST /v1/chat/completions: a conversation through the model's chat template, answered whole or as a stream."""

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from aiohttp import web

from jax_engine import CompletionOutput, RequestOutput
from serving import logprobs
from serving.errors import bad_request, json_response
from serving.generation import Job, Prompt, Usage, off_loop, read_request
from serving.schema import ChatRequest
from serving.state import STATE, ServerState
from serving.stream import Events, stream_events


def add_routes(router: web.UrlDispatcher) -> None:
    """Adds this file's addresses."""
    router.add_post("/v1/chat/completions", create_chat_completion)


async def create_chat_completion(request: web.Request) -> web.StreamResponse:
    """Answers the last message of a conversation."""
    state = request.app[STATE]
    body, model = await read_request(request, ChatRequest)
    prompt = await _render(state, body, num_bytes=len(await request.read()))
    params = body.to_sampling_params(detokenize=True)
    job = Job(state, f"chatcmpl-{uuid.uuid4().hex}", [prompt], params, body.priority or 0)
    answer = _Answer(state, body, job, model)
    if body.stream:
        return await stream_events(request, answer.events(), state.keep_alive_s)
    return json_response(await answer.whole())


async def _render(state: ServerState, body: ChatRequest, num_bytes: int) -> Prompt:
    """The conversation as token ids; `num_bytes` is the size of the request.

    Raises:
        ApiError: 400, the model has no tokenizer, or content is missing.
        InvalidRequest: the chat template refuses the conversation.
    """
    tokenizer = state.engine.tokenizer
    if tokenizer is None:
        raise bad_request(
            "This model has no tokenizer, so it cannot chat: use /v1/completions with token ids.", "model"
        )
    messages = await off_loop(lambda: [message.to_template() for message in body.messages], num_bytes)
    options = body.template_options()
    rendered = await off_loop(lambda: tokenizer.chat_prompt(messages, **options), num_bytes)
    return Prompt(rendered.token_ids, rendered.text)


class _Answer:
    """The messages, logprobs and usage of one HTTP request, built as outputs come in."""

    def __init__(self, state: ServerState, body: ChatRequest, job: Job, model: str):
        self._body, self._job = body, job
        self._tokenizer: Any = state.engine.tokenizer
        self._usage = Usage(prompt_tokens=len(job.prompts[0].token_ids))
        self._head = {"id": job.request_id, "created": int(time.time()), "model": model}
        options = body.stream_options
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
        choice = {
            "index": completion.index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": self._logprobs(completion),
            "finish_reason": completion.finish_reason,
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
            if completion.text or self._body.logprobs or self._body.return_token_ids:
                choice = _delta(completion.index, {"content": completion.text}, self._logprobs(completion))
                if self._body.return_token_ids:
                    choice["token_ids"] = completion.token_ids
                chunks.append(self._chunk([choice]))
            if completion.finish_reason is not None:
                last = _delta(completion.index, {}) | {
                    "finish_reason": completion.finish_reason,
                    "stop_reason": completion.stop_reason,
                }
                chunks.append(self._chunk([last]))
        return chunks

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


def _delta(index: int, delta: dict[str, Any], shape: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": shape, "finish_reason": None}
