"""The other protocols: Responses, Anthropic's Messages, embeddings, tokens, OpenAPI."""

import base64
import contextlib
import json

import numpy as np
import pytest
from aiohttp.test_utils import TestClient, TestServer

from jax_engine.testing.fake_engine import FakeAsyncEngine
from serving.app import AppSettings, create_app
from tests.chatting import CALL, says

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
FUNCTION = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
INPUT_TOOL = {"name": "weather", "input_schema": {"type": "object"}}


@contextlib.asynccontextmanager
async def client_of(engine, **options):
    async with TestClient(TestServer(create_app(engine, AppSettings(**options)))) as client:
        yield client


async def post(engine, path, body, status=200):
    async with client_of(engine) as client:
        response = await client.post(path, json=body)
        assert response.status == status, await response.text()
        return await response.json()


async def events(engine, path, body):
    async with client_of(engine) as client:
        response = await client.post(path, json=body | {"stream": True})
        assert response.status == 200 and response.content_type == "text/event-stream"
        frames = (await response.text()).split("\n\n")
    assert frames[-1] == ""
    found = []
    for frame in frames[:-1]:
        if frame == "data: [DONE]":
            continue
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found, frames


async def test_response():
    engine = says("Yes.")
    answer = await post(engine, RESPONSES, {"input": "hello", "instructions": "be brief", "store": True})
    assert answer["object"] == "response" and answer["status"] == "completed" and answer["id"].startswith("resp_")
    (item,) = answer["output"]
    assert item["type"] == "message" and item["content"][0]["text"] == "Yes." and item["status"] == "completed"
    assert answer["usage"]["output_tokens"] == 5 and answer["usage"]["total_tokens"] > 5 and not answer["store"]
    assert bytes(engine.submitted[0][1][1:]).decode() == "system: be brief\nuser: hello\nassistant: "


async def test_response_that_is_cut():
    answer = await post(says("Yes."), RESPONSES, {"input": "hello", "max_output_tokens": 2})
    assert answer["status"] == "incomplete" and answer["incomplete_details"] == {"reason": "max_output_tokens"}


async def test_response_events():
    text = f"<think>Hm.</think>Look.\n{CALL}"
    found, frames = await events(says(text), RESPONSES, {"input": "hello", "tools": [FUNCTION]})
    assert frames[-2] == "data: [DONE]"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    kinds = [event["type"].removeprefix("response.") for event in found]
    assert kinds[:2] == ["created", "in_progress"] and kinds[-1] == "completed"
    once = list(dict.fromkeys(kinds))
    assert once == [
        "created", "in_progress", "output_item.added", "content_part.added", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done", "output_item.done", "output_text.delta", "output_text.done",
        "function_call_arguments.delta", "function_call_arguments.done", "completed",
    ]  # fmt: skip
    response = found[-1]["response"]
    assert [item["type"] for item in response["output"]] == ["reasoning", "message", "function_call"]
    reasoning, message, call = response["output"]
    assert reasoning["content"][0]["text"] == "Hm." and message["content"][0]["text"] == "Look."
    assert call["name"] == "weather" and json.loads(call["arguments"]) == {"city": "Köln"}
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] == 3
    deltas = [event["delta"] for event in found if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == "Look."


async def test_response_input_items():
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "weather?"}]},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}], "summary": []},
        {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
    ]
    engine = says("Sunny.")
    await post(engine, RESPONSES, {"input": items, "tools": [FUNCTION]})
    assert bytes(engine.submitted[0][1][1:]).decode() == "user: weather?\nassistant: \ntool: sunny\nassistant: "


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools"),
        ({"input": "x", "tool_choice": "required"}, "tool_choice"),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "text"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "temperature": 101}, "temperature"),
        ({"input": "x", "top_logprobs": 3}, "top_logprobs"),
        ({"input": "x", "guided_json": {}}, "guided_json"),
    ],
)
async def test_bad_responses(body, param):
    assert (await post(says("x"), RESPONSES, body, 400))["error"]["param"] == param


async def test_message():
    engine = says(f"<think>Hm.</think>Look.\n{CALL}")
    body = {"max_tokens": 300, "system": "be brief", "messages": [{"role": "user", "content": "hello"}]}
    answer = await post(engine, MESSAGES, body | {"tools": [INPUT_TOOL]})
    assert answer["type"] == "message" and answer["stop_reason"] == "tool_use" and answer["stop_sequence"] is None
    thinking, text, use = answer["content"]
    assert (
        thinking["type"] == "thinking" and thinking["thinking"] == "Hm." and text == {"type": "text", "text": "Look."}
    )
    assert use["type"] == "tool_use" and use["name"] == "weather" and use["input"] == {"city": "Köln"}
    assert set(answer["usage"]) >= {"input_tokens", "output_tokens"}
    assert engine.submitted[0][2].max_tokens == 300


@pytest.mark.parametrize(
    ("fields", "reason", "sequence"),
    [
        ({}, "end_turn", None),
        ({"max_tokens": 2}, "max_tokens", None),
        ({"stop_sequences": ["two"]}, "stop_sequence", "two"),
    ],
)
async def test_why_a_message_stops(fields, reason, sequence):
    body = {"max_tokens": 50, "messages": [{"role": "user", "content": "hello"}]} | fields
    answer = await post(says("one two three"), MESSAGES, body)
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)


