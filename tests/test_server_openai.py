"""The real openai client against the server: what it sends is understood, and what comes back fits its types."""

import contextlib

import openai
import pytest
from aiohttp.test_utils import TestServer

from jax_engine.testing.fake_engine import FakeAsyncEngine, echo
from serving.app import AppSettings, create_app

MESSAGES = [{"role": "user", "content": "hello"}]


@contextlib.asynccontextmanager
async def client_of(engine, key="any", **options):
    async with TestServer(create_app(engine, AppSettings(**options)), host="127.0.0.1") as server:
        base_url = str(server.make_url("/v1"))
        async with openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0) as client:
            yield client


async def test_models():
    async with client_of(FakeAsyncEngine(), served_model_names=["org/name"]) as client:
        assert [model.id async for model in client.models.list()] == ["org/name"]
        assert (await client.models.retrieve("org/name")).owned_by == "jax-engine"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("other")


async def test_completion():
    async with client_of(FakeAsyncEngine()) as client:
        answer = await client.completions.create(
            model="fake-model", prompt="hi", max_tokens=3, logprobs=1, extra_body={"top_k": 5, "ignore_eos": True}
        )
        assert answer.choices[0].text == "abc" and answer.choices[0].finish_reason == "length"
        assert answer.choices[0].logprobs.tokens == ["a", "b", "c"]
        assert answer.usage.total_tokens == 6
        stream = await client.completions.create(model="fake-model", prompt="hi", max_tokens=3, stream=True)
        assert [chunk.choices[0].text async for chunk in stream] == ["a", "b", "c"]


async def test_chat():
    async with client_of(FakeAsyncEngine()) as client:
        answer = await client.chat.completions.create(
            model="fake-model", messages=MESSAGES, max_completion_tokens=3, logprobs=True, top_logprobs=2, n=2, seed=1
        )
        assert [choice.message.content for choice in answer.choices] == ["abc", "bcd"]
        entry = answer.choices[0].logprobs.content[0]
        assert (entry.token, entry.bytes, len(entry.top_logprobs)) == ("a", [97], 2)
        assert answer.usage.prompt_tokens_details.cached_tokens == 4


async def test_chat_stream_through_the_clients_own_accumulator():
    async with client_of(FakeAsyncEngine(next_token=echo)) as client:
        request = {"model": "fake-model", "messages": MESSAGES, "stream_options": {"include_usage": True}}
        async with client.chat.completions.stream(**request, logprobs=True) as stream:
            async for _ in stream:
                pass
            answer = await stream.get_final_completion()
        assert answer.choices[0].message.content == "user: hello\nassistant: "
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens == len(answer.choices[0].logprobs.content) == 25


async def test_errors_become_the_clients_exceptions():
    engine = FakeAsyncEngine(max_waiting=0)
    async with client_of(engine) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.completions.create(model="fake-model", prompt="x", temperature=-1)
        assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
        with pytest.raises(openai.NotFoundError) as caught:
            await client.completions.create(model="other", prompt="x")
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.RateLimitError):
            await client.completions.create(model="fake-model", prompt="x")
        engine.shutdown()
        with pytest.raises(openai.InternalServerError):
            await client.completions.create(model="fake-model", prompt="x")
    async with client_of(FakeAsyncEngine(), key="wrong", api_keys=["right"]) as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()


async def test_failure_in_a_stream_becomes_an_exception():
    async with client_of(FakeAsyncEngine(fail_after=1)) as client:
        stream = await client.chat.completions.create(model="fake-model", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError):
            async for _ in stream:
                pass
