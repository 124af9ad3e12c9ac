"""POST /v1/completions: prompts as text or token ids, answered whole or as a stream of server-sent events."""

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from aiohttp import web

from jax_engine import CompletionOutput, RequestOutput
from serving import logprobs
from serving.errors import bad_request, json_response
from serving.generation import Job, Prompt, Usage, read_request, tokenize
from serving.schema import CompletionRequest
from serving.state import STATE, ServerState
from serving.stream import Events, stream_events


def add_routes(router: web.UrlDispatcher) -> None:
    """Adds this file's addresses."""
    router.add_post("/v1/completions", create_completion)


async def create_completion(request: web.Request) -> web.StreamResponse:
    """Continues one prompt or several."""
    state = request.app[STATE]
    body, model = await read_request(request, CompletionRequest)
    engine = state.engine
    params = body.to_sampling_params(detokenize=engine.tokenizer is not None, defaults=engine.sampling_defaults)
    prompts = await tokenize(state, body.prompts(), body.add_special_tokens is not False)
    if body.echo and state.engine.tokenizer is None:
        raise bad_request("echo needs a tokenizer, which this model does not have", "echo")
    job = Job(state, f"cmpl-{uuid.uuid4().hex}", prompts, params, **body.scheduling())
    answer = _Answer(state, body, job, model)
    if body.stream:
        return await stream_events(request, answer.events(), state.keep_alive_s)
    return json_response(await answer.whole())


class _Answer:
    """The text, logprobs and usage of one HTTP request, built as outputs come in."""

    def __init__(self, state: ServerState, body: CompletionRequest, job: Job, model: str):
        self._body, self._job = body, job
        self._tokenizer: Any = state.engine.tokenizer
        self._token_text = logprobs.token_texts(self._tokenizer)
        self._usage = Usage(prompt_tokens=sum(len(prompt.token_ids) for prompt in job.prompts))
        self._head = {"id": job.request_id, "object": "text_completion", "created": int(time.time()), "model": model}
        self._prompt_logprobs: dict[int, Any] = {}
        self._offsets: dict[int, int] = {}  # choice -> characters so far; a choice that has begun is in it

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices = []
        for index, output in enumerate(await self._job.results()):
            self._note(index, output)
            for completion in sorted(output.outputs, key=lambda completion: completion.index):
                choice = self._choice(index, completion)
                if self._body.prompt_logprobs is not None:
                    choice["prompt_logprobs"] = logprobs.prompt_logprobs(output.prompt_logprobs, self._token_text)
                choices.append(choice)
        return {**self._head, "choices": choices, "usage": self._usage.body()}

    async def events(self) -> AsyncGenerator[Events, None]:
        """The answer in chunks, one per completion and output."""
        options = self._body.stream_options
        with_usage = bool(options and options.include_usage)
        running_usage = bool(options and options.continuous_usage_stats)
        async with contextlib.aclosing(self._job.outputs()) as outputs:
            async for index, output in outputs:
                self._note(index, output)
                chunks = [self._choice(index, completion) for completion in output.outputs]
                events = [{**self._head, "choices": [choice]} for choice in chunks if _says_something(choice)]
                if with_usage or running_usage:
                    events = [{**event, "usage": self._usage.body() if running_usage else None} for event in events]
                yield events
        if with_usage:
            yield [{**self._head, "choices": [], "usage": self._usage.body()}]

    def _note(self, index: int, output: RequestOutput) -> None:
        if self._body.echo_only:
            for completion in output.outputs:
                completion.text, completion.token_ids = "", []
                completion.logprobs = None if completion.logprobs is None else []
        if output.prompt_logprobs is not None:
            self._prompt_logprobs[index] = output.prompt_logprobs
        self._usage.add(index, output)

    def _choice(self, index: int, completion: CompletionOutput) -> dict[str, Any]:
        number = index * self._job.params.n + completion.index
        prompt = self._job.prompts[index]
        begins = number not in self._offsets
        echoes = begins and bool(self._body.echo)
        choice = {
            "index": number,
            "text": (self._prompt_text(prompt) if echoes else "") + completion.text,
            "logprobs": self._logprobs(number, index, completion, echoes),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = completion.token_ids
            if begins:
                choice["prompt_token_ids"] = prompt.token_ids
        return choice

    def _logprobs(self, number: int, index: int, completion: CompletionOutput, echoes: bool) -> dict[str, Any] | None:
        offset = self._offsets.setdefault(number, 0)
        if self._body.logprobs is None:
            return None
        positions, token_ids = list(completion.logprobs or ()), list(completion.token_ids)
        if echoes:
            positions = [*self._prompt_logprobs[index], *positions]
            token_ids = [*self._job.prompts[index].token_ids, *token_ids]
        shape, self._offsets[number] = logprobs.completion_logprobs(
            positions, token_ids, self._token_text, num_top=self._body.logprobs, offset=offset
        )
        return shape

    def _prompt_text(self, prompt: Prompt) -> str:
        return self._tokenizer.decode(prompt.token_ids, False) if prompt.text is None else prompt.text


def _says_something(choice: dict[str, Any]) -> bool:
    """Whether a chunk is worth sending: bytes of an unfinished character make none."""
    return bool(choice["text"] or choice["finish_reason"] or choice["logprobs"] or choice.get("token_ids"))
