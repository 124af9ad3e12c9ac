"""A table of bad inputs against one server that lives through all of them.

The engine is the real one, over a fake device whose tokens depend on the whole history in the page pool. After each
input: the right status and body, /health is 200, a canary request answers to the byte what it answered at first, all
pages are free, and no reply shows a path or a traceback.
"""

import asyncio
import gzip
import json
import re

import pytest
from aiohttp.test_utils import TestClient, TestServer

from benchmarks.scheduler_host import make_limits
from jax_engine.async_engine import AsyncEngine
from jax_engine.config import EngineConfig
from jax_engine.engine import Engine
from jax_engine.testing.byte_tokenizer import EOS, ByteTokenizer
from jax_engine.testing.fake_runner import FakeRunner
from serving.app import AppSettings, create_app

MAX_LEN, MAX_BODY = 128, 200_000
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
RESPONSES, MESSAGES, EMBEDDINGS = "/v1/responses", "/v1/messages", "/v1/embeddings"
CANARY = {"prompt": "the canary", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
JSON = {"Content-Type": "application/json"}
HELLO = [{"role": "user", "content": "hello"}]
PATHS = re.compile(r"Traceback|\.py\b|/work|/usr|/root|/home|site-packages")


class Canary:
    """A server, and what its canary says."""

    def __init__(self, client: TestClient, engine: Engine):
        self.client, self.engine, self.song = client, engine, None

    async def sings(self) -> None:
        response = await self.client.post(COMPLETIONS, json=CANARY)
        assert response.status == 200, await response.text()
        song = (await response.json())["choices"]
        self.song = self.song or song
        assert song == self.song, "the canary sings another song"
        assert (await self.client.get("/health")).status == 200
        assert self.engine.num_requests == 0 and not self.engine.has_work
        assert self.engine.scheduler.pool.num_free == self.engine.limits.num_pages
        self.engine.scheduler.check()


@pytest.fixture(scope="module")
def served():
    config = EngineConfig(model="fake", max_queued_requests=64)
    limits = make_limits(4, MAX_LEN, 2)
    vocab_size = ByteTokenizer.vocab_size
    inner = Engine(
        FakeRunner(limits, vocab_size), ByteTokenizer(), vocab_size=vocab_size, eos_token_ids=[EOS], config=config
    )
    engine = AsyncEngine(config, inner)
    yield engine
    engine.shutdown()


_songs: dict[int, list] = {}


@pytest.fixture
async def canary(served):
    async with TestClient(
        TestServer(create_app(served, AppSettings(max_body_bytes=MAX_BODY, max_prompts=16)))
    ) as client:
        found = Canary(client, served._engine)
        found.song = _songs.get(id(served))
        await found.sings()
        _songs[id(served)] = found.song
        yield found
        await found.sings()


def with_field(name: str, value) -> dict:
    return {"prompt": "x", "max_tokens": 2, name: value}


RAW = [
    (b"", JSON, 400),
    (b" ", JSON, 400),
    (b'{"prompt": "x"', JSON, 400),
    (b'{"prompt": "x"}}', JSON, 400),
    (b'{"prompt": "x",}', JSON, 400),
    (b"{'prompt': 'x'}", JSON, 400),
    (b"null", JSON, 400),
    (b"[]", JSON, 400),
    (b"3", JSON, 400),
    (b'"x"', JSON, 400),
    (b"\x00", JSON, 400),
    (b"\xef\xbb\xbf{}", JSON, 400),
    (b"\xff\xfe{\x00}\x00", JSON, 400),
    (b'{"prompt": "\xff"}', JSON, 400),
    (b'{"prompt": "\\ud800"}', JSON, 400),
    (b'{"prompt": "\\u12"}', JSON, 400),
    (b'{"prompt": "x", "temperature": NaN}', JSON, 400),
    (b'{"prompt": "x", "temperature": Infinity}', JSON, 400),
    (b'{"prompt": "x", "temperature": 1e999}', JSON, 400),
    (b'{"prompt": "x", "seed": 1%s}' % (b"0" * 5000), JSON, 400),
    (b'{"prompt": "x", "top_k": -%s}' % (b"9" * 5000), JSON, 400),
    (b'{"prompt": "x", "temperature": 0.%s1e}' % (b"0" * 5000), JSON, 400),
    (b'{"prompt": ' + b"[" * 90_000 + b"]" * 90_000 + b"}", JSON, 400),
    (b'{"a": ' * 25_000 + b"1" + b"}" * 25_000, JSON, 400),
    (b'{"prompt": "%s"}' % (b"x" * MAX_BODY), JSON, 413),
    (gzip.compress(b'{"prompt": "' + b"x" * 50_000_000 + b'"}'), JSON | {"Content-Encoding": "gzip"}, 413),
    (b"not gzip", JSON | {"Content-Encoding": "gzip"}, 400),
    (b'{"prompt": "x"}', {"Content-Type": "text/plain"}, 415),
    (b'{"prompt": "x"}', {"Content-Type": "multipart/form-data"}, 415),
    (b"prompt=x", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
    (b'{"prompt": "x"}', {"Content-Type": ""}, 415),
]


@pytest.mark.parametrize(("body", "headers", "status"), RAW, ids=range(len(RAW)))
@pytest.mark.parametrize("path", [COMPLETIONS, MESSAGES])
async def test_bodies(canary, path, body, headers, status):
    try:
        response = await canary.client.post(path, data=body, headers=headers)
    except ConnectionError:
        assert status == 413, "only a body that is too large may end the connection while it is still sent"
        return
    await check_error(response, status)


async def check_error(response, status: int, param: str | None = ...) -> None:  # type: ignore[assignment]
    text = await response.text()
    assert response.status == status, text[:500]
    assert not PATHS.search(text), text
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 2000
    assert error["code"] is None or isinstance(error["code"], str)
    if param is not ...:
        assert error["param"] == param, text


#: field -> (values at its bounds, values past them)
BOUNDS = {
    "max_tokens": ([1, MAX_LEN, 2**31 - 1], [0, -1, 2**31, 1.5, "1", True, [1]]),
    "min_tokens": ([0, 2], [-1, 3, "1"]),
    "temperature": ([0, 1e-9, 100], [-0.01, 100.1, "1", [], True]),
    "top_p": ([1e-9, 1], [0, 1.01, -1]),
    "top_k": ([-1, 0, 1, 2**31 - 1], [-2, 2**31, 1.5]),
    "min_p": ([0, 1], [-0.1, 1.1]),
    "n": ([1, 128], [0, 129, -1, 1.5]),
    "presence_penalty": ([-2, 2], [-2.1, 2.1]),
    "frequency_penalty": ([-2, 2], [-2.1, 2.1]),
    "repetition_penalty": ([0.01, 2], [0, 2.1, -1]),
    "seed": ([-(2**63), 2**63 - 1, 0], [2**63, 1.5, "x"]),
    "logprobs": ([0, 20], [21, -1, True]),
    "prompt_logprobs": ([0, 20], [21, -1]),
    "stop": (["x", ["a"] * 16, "é", []], [["a"] * 17, "", [""], "x" * 1025, 3, {"a": 1}]),
    "stop_token_ids": ([[], [0], [257] * 128], [[258], [-1], [0] * 129, "0", ["0"]]),
    "logit_bias": ([{}, {"0": 100}, {"257": -100}], [{"258": 1}, {"-1": 1}, {"a": 1}, {"1": 101}, {"1": "x"}, [1]]),
    "bad_words": ([["a b"], []], [["x" * 65], [""], [" "], ["a" * 17], "x", [3]]),
    "allowed_token_ids": ([[0, 257]], [[], [258], [-1], "1"]),
    "truncate_prompt_tokens": ([-1, 1, 2**31 - 1], [0, -2, 1.5]),
    "priority": ([-(2**31), 2**31 - 1], [2**31, 1.5]),
    "stream": ([False, None], [1, "true"]),
    "echo": ([True, False], [1, "yes"]),
    "suffix": (["", None], ["x"]),
    "best_of": ([1, None], [2]),
    "length_penalty": ([1, 1.0, None], [0.5]),
    "logits_processors": ([[], None], [["a"]]),
    "user": (["someone", None], [3, "x" * 513]),
    "cache_salt": (["salt"], ["", 3, "x" * 257]),
    "structured_outputs": ([None], [{}, {"regex": 3}, {"regex": "["}, {"json": {"type": "wizard"}}, {"choice": [1]}]),
    "response_format": ([{"type": "text"}], [{"type": "json"}, {}, "json_object", {"type": "json_schema"}]),
    "metadata": ([{"a": "b"}, 3], []),
    "store": ([True], []),
    "guided_regex": ([None], ["a"]),
    "max_token": ([None], [3]),
}


@pytest.mark.parametrize("name", BOUNDS)
async def test_fields_at_and_past_their_bounds(canary, name):
    allowed, refused = BOUNDS[name]
    for value in allowed:
        response = await canary.client.post(COMPLETIONS, json=with_field(name, value))
        assert response.status == 200, (value, await response.text())
    for value in refused:
        response = await canary.client.post(COMPLETIONS, json=with_field(name, value))
        await check_error(response, 400, name)


@pytest.mark.parametrize(
    ("prompt", "status"),
    [
        ("", 200),
        ("x" * (MAX_LEN - 2), 200),  # a token stands before the text
        ("x" * (MAX_LEN - 1), 400),
        ("x" * MAX_LEN, 400),
        ("x" * 100_000, 400),
        ([5] * (MAX_LEN - 1), 200),
        ([5] * MAX_LEN, 400),
        ([], 400),
        ([[]], 400),
        ([[5], []], 400),
        (["a", [5]], 400),
        ([5, "a"], 400),
        ([258], 400),
        ([-1], 400),
        ([1.5], 400),
        (["a"] * 16, 200),
        (["a"] * 17, 400),
        ({"text": "a"}, 400),
        (None, 400),
        ("\u0000\u202e\U0001f9ff", 200),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_prompts(canary, prompt, status, stream):
    body = {"prompt": prompt, "max_tokens": 3, "stream": stream}
    response = await canary.client.post(COMPLETIONS, json=body)
    if status == 200:
        assert response.status == 200 and "error" not in await response.text()
    else:
        await check_error(response, status, "prompt")


OTHERS = [
    (CHAT, {}, "messages"),
    (CHAT, {"messages": [{}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 1000}]}, "prompt"),
    (CHAT, {"messages": HELLO, "tools": "x"}, "tools"),
    (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
    (CHAT, {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": 3}}, "response_format"),
    (CHAT, {"messages": HELLO, "modalities": ["audio"]}, "modalities"),
    (CHAT, {"messages": HELLO, "web_search_options": {}}, "web_search_options"),
    (RESPONSES, {"input": [{"type": "file"}]}, "input"),
    (RESPONSES, {"input": "x", "conversation": "c"}, "conversation"),
    (MESSAGES, {"messages": HELLO}, "max_tokens"),
    (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "image"}]}], "max_tokens": 3}, "messages"),
    (EMBEDDINGS, {"input": []}, "input"),
    (EMBEDDINGS, {"input": ["x"] * 17}, "prompt"),
    ("/tokenize", {}, "prompt"),
    ("/detokenize", {"tokens": [-1]}, "tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param"), OTHERS, ids=range(len(OTHERS)))
async def test_other_addresses(canary, path, body, param):
    await check_error(await canary.client.post(path, json=body), 400, param)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, RESPONSES, MESSAGES, EMBEDDINGS, "/tokenize", "/detokenize"])
