"""POST /v1/completions against a fake engine: what goes to the engine, and the shape of what comes back."""

import contextlib
import json

import pytest
from aiohttp.test_utils import TestClient, TestServer

from jax_engine import RequestOutputKind
from jax_engine.testing.byte_tokenizer import BOS
from jax_engine.testing.fake_engine import FakeAsyncEngine, echo
from serving.app import AppSettings, create_app


@contextlib.asynccontextmanager
async def client_of(engine, **options):
    async with TestClient(TestServer(create_app(engine, AppSettings(**options)))) as client:
        yield client


async def post(engine, body, **options):
    async with client_of(engine, **options) as client:
        response = await client.post("/v1/completions", json=body)
        assert response.status == 200, await response.text()
        return await response.json()


async def events(engine, body):
    """The decoded events of a stream, `[DONE]` checked and left out."""
    async with client_of(engine) as client:
        response = await client.post("/v1/completions", json=body | {"stream": True})
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        frames = (await response.text()).split("\n\n")
    assert frames[-1] == "" and frames[-2] == "data: [DONE]"
    assert all(frame.startswith("data: {") for frame in frames[:-2])
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


async def test_whole_answer():
    answer = await post(FakeAsyncEngine(), {"model": "fake-model", "prompt": "hi", "max_tokens": 4})
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    assert answer["model"] == "fake-model" and isinstance(answer["created"], int)
    assert answer["choices"] == [
        {"index": 0, "text": "abcd", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


async def test_null_means_default_and_sixteen_tokens_are_the_default():
    engine = FakeAsyncEngine()
    body = {"prompt": "x", "model": None, "max_tokens": None, "temperature": None, "stop": None, "suffix": None}
    answer = await post(engine, body)
    assert answer["choices"][0]["text"] == "abcdefghijklmnop"
    assert engine.submitted[0][2].temperature == 1.0


async def test_every_sampling_field_reaches_the_engine():
    engine = FakeAsyncEngine()
    fields = {
        "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "n": 2, "stop_token_ids": [1],
        "include_stop_str_in_output": True, "ignore_eos": True, "min_tokens": 2, "presence_penalty": 0.1,
        "frequency_penalty": 0.2, "repetition_penalty": 1.1, "logprobs": 2, "prompt_logprobs": 1, "seed": 11,
        "skip_special_tokens": False,
    }  # fmt: skip
    await post(engine, fields | {"prompt": [5, 6], "stop": "zz", "logit_bias": {"65": 1, "66": -2.5}, "priority": 3})
    _, ids, params, priority = engine.submitted[0]
    assert ids == [5, 6] and priority == 3
    assert {name: getattr(params, name) for name in fields} == fields | {"stop_token_ids": (1,)}
    assert params.stop == ("zz",) and params.logit_bias == {65: 1.0, 66: -2.5}
    assert params.output_kind is RequestOutputKind.FINAL_ONLY


async def test_what_the_scheduler_goes_by_reaches_the_engine():
    engine = FakeAsyncEngine()
    await post(engine, {"prompt": "x", "user": "ann", "slo_class": "fast", "cache_salt": "s"})
    await post(engine, {"prompt": "x"})
    assert engine.scheduling == [
        {"user": "ann", "slo_class": "fast", "cache_salt": "s"},
        {"user": None, "slo_class": None, "cache_salt": None},
    ]


async def test_harmless_openai_fields_are_accepted():
    body = {"prompt": "x", "user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "best_of": 2}
    assert len((await post(FakeAsyncEngine(), body | {"n": 2}))["choices"]) == 2


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[BOS, 97, 98]]),
        (["a", "b"], [[BOS, 97], [BOS, 98]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
async def test_prompt_forms(prompt, expected):
    engine = FakeAsyncEngine()
    answer = await post(engine, {"prompt": prompt, "max_tokens": 1})
    assert sorted(ids for _, ids, _, _ in engine.submitted) == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))


async def test_special_tokens_may_be_left_out():
    engine = FakeAsyncEngine()
    await post(engine, {"prompt": "a", "add_special_tokens": False})
    assert engine.submitted[0][1] == [97]


async def test_choices_are_prompt_major():
    answer = await post(FakeAsyncEngine(next_token=echo), {"prompt": [[97, 98], [120]], "n": 2, "max_tokens": 2})
    texts = [(choice["index"], choice["text"], choice["finish_reason"]) for choice in answer["choices"]]
    assert texts == [(0, "ab", "length"), (1, "ab", "length"), (2, "x", "stop"), (3, "x", "stop")]
    assert answer["usage"]["prompt_tokens"] == 3 and answer["usage"]["completion_tokens"] == 8


async def test_prompts_run_at_the_same_time():
    engine = FakeAsyncEngine(delay_s=0.01)
    await post(engine, {"prompt": ["a"] * 8, "max_tokens": 3})
    assert engine.max_live == 8


async def test_stop_string():
    answer = await post(FakeAsyncEngine(), {"prompt": "x", "stop": ["cd"]})
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("ab", "stop", "cd")


async def test_stream_frames():
    chunks = await events(FakeAsyncEngine(), {"prompt": "hi", "max_tokens": 3})
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", "b", "c"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


async def test_stream_of_several_prompts_and_completions():
    chunks = await events(FakeAsyncEngine(), {"prompt": ["x", "y"], "n": 2, "max_tokens": 3})
    texts = {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == {0: "abc", 1: "bcd", 2: "abc", 3: "bcd"}


async def test_stream_usage():
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await events(FakeAsyncEngine(), {"prompt": "hi", "max_tokens": 2, "stream_options": options})
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 2]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["total_tokens"] == 5
    options["continuous_usage_stats"] = False
    chunks = await events(FakeAsyncEngine(), {"prompt": "hi", "max_tokens": 2, "stream_options": options})
    assert [chunk["usage"] and chunk["usage"]["completion_tokens"] for chunk in chunks] == [None, None, 2]


async def test_stream_holds_back_unfinished_characters():
    engine = FakeAsyncEngine(next_token=echo)
    chunks = await events(engine, {"prompt": list("é!".encode())})
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["é", "!", ""]


async def test_echo():
    answer = await post(FakeAsyncEngine(), {"prompt": "hi", "echo": True, "max_tokens": 2})
    assert answer["choices"][0]["text"] == "hiab" and answer["choices"][0]["logprobs"] is None
    answer = await post(FakeAsyncEngine(), {"prompt": [104, 105], "echo": True, "max_tokens": 2})
    assert answer["choices"][0]["text"] == "hiab"
    chunks = await events(FakeAsyncEngine(), {"prompt": "hi", "echo": True, "max_tokens": 2, "n": 2})
    by_index = {0: "", 1: ""}
    for chunk in chunks:
        by_index[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert by_index == {0: "hiab", 1: "hibc"}


async def test_logprobs():
    answer = await post(FakeAsyncEngine(), {"prompt": "hi", "max_tokens": 2, "logprobs": 2})
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"a": -0.5, "c": -2.0}, {"b": -0.5, "d": -2.0}],
        "text_offset": [0, 1],
    }


