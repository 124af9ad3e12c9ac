"""Between the routes and the engine: reading a request, token ids from texts, prompts run side by side, usage.

Called by the completion and chat routes. Whatever happens to the handler (an error, a client that left), the engine's
streams are closed, which aborts their requests.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from jax_engine import RequestOutput, SamplingParams
from serving.errors import ApiError, bad_request, internal_error, log
from serving.schema import Body, parse
from serving.state import STATE, ServerState

#: Texts longer than this are tokenized off the event loop; shorter ones take less time than the change of thread.
_LONG_TEXT_CHARS = 4096


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready for the engine. `text` is what the client sent, where it sent text."""

    token_ids: Sequence[int]
    text: str | None = None


@dataclass(frozen=True)
class Job:
    """The engine's part of one HTTP request: all its prompts, with the same settings."""

    state: ServerState
    request_id: str
    prompts: Sequence[Prompt]
    params: SamplingParams
    priority: int = 0
    user: str | None = None
    slo_class: str | None = None
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        if self.params.truncate_prompt_tokens is not None:
            longest = self.state.engine.limits.max_model_len
            kept = [Prompt(self.params.truncated(list(prompt.token_ids), longest)) for prompt in self.prompts]
            object.__setattr__(self, "prompts", kept)

    async def outputs(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """(index of the prompt, output) as the engine yields them.

        Raises:
            InvalidRequest, QueueFull, EngineStopped: the engine does not take a request.
            ApiError: 500, a request failed inside.
        """
        if len(self.prompts) == 1:
            streams = self._one(0)
        else:
            streams = _merge([self._one(index) for index in range(len(self.prompts))])
        async with contextlib.aclosing(streams):
            async for index, output in streams:
                if output.error is not None and output.error_param is not None:
                    raise bad_request(output.error, output.error_param, "no_token_allowed")
                if output.error is not None:
                    log.error("request %s failed in the engine: %s", output.request_id, output.error)
                    raise internal_error()
                yield index, output

    async def results(self) -> list[RequestOutput]:
        """The final output of each prompt, in the prompts' order. For settings with FINAL_ONLY."""
        finals: dict[int, RequestOutput] = {}
        async with contextlib.aclosing(self.outputs()) as outputs:
            async for index, output in outputs:
                finals[index] = output
        return [finals[index] for index in range(len(self.prompts))]

    async def _one(self, index: int) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        request_id = self.request_id if len(self.prompts) == 1 else f"{self.request_id}-{index}"
        stream = self.state.engine.generate(
            self.prompts[index].token_ids,
            self.params,
            request_id,
            priority=self.priority,
            user=self.user,
            slo_class=self.slo_class,
            cache_salt=self.cache_salt,
        )
        tracing = self.state.tracing
        trace = None if tracing is None else tracing.begin(request_id, self.state.model_names[0], self.params)
        self.state.live.add(request_id)
        try:
            async with contextlib.aclosing(stream):  # type: ignore[type-var]
                async for output in stream:
                    if trace is not None:
                        trace.see(output)
                    yield index, output
        finally:
            self.state.live.discard(request_id)
            if trace is not None:
                trace.end()


async def _merge(streams: Sequence[AsyncGenerator[Any, None]]) -> AsyncGenerator[Any, None]:
    """Items of all streams as they come; the first failure ends all. Holds at most a few items per stream."""
    queue: asyncio.Queue[tuple[Any, Exception | None, bool]] = asyncio.Queue(maxsize=2 * len(streams))

    async def pump(stream: AsyncGenerator[Any, None]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for item in stream:
                    await queue.put((item, None, False))
        except Exception as error:
            await queue.put((None, error, True))
        else:
            await queue.put((None, None, True))

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        num_open = len(tasks)
        while num_open:
            item, error, ended = await queue.get()
            if error is not None:
                raise error
            if ended:
                num_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class Usage:
    """Tokens of one HTTP request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: dict[int, int] = field(default_factory=dict)

    def add(self, prompt_index: int, output: RequestOutput) -> None:
        """Counts an output that holds only what is new, or all of a request's tokens."""
        self.completion_tokens += sum(len(completion.token_ids) for completion in output.outputs)
        self.cached[prompt_index] = output.num_cached_tokens

    def body(self) -> dict[str, Any]:
        """The `usage` object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
        }


async def read_request[T: Body](request: web.Request, schema: type[T]) -> tuple[T, str]:
    """The checked body and the served model name.

    Raises:
        ApiError: 503 while shutting down, 415 for what is not JSON, 400 for a bad body, 404 for an unknown model.
        HTTPRequestEntityTooLarge: the body is too large.
    """
    state = request.app[STATE]
    state.check_open()
    if request.content_type != "application/json":
        raise ApiError(
            415,
            f"The body must be JSON: send `Content-Type: application/json`, not {request.content_type!r}.",
            code="unsupported_media_type",
        )
    body = parse(await request.read(), schema)
    return body, state.check_model(body.model)


async def tokenize(state: ServerState, prompts: Sequence[str | list[int]], add_special_tokens: bool) -> list[Prompt]:
    """Token ids of all prompts, which are of one kind; an empty one is left to the engine to refuse.

    Raises:
        ApiError: 400, too many prompts, or text for a model without tokenizer.
    """
    if len(prompts) > state.max_prompts:
        raise bad_request(f"{len(prompts)} prompts in one request; at most {state.max_prompts} are allowed", "prompt")
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if not texts:
        return [Prompt(prompt) for prompt in prompts if not isinstance(prompt, str)]
    tokenizer = state.engine.tokenizer
    if tokenizer is None:
        raise bad_request("This model has no tokenizer: give the prompt as token ids.", "prompt")

    def encode() -> list[Prompt]:
        return [Prompt(tokenizer.encode(text, add_special_tokens=add_special_tokens), text) for text in texts]

    return await off_loop(encode, sum(map(len, texts)))


async def off_loop[T](work: Callable[[], T], num_chars: int) -> T:
    """Runs work on that much text, in another thread where it would hold up the streams."""
    return await asyncio.to_thread(work) if num_chars > _LONG_TEXT_CHARS else work()
