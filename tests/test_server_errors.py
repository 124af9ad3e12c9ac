"""Every way in which a request can fail: the status, and that the body is an OpenAI error that names the field."""

import contextlib
import json
import logging

import pytest
from aiohttp.test_utils import TestClient, TestServer

from jax_engine import ChatTemplateError
from jax_engine.testing.byte_tokenizer import ByteTokenizer
from jax_engine.testing.fake_engine import FakeAsyncEngine
from serving.app import AppSettings, create_app

TOOL = {"type": "function", "function": {"name": "f"}}
MESSAGES = [{"role": "user", "content": "hello"}]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@contextlib.asynccontextmanager
async def client_of(engine, **options):
    async with TestClient(TestServer(create_app(engine, AppSettings(**options)))) as client:
        yield client


async def error_of(response, status):
    """The error object, its shape checked."""
    assert response.status == status, await response.text()
    assert response.content_type == "application/json"
    body = await response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] and isinstance(body["error"]["type"], str)
    return body["error"]


async def post_for_error(engine, path, body, status=400, **options):
    async with client_of(engine, **options) as client:
        return await error_of(await client.post(path, json=body), status)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "x", "max_tokens": "4"}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": True}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "temperature": "hot"}, "temperature"),
        ({"prompt": "x", "top_p": 0}, "top_p"),
        ({"prompt": "x", "top_k": -2}, "top_k"),
        ({"prompt": "x", "min_p": 1.1}, "min_p"),
        ({"prompt": "x", "n": 0}, "n"),
        ({"prompt": "x", "stop": ["a"] * 17}, "stop"),
        ({"prompt": "x", "stop": [1]}, "stop"),
        ({"prompt": "x", "stop_token_ids": [-1]}, "stop_token_ids"),
        ({"prompt": "x", "presence_penalty": 3}, "presence_penalty"),
        ({"prompt": "x", "frequency_penalty": -3}, "frequency_penalty"),
        ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"1": 101}}, "logit_bias"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "logprobs": True}, "logprobs"),
        ({"prompt": "x", "min_tokens": 17}, "min_tokens"),
        ({"prompt": "x", "seed": 2**64}, "seed"),
        ({"prompt": "x", "priority": 2**40}, "priority"),
        ({"prompt": "x", "stream": 1}, "stream"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "x", "stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": "x" * 300}, "prompt"),
        ({"prompt": ["x"] * 5}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "best_of": 2}, "best_of"),
        ({"prompt": "x", "response_format": {"type": "xml"}}, "response_format"),
        ({"prompt": "x", "response_format": {"type": "json_schema"}}, "response_format"),
        ({"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format"),
        ({"prompt": "x", "response_format": {"type": "text", "schema": {}}}, "response_format"),
        ({"prompt": "x", "bad_words": [""]}, "bad_words"),
        ({"prompt": "x", "bad_words": ["x"] * 65}, "bad_words"),
        ({"prompt": "x", "bad_words": ["x" * 65]}, "bad_words"),
        ({"prompt": "x", "bad_words": "x"}, "bad_words"),
        ({"prompt": "x", "allowed_token_ids": []}, "allowed_token_ids"),
        ({"prompt": "x", "allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"prompt": "x", "allowed_token_ids": ["a"]}, "allowed_token_ids"),
        ({"prompt": "x", "cache_salt": ""}, "cache_salt"),
        ({"prompt": "x", "user": 3}, "user"),
        ({"prompt": "x", "structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"prompt": "x", "structured_outputs": {"xml": "a"}}, "structured_outputs"),
        ({"prompt": "x", "structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"prompt": "x", "structured_outputs": {"json": "{"}}, "structured_outputs"),
        ({"prompt": "x", "structured_outputs": {"json": [1]}}, "structured_outputs"),
        (
            {"prompt": "x", "structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
        ),
        ({"prompt": "x", "guided_json": {}}, "guided_json"),
        ({"prompt": "x", "grammar": "root ::= x"}, "grammar"),
        ({"prompt": "x", "structured_outputs": {}}, "structured_outputs"),
        ({"prompt": "x", "use_beam_search": True}, "use_beam_search"),
        ({"prompt": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"prompt": "x", "messages": MESSAGES}, "messages"),
        ({"prompt": "x", "temprature": 0}, "temprature"),
    ],
)  # fmt: skip
async def test_bad_completion_fields(body, param):
    engine = FakeAsyncEngine()
    error = await post_for_error(engine, COMPLETIONS, body, max_prompts=4)
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert engine.num_requests == 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f g"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "tool_choice": {"type": "function", "function": {"name": "g"}},
            },
            "tool_choice",
        ),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"echo": True}, "echo"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"chat_template_kwargs": {"evil": 1}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"enable_thinking": {}}}, "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ],
)
async def test_bad_chat_fields(body, param):
    error = await post_for_error(FakeAsyncEngine(), CHAT, {"messages": MESSAGES} | body)
    assert error["type"] == "invalid_request_error" and error["param"] == param


@pytest.mark.parametrize("body", [b"", b"{", b"\xff{}", b"[1]", b'"x"', b'{"temperature": NaN}', b"[" * 100_000])
async def test_bad_json(body):
    async with client_of(FakeAsyncEngine()) as client:
        response = await client.post(COMPLETIONS, data=body, headers={"Content-Type": "application/json"})
        assert (await error_of(response, 400))["param"] is None


@pytest.mark.parametrize("field", ["seed", "top_k", "max_tokens"])
async def test_numbers_of_absurd_length(field):
    async with client_of(FakeAsyncEngine()) as client:
        body = b'{"prompt": "x", "%b": 1%b}' % (field.encode(), b"0" * 5000)
        await error_of(await client.post(COMPLETIONS, data=body, headers={"Content-Type": "application/json"}), 400)


@pytest.mark.parametrize("fields", [{f"x{i}": 1 for i in range(10_000)}, {"y" * 1_000_000: 1}])
async def test_unknown_fields_are_bounded(fields):
    assert (await post_for_error(FakeAsyncEngine(), COMPLETIONS, {"prompt": "x"} | fields))["code"] == "unknown_field"


async def test_unknown_model():
    body = {"model": "other", "prompt": "x"}
    assert (await post_for_error(FakeAsyncEngine(), COMPLETIONS, body, 404))["code"] == "model_not_found"


async def test_no_such_address_and_wrong_method():
    async with client_of(FakeAsyncEngine()) as client:
        await error_of(await client.get("/nothing"), 404)
        response = await client.get(COMPLETIONS)
        await error_of(response, 405)
        assert response.headers["Allow"] == "POST"


async def test_body_too_large():
    body = {"prompt": "x" * 5000}
    assert (await post_for_error(FakeAsyncEngine(), COMPLETIONS, body, 413, max_body_bytes=4000))["code"]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "nonsense"])
