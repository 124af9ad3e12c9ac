"""Clients that leave, silence, signals: the server's life over real sockets on the loopback interface."""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from jax_engine import ConfigError
from jax_engine.testing.fake_engine import FakeAsyncEngine
from serving import front, server
from serving.app import AppSettings, create_app
from serving.options import ServerOptions, api_keys
from serving.state import STATE

ROOT = Path(__file__).resolve().parents[1]
CASES = [
    ("/v1/completions", {"prompt": "x"}),
    ("/v1/completions", {"prompt": ["x", "y", "z"]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "n": 2}),
]


@contextlib.asynccontextmanager
async def serving(engine, **options):
    """(client session with the base URL set, application)"""
    app = create_app(engine, AppSettings(**options))
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as session:
            yield session, app
    finally:
        await runner.cleanup()


async def until(condition, timeout_s=30.0):
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(("path", "body"), CASES)
async def test_leaving_in_the_middle_of_a_stream_aborts(path, body):
    engine = FakeAsyncEngine(delay_s=0.01, max_model_len=10_000)
    num_prompts = len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1
    async with serving(engine) as (session, app):
        response = await session.post(path, json=body | {"stream": True, "max_tokens": 5000})
        await response.content.readline()
        assert engine.num_requests == len(app[STATE].live) == num_prompts
        response.close()
        await until(lambda: engine.num_requests == 0)
        assert engine.num_aborted == num_prompts
        assert not app[STATE].live


@pytest.mark.parametrize(("path", "body"), CASES)
@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_before_anything_came_aborts(path, body, stream):
    engine = FakeAsyncEngine(stall=True)
    num_prompts = len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1
    async with serving(engine) as (session, _):
        request = asyncio.create_task(session.post(path, json=body | {"stream": stream}))
        await until(lambda: engine.num_requests == num_prompts)
        request.cancel()
        await until(lambda: engine.num_requests == 0)
        assert engine.num_aborted == num_prompts


async def test_a_reader_that_stops_reading_is_waited_for_and_holds_up_nobody_else():
    produced = 0

    def count(prompt, index, position):
        nonlocal produced
        produced = max(produced, position)
        return 97

    engine = FakeAsyncEngine(max_model_len=10_000_000, tokenizer=None, next_token=count)
    body = {"prompt": [1], "stream": True, "max_tokens": 9_000_000, "logprobs": 20, "return_token_ids": True}
    async with serving(engine) as (session, _):
        slow = await session.post("/v1/completions", json=body)
        before = -1
        async with asyncio.timeout(90):
            while produced != before:
                before = produced
                await asyncio.sleep(0.3)
        async with session.post("/v1/completions", json={"prompt": [2], "max_tokens": 3}) as response:
            assert (await response.json())["usage"]["completion_tokens"] == 3
        slow.close()
        await until(lambda: engine.num_requests == 0)


async def test_silence_is_broken_by_comments():
    engine = FakeAsyncEngine(delay_s=0.12)
    async with serving(engine, keep_alive_s=0.05) as (session, _):
        body = {"prompt": "x", "stream": True, "max_tokens": 2}
        async with session.post("/v1/completions", json=body) as response:
            frames = (await response.text()).split("\n\n")
    # How many comments fit into a pause depends on the machine; that each pause has some does not.
    kinds = [kind for kind, _ in itertools.groupby(frame[:6] for frame in frames if frame)]
    assert kinds[:4] == [": keep", "data: ", ": keep", "data: "]
    assert sum(frame.startswith("data: ") for frame in frames) == 3


async def test_failure_after_a_comment_is_an_event():
    engine = FakeAsyncEngine(delay_s=0.08, fail_after=0)
    async with serving(engine, keep_alive_s=0.05) as (session, _):
        response = await session.post("/v1/completions", json={"prompt": "x", "stream": True})
        assert response.status == 200
        frames = (await response.text()).split("\n\n")
    comments = list(itertools.takewhile(lambda frame: frame == ": keep-alive", frames))
    error, done = frames[len(comments) : len(comments) + 2]
    assert comments and "error" in json.loads(error[6:]) and done == "data: [DONE]"


