"""Tools, reasoning and structured answers in chats: what the model is told, and what the client gets."""

import contextlib
import json

import pytest
from aiohttp.test_utils import TestClient, TestServer

from jax_engine.testing.fake_engine import FakeAsyncEngine
from serving.app import AppSettings, create_app
from tests.chatting import CALL, says

MESSAGES = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@contextlib.asynccontextmanager
async def client_of(engine, **options):
    async with TestClient(TestServer(create_app(engine, AppSettings(**options)))) as client:
        yield client


async def post(engine, body, **options):
    async with client_of(engine, **options) as client:
        response = await client.post("/v1/chat/completions", json={"messages": MESSAGES} | body)
        assert response.status == 200, await response.text()
        if not body.get("stream"):
            return await response.json()
        frames = (await response.text()).split("\n\n")
        assert frames[-2:] == ["data: [DONE]", ""]
        return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


async def test_a_call_with_reasoning_and_content():
    engine = says(f"<think>\nHm.\n</think>\n\nLet me look.\n{CALL}")
    (choice,) = (await post(engine, {"tools": [TOOL]}))["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["content"] == "Let me look." and message["reasoning_content"] == "Hm."
    (call,) = message["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"]["name"] == "weather" and json.loads(call["function"]["arguments"]) == {"city": "Köln"}
    assert engine.tokenizer.options["tools"] == [TOOL]


async def test_the_same_in_a_stream():
    chunks = await post(says(f"<think>Hm.</think>Look.\n{CALL}"), {"tools": [TOOL], "stream": True})
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
    assert "".join(delta.get("content", "") for delta in deltas) == "Look."
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert calls[0]["function"] == {"name": "weather", "arguments": ""} and {call["index"] for call in calls} == {0}
    assert json.loads("".join(call["function"]["arguments"] for call in calls)) == {"city": "Köln"}
    assert len(calls) > 5, "arguments are streamed as they come"
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_without_tools_or_with_choice_none_a_call_is_text():
    for fields in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        engine = says(CALL)
        (choice,) = (await post(engine, fields))["choices"]
        assert choice["message"]["content"] == CALL and choice["finish_reason"] == "stop"
        assert engine.tokenizer.options["tools"] is None


@pytest.mark.parametrize(
    ("fields", "has_grammar"),
    [
        ({}, False),
        ({"tool_choice": "auto"}, False),
        ({"tool_choice": "required"}, True),
        ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, True),
        ({"response_format": {"type": "json_object"}}, True),
        ({"tools": [{"type": "function", "function": TOOL["function"] | {"strict": True}}]}, True),
    ],
)
async def test_which_choices_are_constrained(fields, has_grammar):
    engine = says(CALL)
    (choice,) = (await post(engine, {"tools": [TOOL]} | fields))["choices"]
    structured = engine.submitted[0][2].structured_outputs
    assert (structured is not None) == has_grammar
    if has_grammar:
        assert '"const": "weather"' in structured.grammar
    named = isinstance(fields.get("tool_choice"), dict)
    assert choice["finish_reason"] == ("stop" if named else "tool_calls")


async def test_one_call_where_parallel_calls_are_off():
    answer = await post(says(CALL + "\n" + CALL), {"tools": [TOOL], "parallel_tool_calls": False})
    assert len(answer["choices"][0]["message"]["tool_calls"]) == 1
    answer = await post(says(CALL + "\n" + CALL), {"tools": [TOOL]})
    assert len(answer["choices"][0]["message"]["tool_calls"]) == 2


async def test_response_formats_become_grammars():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for form in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}):
        engine = FakeAsyncEngine()
        async with client_of(engine) as client:
            body = {"messages": MESSAGES, "max_tokens": 1, "response_format": form}
            assert (await client.post("/v1/chat/completions", json=body)).status == 200
        structured = engine.submitted[0][2].structured_outputs
        assert structured.json_object or json.loads(structured.json) == schema


async def test_reasoning_may_be_left_out():
    answer = await post(says("<think>Hm.</think>Yes."), {"include_reasoning": False})
    message = answer["choices"][0]["message"]
    assert message["content"] == "Yes." and "reasoning_content" not in message


async def test_parsers_named_by_the_operator():
    answer = await post(says("<think>Hm.</think>Yes."), {}, reasoning_parser="none")
    assert answer["choices"][0]["message"]["content"] == "<think>Hm.</think>Yes."
    text = '{"name": "weather", "parameters": {}}'
    answer = await post(says(text), {"tools": [TOOL]}, tool_call_parser="llama3")
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "weather"


async def test_the_history_of_a_tool_call_reaches_the_template():
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Hm."},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    engine = says("Sunny.")
    answer = await post(engine, {"messages": messages, "tools": [TOOL]})
    assert answer["choices"][0]["message"]["content"] == "Sunny."
    assert b"tool: sunny" in bytes(engine.submitted[0][1][1:])


async def test_echo_of_a_continued_message():
    messages = [*MESSAGES, {"role": "assistant", "content": "The answer is "}]
    fields = {"messages": messages, "continue_final_message": True, "echo": True}
    answer = await post(says("42"), fields)
    assert answer["choices"][0]["message"]["content"] == "The answer is 42"
    chunks = await post(says("42"), fields | {"stream": True})
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "The answer is 42"
