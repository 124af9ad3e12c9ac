"""POST /v1/chat/completions and /v1/models against a fake engine."""

import contextlib
import json

from aiohttp.test_utils import TestClient, TestServer

from jax_engine.testing.byte_tokenizer import ByteTokenizer
from jax_engine.testing.fake_engine import FakeAsyncEngine, echo
from serving.app import AppSettings, create_app

HELLO = [{"role": "user", "content": "hello"}]


@contextlib.asynccontextmanager
async def client_of(engine, **options):
    async with TestClient(TestServer(create_app(engine, AppSettings(**options)))) as client:
        yield client


async def post(engine, body, **options):
    async with client_of(engine, **options) as client:
        response = await client.post("/v1/chat/completions", json={"messages": HELLO} | body)
        assert response.status == 200, await response.text()
        return await response.json()


async def events(engine, body):
    async with client_of(engine) as client:
        response = await client.post("/v1/chat/completions", json={"messages": HELLO, "stream": True} | body)
        assert response.status == 200, await response.text()
        frames = (await response.text()).split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


def prompt_of(engine):
    return bytes(engine.submitted[0][1][1:]).decode()


async def test_whole_answer():
    engine = FakeAsyncEngine()
    answer = await post(engine, {"max_tokens": 3})
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "abc", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert answer["usage"]["prompt_tokens"] == len(engine.submitted[0][1])
    assert prompt_of(engine) == "user: hello\nassistant: "


async def test_output_fills_the_context_by_default():
    engine = FakeAsyncEngine(max_model_len=100)
    answer = await post(engine, {})
    assert engine.submitted[0][2].max_tokens is None
    assert answer["usage"]["total_tokens"] == 100


async def test_max_completion_tokens_goes_before_max_tokens():
    engine = FakeAsyncEngine()
    answer = await post(engine, {"max_tokens": 9, "max_completion_tokens": 2})
    assert answer["usage"]["completion_tokens"] == 2


async def test_messages_become_what_templates_expect():
    engine = FakeAsyncEngine()
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    await post(engine, {"messages": messages, "max_tokens": 1})
    assert prompt_of(engine) == "system: be brief\nuser: one\ntwo\nassistant: "


async def test_template_options():
    engine = FakeAsyncEngine()
    messages = [*HELLO, {"role": "assistant", "content": "Well"}]
    await post(engine, {"messages": messages, "max_tokens": 1, "continue_final_message": True})
    assert prompt_of(engine) == "user: hello\nassistant: Well"
    engine = FakeAsyncEngine()
    await post(engine, {"add_generation_prompt": False, "max_tokens": 1})
    assert prompt_of(engine) == "user: hello\n"


async def test_template_variables(monkeypatch):
    seen = {}

    def chat_prompt(self, messages, **options):
        seen.update(options)
        return original(self, messages)

    original = ByteTokenizer.chat_prompt
    monkeypatch.setattr(ByteTokenizer, "chat_prompt", chat_prompt)
    await post(FakeAsyncEngine(), {"max_tokens": 1, "chat_template_kwargs": {"enable_thinking": False}})
    options = {"add_generation_prompt": True, "continue_final_message": False, "tools": None}
    assert seen == options | {"enable_thinking": False}


async def test_stream_frames():
    chunks = await events(FakeAsyncEngine(), {"max_tokens": 2})
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {"content": "b"},
        {},
    ]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "length"]


async def test_stream_of_several_choices():
    chunks = await events(FakeAsyncEngine(), {"max_tokens": 2, "n": 2})
    by_index = {0: [], 1: []}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        by_index[choice["index"]].append(choice["delta"].get("content", choice["finish_reason"]))
    assert by_index == {0: ["", "a", "b", "length"], 1: ["", "b", "c", "length"]}


async def test_stream_usage_comes_last():
    chunks = await events(FakeAsyncEngine(), {"max_tokens": 2, "stream_options": {"include_usage": True}})
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 2


async def test_logprobs():
    answer = await post(FakeAsyncEngine(), {"max_tokens": 1, "logprobs": True, "top_logprobs": 3})
    (entry,) = answer["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["logprob"], entry["bytes"]) == ("a", -0.5, [97])
    assert [(top["token"], top["logprob"]) for top in entry["top_logprobs"]] == [("a", -0.5), ("c", -2.0), ("d", -9999)]
    answer = await post(FakeAsyncEngine(), {"max_tokens": 1, "logprobs": True})
    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_logprobs_in_a_stream_cover_every_token():
    engine = FakeAsyncEngine(next_token=lambda prompt, index, position: "é".encode()[position])
    chunks = await events(engine, {"max_tokens": 2, "logprobs": True})
    entries = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {}).get("content", [])]
    assert [entry["bytes"] for entry in entries] == [[0xC3], [0xA9]]


async def test_prompt_logprobs_and_token_ids():
    answer = await post(FakeAsyncEngine(), {"max_tokens": 1, "prompt_logprobs": 0, "return_token_ids": True})
    assert answer["prompt_logprobs"][0] is None
    assert len(answer["prompt_logprobs"]) == len(answer["prompt_token_ids"]) == answer["usage"]["prompt_tokens"]
    assert answer["choices"][0]["token_ids"] == [97]
    chunks = await events(FakeAsyncEngine(), {"max_tokens": 2, "return_token_ids": True})
    assert [chunk["choices"][0].get("token_ids") for chunk in chunks] == [None, [97], [98], None]
    assert chunks[0]["prompt_token_ids"] == answer["prompt_token_ids"]


async def test_harmless_fields_are_accepted():
    body = {
        "max_tokens": 1, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "user": "me",
        "reasoning_effort": "low", "parallel_tool_calls": True, "modalities": ["text"], "some_new_thing": 1,
    }  # fmt: skip
    await post(FakeAsyncEngine(next_token=echo), body)


async def test_models():
    async with client_of(FakeAsyncEngine(), served_model_names=["org/a model", "b"]) as client:
        listing = await (await client.get("/v1/models")).json()
        assert listing["object"] == "list"
        assert [model["id"] for model in listing["data"]] == ["org/a model", "b"]
        assert listing["data"][0]["max_model_len"] == 256 and listing["data"][0]["root"] == "fake-model"
        assert (await (await client.get("/v1/models/org/a%20model")).json())["id"] == "org/a model"
        response = await client.get("/v1/models/c")
        assert response.status == 404 and (await response.json())["error"]["code"] == "model_not_found"
        response = await client.post("/v1/chat/completions", json={"messages": HELLO, "model": "b", "max_tokens": 1})
        assert (await response.json())["model"] == "b"


async def test_health_and_version():
    engine = FakeAsyncEngine()
    async with client_of(engine) as client:
        assert (await client.get("/health")).status == 200
        assert "version" in await (await client.get("/version")).json()
        engine.shutdown()
        response = await client.get("/health")
        assert response.status == 503 and "error" in await response.json()