async def test_methods_and_addresses(canary, path):
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        response = await canary.client.request(method, path)
        await check_error(response, 405)
        assert response.headers["Allow"] == "POST"
    await check_error(await canary.client.post(path + "/nothing", json={}), 404)
    unknown = await canary.client.post(path, json={"model": "../../etc/passwd", **_least(path)})
    await check_error(unknown, 404, "model")


def _least(path: str) -> dict:
    """The smallest body that an address takes."""
    return {
        COMPLETIONS: {"prompt": "x"},
        CHAT: {"messages": HELLO},
        RESPONSES: {"input": "x"},
        MESSAGES: {"messages": HELLO, "max_tokens": 1},
        EMBEDDINGS: {"input": "x"},
        "/tokenize": {"prompt": "x"},
        "/detokenize": {"tokens": []},
    }[path]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, RESPONSES, MESSAGES])
async def test_readers_that_leave(canary, path):
    body = _least(path) | {"stream": True, "n": 1} if path in (COMPLETIONS, CHAT) else _least(path) | {"stream": True}
    if path == MESSAGES:
        body["max_tokens"] = 100
    for num_reads in (0, 1, 2):
        response = await canary.client.post(path, json=body)
        assert response.status == 200
        for _ in range(num_reads):
            await response.content.readline()
        response.close()
    for _ in range(200):
        if canary.engine.num_requests == 0:
            break
        await asyncio.sleep(0.01)
