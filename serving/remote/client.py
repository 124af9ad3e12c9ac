"""RemoteEngine: the engine, as the routes of an API process see it. Text is made here; the engine sees token ids only.

Made by worker.py. Implements engine_client.EngineClient and limits.Slots. When the connection ends, every stream ends
with EngineStopped.
"""

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import msgspec

from jax_engine import EngineError, EngineStopped, InvalidRequest, Limits, RequestOutput, SamplingParams
from jax_engine.engine_view import EngineView
from jax_engine.output_stream import OutputStream
from jax_engine.sampling_params import embedding_params
from jax_engine.tokenizer import Tokenizer
from serving.limits import too_many_requests
from serving.remote import wire
from serving.remote.request import RemoteRequest
from serving.remote.wire import Channel


class RemoteEngine:
    """The engine at the other end of a channel.

    Args:
        channel: whose messages go to `receive`, and whose end to `lose`.
        facts: what the engine has said of itself.
        limit: requests of one client at a time, over all API processes; 0 for none.
    """

    def __init__(self, channel: Channel, facts: wire.Ready, limit: int):
        self.model_name = facts.model_name
        self.limits: Limits = facts.limits
        self.tokenizer: Tokenizer | None = None if facts.tokenizer is None else facts.tokenizer.unpack()
        self.sampling_defaults: Mapping[str, Any] = facts.sampling_defaults
        self.is_alive = True
        self._channel, self._limit = channel, limit
        self._eos_token_ids, self._max_unread = frozenset(facts.eos_token_ids), facts.max_unread_outputs
        self._numbers = itertools.count()
        self._requests: dict[int, RemoteRequest] = {}
        self._answers: dict[int, asyncio.Future[wire.Answer]] = {}

    def receive(self, message: wire.Outputs | wire.Answer) -> None:
        """Takes in what the engine says."""
        if isinstance(message, wire.Answer):
            answer = self._answers.pop(message.number, None)
            if answer is not None and not answer.done():
                answer.set_result(message)
            return
        for part in message.parts:
            request = self._requests.get(part.number)
            if request is not None:
                if isinstance(part, wire.Failure):
                    request.fail(wire.error(part))
                else:
                    request.take(part)
                if request.ended:
                    del self._requests[part.number]

    def lose(self) -> None:
        """Tells everybody that the engine is gone."""
        self.is_alive = False
        stopped = EngineStopped("the engine has stopped")
        for request in self._requests.values():
            request.fail(stopped)
        self._requests.clear()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(stopped)
        self._answers.clear()

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        embed: bool = False,
        **who: str | None,
    ) -> AsyncIterator[RequestOutput]:
        """See AsyncEngine.generate."""
        token_ids = sampling_params.truncated(self._token_ids(prompt), self.limits.max_model_len)
        if not self.is_alive:
            raise EngineStopped("the engine takes no more requests")
        number, request_id = next(self._numbers), request_id or uuid.uuid4().hex
        stream = OutputStream(request_id, sampling_params.output_kind, self._max_unread, lambda _: self._leave(number))
        request = RemoteRequest(
            stream, token_ids, sampling_params, self.tokenizer, self._eos_token_ids, self._stopper(number)
        )
        self._requests[number] = request
        try:
            self._channel.send(wire.Submit(number, request_id, token_ids, request.params, priority, embed, who))
            finished = False
            while not finished:
                output = await stream.get()
                if isinstance(output, EngineError):
                    raise output
                finished = output.finished
                yield output
        finally:
            self._leave(number)

    def _token_ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidRequest("the model has no tokenizer: give the prompt as token ids", "prompt")
            return self.tokenizer.encode(prompt)
        return list(prompt)

    def _stopper(self, number: int) -> Callable[[int, str], None]:
        return lambda index, stop: self._channel.send(wire.StopAt(number, index, stop))

    def _leave(self, number: int) -> None:
        if self._requests.pop(number, None) is not None:
            self._channel.send(wire.Leave(number))

    async def embed(self, prompt: str | Sequence[int], *, truncate: bool = False) -> RequestOutput:
        """See AsyncEngine.embed."""
        async with contextlib.aclosing(self.generate(prompt, embedding_params(truncate), embed=True)) as stream:  # type: ignore[type-var]
            return await anext(stream)

    async def abort(self, request_id: str) -> None:
        """See AsyncEngine.abort."""
        self._channel.send(wire.Abort(request_id))

    async def view(self, seconds: float = 0.0) -> EngineView:
        """See AsyncEngine.view."""
        return msgspec.msgpack.decode(await self._ask("view", seconds), type=EngineView)

    async def start_profile(self, folder: str) -> None:
        """See AsyncEngine.start_profile."""
        await self._ask("start_profile", folder)

    async def stop_profile(self) -> None:
        """See AsyncEngine.stop_profile."""
        await self._ask("stop_profile")

    async def reset_prefix_cache(self) -> None:
        """See AsyncEngine.reset_prefix_cache."""
        await self._ask("reset_prefix_cache")

    @contextlib.asynccontextmanager
    async def slot(self, client: str) -> AsyncGenerator[None]:
        """See limits.ClientSlots.slot."""
        if not self._limit:
            yield
            return
        number = next(self._numbers)
        try:
            if not msgspec.msgpack.decode(await self._ask("enter", client, number)):
                raise too_many_requests(self._limit)
            yield
        finally:
            self._channel.send(wire.Exit(number))  # also where the answer was not waited for: it may have been yes

    async def _ask(self, what: Any, argument: float | str | None = None, number: int | None = None) -> msgspec.Raw:
        if not self.is_alive:
            raise EngineStopped("the engine has stopped")
        number = next(self._numbers) if number is None else number
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self._channel.send(wire.Ask(number, what, argument))
        try:
            found = await answer
        finally:
            self._answers.pop(number, None)
        if found.failure is not None:
            raise wire.error(found.failure)
        return found.value