async def test_drain_lets_streams_finish_and_refuses_new_ones():
    engine = FakeAsyncEngine(delay_s=0.02)
    async with serving(engine) as (session, app):
        running = asyncio.create_task(session.post("/v1/completions", json={"prompt": "x", "max_tokens": 10}))
        await until(lambda: engine.num_requests == 1)
        draining = asyncio.create_task(server.OwnClients(app[STATE], engine).drain(5.0))
        await asyncio.sleep(0)
        for path, body in CASES:
            async with session.post(path, json=body) as response:
                assert response.status == 503 and int(response.headers["Retry-After"]) >= 1
                assert (await response.json())["error"]["code"] == "draining"
        async with session.get("/health") as response:
            assert response.status == 503
        await draining
        assert (await (await running).json())["choices"][0]["text"] == "abcdefghij"
    assert engine.num_aborted == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_drain_aborts_what_takes_too_long(stream):
    engine = FakeAsyncEngine(stall=True)
    async with serving(engine) as (session, app):
        body = {"prompt": "x", "stream": stream}
        running = asyncio.create_task(session.post("/v1/completions", json=body))
        await until(lambda: engine.num_requests == 1)
        await server.OwnClients(app[STATE], engine).drain(0.05)
        response = await running
        text = await response.text()
        assert response.status == 200 and '"finish_reason":"abort"' in text
        assert text.endswith("data: [DONE]\n\n") is stream
    assert engine.num_aborted == 1


async def test_run_server_aborts_for_clients_that_leave():
    engine = FakeAsyncEngine(stall=True)
    with front.bind(ServerOptions(port=0)) as listener:
        running = asyncio.create_task(server.run_server(lambda: engine, ServerOptions(), listener))
        async with aiohttp.ClientSession(front.address(listener)) as session:
            await until(lambda: listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
            request = asyncio.create_task(session.post("/v1/completions", json={"prompt": "x"}))
            await until(lambda: engine.num_requests == 1)
            request.cancel()
            await until(lambda: engine.num_requests == 0)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


def test_taken_port_is_found_at_once():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            front.bind(ServerOptions(port=port))


def test_a_port_shared_by_processes_is_taken_for_others():
    listeners = front.bind_all(ServerOptions(port=0), 3)
    try:
        assert len({listener.getsockname() for listener in listeners}) == 1
        options = ServerOptions(port=listeners[0].getsockname()[1])
        for count in (1, 3):
            with pytest.raises(ConfigError, match="cannot listen on"):
                front.bind_all(options, count)
    finally:
        for listener in listeners:
            listener.close()


def test_bad_host():
    with pytest.raises(ConfigError, match="cannot listen on 256"):
        front.bind(ServerOptions(host="256.0.0.1"))


def test_api_keys_come_from_file_and_environment(tmp_path, monkeypatch):
    keys = tmp_path / "keys"
    keys.write_text("# a comment\none\n\ntwo\n")
    monkeypatch.setenv("JAX_ENGINE_API_KEY", "zero")
    assert api_keys(ServerOptions(api_key_file=str(keys))) == ["zero", "one", "two"]
    keys.write_text("\n# nothing\n")
    with pytest.raises(ConfigError, match="holds no key"):
        api_keys(ServerOptions(api_key_file=str(keys)))
    with pytest.raises(ConfigError, match="cannot be read"):
        api_keys(ServerOptions(api_key_file=str(tmp_path / "none")))


_SERVE = """
import sys, jax_engine
from jax_engine.testing import fake_engine
jax_engine.AsyncEngine = lambda config: fake_engine.FakeAsyncEngine(config, delay_s=0.1)
from serving.cli import main
sys.exit(main(["serve", "--port=0", *sys.argv[1:]]))
"""


@contextlib.contextmanager
def server_process(*flags):
    """(process, URL) of a server with a fake engine, once it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE, *flags],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if " at http://" in line:
                break
        else:
            pytest.fail("".join(lines))
        assert any("ready in" in line for line in lines)
        yield process, line.split(" at ")[1].strip()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


async def test_sigterm_drains_and_ends():
    with server_process("my-model", "--drain-timeout-s=5") as (process, url):
        async with aiohttp.ClientSession(url) as session:
            response = await session.post("/v1/completions", json={"prompt": "x", "max_tokens": 5, "stream": True})
            await response.content.readline()
            process.send_signal(signal.SIGTERM)
            text = await response.text()
            assert '"finish_reason":"length"' in text and text.endswith("data: [DONE]\n\n")
        assert await asyncio.to_thread(process.wait, 5) == 0


async def test_second_signal_ends_at_once():
    with server_process("--drain-timeout-s=60") as (process, url):
        async with aiohttp.ClientSession(url) as session:
            response = await session.post("/v1/completions", json={"prompt": "x", "max_tokens": 200, "stream": True})
            await response.content.readline()
            process.send_signal(signal.SIGINT)
            async with asyncio.timeout(5):
                while (await session.get("/health")).status != 503:
                    await asyncio.sleep(0.01)
            process.send_signal(signal.SIGINT)
            assert await asyncio.to_thread(process.wait, 5) == 128 + signal.SIGINT
            response.close()