async def test_logprobs_of_the_echoed_prompt():
    body = {"prompt": [104, 105], "echo": True, "max_tokens": 1, "logprobs": 1}
    (choice,) = (await post(FakeAsyncEngine(), body))["choices"]
    assert choice["logprobs"] == {
        "tokens": ["h", "i", "a"],
        "token_logprobs": [None, -0.5, -0.5],
        "top_logprobs": [None, {"i": -0.5}, {"a": -0.5}],
        "text_offset": [0, 1, 2],
    }
    chunks = await events(FakeAsyncEngine(), body | {"max_tokens": 2})
    assert [chunk["choices"][0]["logprobs"]["tokens"] for chunk in chunks] == [["h", "i", "a"], ["b"]]
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks] == [[0, 1, 2], [3]]


async def test_echo_without_output_scores_the_prompt():
    body = {"prompt": [104, 105], "echo": True, "max_tokens": 0, "logprobs": 1}
    answer = await post(FakeAsyncEngine(), body)
    (choice,) = answer["choices"]
    assert choice["text"] == "hi" and choice["logprobs"]["tokens"] == ["h", "i"]
    assert answer["usage"]["completion_tokens"] == 0


async def test_minus_infinity_is_sent_as_a_number():
    answer = await post(FakeAsyncEngine(), {"prompt": "hi", "max_tokens": 1, "logprobs": 3})
    assert min(answer["choices"][0]["logprobs"]["top_logprobs"][0].values()) == -9999.0


async def test_prompt_logprobs():
    answer = await post(FakeAsyncEngine(), {"prompt": [104, 105], "max_tokens": 1, "prompt_logprobs": 2})
    first, second = answer["choices"][0]["prompt_logprobs"]
    assert first is None and second["105"] == {"logprob": -0.5, "rank": 1, "decoded_token": "i"}


async def test_token_ids_on_request():
    chunks = await events(FakeAsyncEngine(), {"prompt": [7, 8], "max_tokens": 2, "return_token_ids": True})
    assert [chunk["choices"][0]["token_ids"] for chunk in chunks] == [[97], [98]]
    assert [chunk["choices"][0].get("prompt_token_ids") for chunk in chunks] == [[7, 8], None]


async def test_model_without_tokenizer_takes_token_ids():
    engine = FakeAsyncEngine(tokenizer=None)
    answer = await post(engine, {"prompt": [7, 8], "max_tokens": 2, "return_token_ids": True, "logprobs": 0})
    assert answer["choices"][0]["token_ids"] == [97, 98] and answer["choices"][0]["text"] == ""
    assert not engine.submitted[0][2].detokenize


async def test_long_texts_are_tokenized_off_the_loop():
    engine = FakeAsyncEngine(max_model_len=20000)
    answer = await post(engine, {"prompt": "x" * 9000, "max_tokens": 1})
    assert answer["usage"]["prompt_tokens"] == 9001
