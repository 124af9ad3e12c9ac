"""The real openai client with tools, structured answers, Responses and embeddings."""

import json

import openai
import pytest
from aiohttp.test_utils import TestServer

from jax_engine.testing.fake_engine import FakeAsyncEngine
from serving.app import create_app
from tests.chatting import CALL, says

MESSAGES = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture
def client_of():
    """Runs `use(client)` against a server of an engine."""

    async def run(engine, use):
        async with TestServer(create_app(engine), host="127.0.0.1") as server:
            base_url = str(server.make_url("/v1"))
            async with openai.AsyncOpenAI(base_url=base_url, api_key="any", max_retries=0) as client:
                return await use(client)

    return run


async def test_tool_calls_whole_and_streamed(client_of):
    async def use(client):
        # Some versions of the client stream no other tools than strict ones.
        tool = {"type": "function", "function": {**TOOL["function"], "strict": True}}
        request = {"model": "fake-model", "messages": MESSAGES, "tools": [tool]}
        whole = (await client.chat.completions.create(**request)).choices[0]
        async with client.chat.completions.stream(**request) as stream:
            async for _ in stream:
                pass
            streamed = (await stream.get_final_completion()).choices[0]
        for choice in (whole, streamed):
            (call,) = choice.message.tool_calls
            assert choice.finish_reason == "tool_calls" and call.function.name == "weather"
            assert json.loads(call.function.arguments) == {"city": "Köln"}

    await client_of(says(f"Look.\n{CALL}"), use)


async def test_structured_answers(client_of):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}

    async def use(client):
        request = {"model": "fake-model", "messages": MESSAGES, "response_format": form}
        return await client.chat.completions.create(**request)

    answer = await client_of(says('{"a": 3}'), use)
    assert json.loads(answer.choices[0].message.content) == {"a": 3}


async def test_responses_whole_and_streamed(client_of):
    tool = {"type": "function", **TOOL["function"], "strict": False}

    async def use(client):
        request = {"model": "fake-model", "input": "hello", "tools": [tool], "instructions": "be brief"}
        whole = await client.responses.create(**request)
        async with client.responses.stream(**request) as stream:
            kinds = [event.type async for event in stream]
            streamed = await stream.get_final_response()
        assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
        for response in (whole, streamed):
            assert response.status == "completed" and response.output_text == "Look."
            call = response.output[-1]
            assert call.type == "function_call" and json.loads(call.arguments) == {"city": "Köln"}
            assert response.usage.total_tokens > 0

    await client_of(says(f"Look.\n{CALL}"), use)


async def test_embeddings(client_of):
    async def use(client):
        return await client.embeddings.create(model="fake-model", input=["ab", "c"])

    answer = await client_of(FakeAsyncEngine(), use)
    assert [len(entry.embedding) for entry in answer.data] == [4, 4]