async def test_content_type(content_type):
    async with client_of(FakeAsyncEngine()) as client:
        response = await client.post(COMPLETIONS, data=b'{"prompt":"x"}', headers={"Content-Type": content_type})
        await error_of(response, 415)


async def test_api_keys():
    async with client_of(FakeAsyncEngine(), api_keys=["one", "two"]) as client:
        for headers in ({}, {"Authorization": "Bearer three"}, {"Authorization": "Basic one"}, {"Authorization": "é"}):
            response = await client.get("/v1/models", headers=headers)
            assert (await error_of(response, 401))["code"] == "invalid_api_key"
            assert response.headers["WWW-Authenticate"] == "Bearer"
        for key in ("one", "two"):
            assert (await client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})).status == 200
        assert (await client.post(COMPLETIONS, json={"prompt": "x"})).status == 401
        assert (await client.get("/health")).status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_full_queue(stream):
    async with client_of(FakeAsyncEngine(max_waiting=1)) as client:
        response = await client.post(COMPLETIONS, json={"prompt": ["x", "y"], "stream": stream})
        error = await error_of(response, 429)
        assert error["code"] == "queue_full" and response.headers["Retry-After"] == "3"


@pytest.mark.parametrize("stream", [False, True])
async def test_bad_prompt_is_a_status_in_streams_too(stream):
    engine = FakeAsyncEngine()
    error = await post_for_error(engine, COMPLETIONS, {"prompt": [[1], [300]], "stream": stream})
    assert error["param"] == "prompt" and engine.num_requests == 0


async def test_stopped_engine():
    engine = FakeAsyncEngine()
    engine.shutdown()
    async with client_of(engine) as client:
        response = await client.post(COMPLETIONS, json={"prompt": "x"})
        await error_of(response, 503)
        assert int(response.headers["Retry-After"]) >= 1


@pytest.mark.parametrize("stream", [False, True])
async def test_engine_failure_before_the_first_token(stream, caplog):
    body = {"prompt": "x", "stream": stream}
    error = await post_for_error(FakeAsyncEngine(fail_after=0), COMPLETIONS, body, 500)
    assert error["code"] == "internal_error" and "secret" not in error["message"]
    assert "/secret/path" in caplog.text


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, {"prompt": "x"}), (CHAT, {"messages": MESSAGES})])
async def test_engine_failure_in_the_middle_of_a_stream(path, body):
    engine = FakeAsyncEngine(fail_after=2)
    async with client_of(engine) as client:
        response = await client.post(path, json=body | {"stream": True})
        assert response.status == 200
        frames = (await response.text()).split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    error = json.loads(frames[-3].removeprefix("data: "))["error"]
    assert error["code"] == "internal_error" and "secret" not in error["message"]
    assert engine.num_requests == 0


async def test_unexpected_exception_is_neutral(monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("password is hunter2")

    monkeypatch.setattr(ByteTokenizer, "encode", broken)
    caplog.set_level(logging.ERROR)
    error = await post_for_error(FakeAsyncEngine(), COMPLETIONS, {"prompt": "x"}, 500)
    assert "hunter2" not in error["message"] and "hunter2" in caplog.text


async def test_chat_template_refuses(monkeypatch):
    def refuse(*args, **kwargs):
        raise ChatTemplateError("roles must alternate")

    monkeypatch.setattr(ByteTokenizer, "chat_prompt", refuse)
    error = await post_for_error(FakeAsyncEngine(), CHAT, {"messages": MESSAGES})
    assert error["message"] == "roles must alternate" and error["param"] == "messages"


async def test_model_without_tokenizer():
    engine = FakeAsyncEngine(tokenizer=None)
    assert (await post_for_error(engine, COMPLETIONS, {"prompt": "x"}))["param"] == "prompt"
    assert "tokenizer" in (await post_for_error(engine, CHAT, {"messages": MESSAGES}))["message"]
    assert (await post_for_error(engine, COMPLETIONS, {"prompt": [1], "stop": "x"}))["param"] == "stop"
    assert (await post_for_error(engine, COMPLETIONS, {"prompt": [1], "echo": True}))["param"] == "echo"


async def test_clients_are_told_of_too_long_a_prompt_in_the_words_they_look_for():
    error = await post_for_error(FakeAsyncEngine(max_model_len=20), COMPLETIONS, {"prompt": "x" * 30})
    assert error["code"] == "context_length_exceeded" and "maximum context length is 20 tokens" in error["message"]


async def test_an_address_without_its_prefix_is_told_of_it():
    error = await post_for_error(FakeAsyncEngine(), "/chat/completions", {"messages": MESSAGES}, status=404)
    assert "/v1" in error["message"]