async def test_message_events():
    body = {"max_tokens": 300, "messages": [{"role": "user", "content": "hello"}], "tools": [INPUT_TOOL]}
    found, frames = await events(says(f"Look.\n{CALL}"), MESSAGES, body)
    assert "[DONE]" not in frames[-2]
    kinds = [event["type"] for event in found]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert kinds[-2:] == ["message_delta", "message_stop"] and kinds.count("content_block_stop") == 2
    assert found[0]["message"]["content"] == [] and found[0]["message"]["usage"]["output_tokens"] == 0
    deltas = [event["delta"] for event in found if event["type"] == "content_block_delta"]
    assert "".join(delta.get("text", "") for delta in deltas) == "Look."
    assert json.loads("".join(delta.get("partial_json", "") for delta in deltas)) == {"city": "Köln"}
    assert found[-2]["delta"]["stop_reason"] == "tool_use" and found[-2]["usage"]["output_tokens"] > 20


async def test_blocks_become_messages():
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "weather?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": ""},
                {"type": "text", "text": "Look."},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Köln"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sunny"}]},
                {"type": "text", "text": "So?"},
            ],
        },
    ]
    engine = says("Sunny.")
    await post(engine, MESSAGES, {"max_tokens": 50, "messages": messages, "tools": [INPUT_TOOL]})
    prompt = bytes(engine.submitted[0][1][1:]).decode()
    assert prompt == "user: weather?\nassistant: Look.\ntool: sunny\nuser: So?\nassistant: "
    count = await post(engine, f"{MESSAGES}/count_tokens", {"messages": messages})
    assert count == {"input_tokens": len(engine.submitted[0][1])}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages"),
        ({"system": [{"type": "image"}]}, "system"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools"),
        ({"temperature": -1}, "temperature"),
    ],
)
async def test_bad_messages_have_both_shapes_of_errors(fields, param):
    body = {"max_tokens": 5, "messages": [{"role": "user", "content": "hello"}]} | fields
    answer = await post(says("x"), MESSAGES, {k: v for k, v in body.items() if v is not None}, 400)
    assert answer["type"] == "error" and answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"] == param


async def test_failures_in_the_middle_are_events():
    for path, body in (
        (RESPONSES, {"input": "x"}),
        (MESSAGES, {"max_tokens": 50, "messages": [{"role": "user", "content": "x"}]}),
    ):
        found, _ = await events(FakeAsyncEngine(fail_after=2), path, body)
        assert found[-1]["type"] == "error" and "secret" not in json.dumps(found[-1])


async def test_embeddings():
    engine = FakeAsyncEngine()
    answer = await post(engine, "/v1/embeddings", {"input": ["ab", "c"]})
    assert [entry["index"] for entry in answer["data"]] == [0, 1] and answer["usage"]["prompt_tokens"] == 5
    vectors = np.array([entry["embedding"] for entry in answer["data"]])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    encoded = await post(engine, "/v1/embeddings", {"input": "ab", "encoding_format": "base64"})
    np.testing.assert_array_equal(
        np.frombuffer(base64.b64decode(encoded["data"][0]["embedding"]), "<f4"), vectors[0].astype("<f4")
    )
    short = await post(engine, "/v1/embeddings", {"input": [[97, 98]], "dimensions": 2})
    assert len(short["data"][0]["embedding"]) == 2
    for body, param in (
        ({"input": []}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": "a", "dimensions": 5}, "dimensions"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": [[]]}, "prompt"),
        ({"input": "x" * 300}, "prompt"),
    ):
        assert (await post(engine, "/v1/embeddings", body, 400))["error"]["param"] == param
    assert (await post(engine, "/v1/embeddings", {"input": "x" * 300, "truncate_prompt_tokens": -1}))["data"]


async def test_tokens():
    engine = FakeAsyncEngine()
    answer = await post(engine, "/tokenize", {"prompt": "hé", "return_token_strs": True})
    assert answer["tokens"] == [256, *"hé".encode()] and answer["count"] == 4 and answer["max_model_len"] == 256
    assert answer["token_strs"][1] == "h"
    plain = await post(engine, "/tokenize", {"prompt": "hé", "add_special_tokens": False})
    assert plain["tokens"] == list("hé".encode())
    assert await post(engine, "/detokenize", {"tokens": plain["tokens"]}) == {"prompt": "hé"}
    chat = await post(engine, "/tokenize", {"messages": [{"role": "user", "content": "x"}]})
    assert bytes(chat["tokens"][1:]).decode() == "user: x\nassistant: "
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ("/detokenize", {"tokens": [300]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
    ):
        assert (await post(engine, path, body, 400))["error"]["param"] == param


async def test_openapi_names_every_address():
    app = create_app(FakeAsyncEngine())
    async with TestClient(TestServer(app)) as client:
        document = await (await client.get("/openapi.json")).json()
    served = {
        (route.method.lower(), route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None and route.method in ("GET", "POST")
    }
    described = {(method, path) for path, methods in document["paths"].items() for method in methods}
    assert {entry for entry in served if entry[1].startswith(("/v1", "/token", "/detoken"))} <= described
    assert described <= served
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "tools", "response_format", "structured_outputs"} <= set(fields)
