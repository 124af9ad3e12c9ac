"""--api_processes: requests through another process are those of one process, and nobody's death leaves anything."""

import asyncio
import contextlib
import os
import signal
import socket
from pathlib import Path

import aiohttp
import msgspec
import pytest

from jax_engine import (
    EngineError,
    EngineStopped,
    InvalidRequest,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)
from jax_engine.testing.byte_tokenizer import byte_text_tokenizer
from serving.options import ServerOptions
from serving.remote import wire
from serving.remote.client import RemoteEngine
from serving.remote.hub import Hub, Link
from serving.remote.wire import Channel
from tests import faulty_server
from tests.test_server_faults import CANARY, COMPLETIONS, ENDLESS, canary, server_process, settled
from tests.test_server_life import until


@contextlib.asynccontextmanager
async def both_sides(limit=0):
    """(engine, the same engine at the other end of a socket pair, the link between)"""
    engine = faulty_server.build(tokenizer=byte_text_tokenizer())
    hub = Hub(wire.Setup(ServerOptions(max_requests_per_client=limit), [], [], "info", "text"))
    link = Link(hub)
    seen, remote = [], []

    def receive(message):
        seen.append(message) if not remote else remote[0].receive(message)

    channel = Channel(wire.ToApi, receive, lambda: remote and remote[0].lose())
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    await loop.create_unix_connection(lambda: link.channel, sock=ours)
    await loop.create_unix_connection(lambda: channel, sock=theirs)
    hub.greet(link)
    hub.show(engine)
    await until(lambda: len(seen) == 2)
    assert seen[0].options == hub.setup.options
    remote.append(RemoteEngine(channel, seen[1], limit))
    try:
        yield engine, remote[0], link
    finally:
        channel.close()
        await link.ended.wait()
        engine.shutdown()


async def collect(engine, prompt, params, **who):
    """The whole of a request: (text, tokens, why it ended, log-probabilities) of each completion."""
    found, prompt_logprobs = {}, None
    async for output in engine.generate(prompt, params, **who):
        prompt_logprobs = output.prompt_logprobs
        for part in output.outputs:
            known = found.setdefault(part.index, part)
            if known is not part:
                known.take_in(part)
    parts = {
        i: (o.text, o.token_ids, o.finish_reason, o.stop_reason, plain(o.logprobs), o.cumulative_logprob)
        for i, o in found.items()
    }
    return parts, plain(prompt_logprobs)


def plain(positions):
    """Log-probabilities without the tokens' texts, which the routes make where they are missing."""
    return positions and [p and {token: (e.logprob, e.rank) for token, e in p.items()} for p in positions]


PROMPT = list(b"the same prompt")
CASES = [
    {},
    {"n": 3, "seed": 5},
    {"stop": ["5j", "/"]},
    {"stop": ["5j", "/"], "n": 4, "seed": 1},
    {"stop": ["5j", "/"], "include_stop_str_in_output": True, "min_tokens": 9},
    {"logprobs": 2, "prompt_logprobs": 1},
    {"logprobs": 0, "stop": "j"},
    {"stop_token_ids": list(range(60, 90))},
    {"stop_token_ids": list(range(60, 90)), "include_stop_str_in_output": True},
    {"allowed_token_ids": list(b"abc\xc3\xa9"), "bad_words": ["ab"], "logit_bias": {97: 1.5}},
    {"detokenize": False},
    {"truncate_prompt_tokens": 4},
]


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY])
async def test_outputs_are_those_of_one_process(kind):
    async with both_sides() as (engine, remote, link):
        for case in CASES:
            params = SamplingParams(**{"max_tokens": 60, "temperature": 0} | case, output_kind=kind)
            wanted = await collect(engine, PROMPT, params)
            if params.stop:
                assert any(reason in params.stop for _, _, _, reason, _, _ in wanted[0].values())
            assert await collect(remote, PROMPT, params, cache_salt="x") == wanted, case
            await settled(engine)
            assert not link.sinks


async def last(engine, params):
    return [output async for output in engine.generate(PROMPT, params)][-1]


async def test_a_stop_string_ends_the_request_in_the_engine():
    async with both_sides() as (engine, remote, _):
        params = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)
        text = (await last(remote, params)).outputs[0].text
        stop = next(c for c in text[20:] if text.index(c) >= 20)
        before = engine.metrics.tokens["generated"]
        output = (
            await last(remote, SamplingParams(max_tokens=400, temperature=0, ignore_eos=True, stop=stop))
        ).outputs[0]
        assert output.text == text[: text.index(stop)] and output.finish_reason == "stop"
        await settled(engine)
        assert engine.metrics.tokens["generated"] - before < 100
        assert engine.metrics.requests == {"length": 1, "stop": 1}


async def test_an_embedding_and_a_structured_answer():
    async with both_sides() as (engine, remote, _):
        one, other = await engine.embed(PROMPT), await remote.embed(PROMPT)
        assert one.embedding.tolist() == other.embedding.tolist()
        cut = await remote.embed([1] * 1000, truncate=True)
        assert len(cut.prompt_token_ids) == engine.limits.max_model_len - 1


@pytest.mark.parametrize(
    ("prompt", "params", "error"),
    [
        ([], {}, "prompt is empty"),
        ([1] * 600, {}, "600 tokens"),
        ([400], {}, "token ids are integers"),
        ([1], {"structured_outputs": StructuredOutputsParams(regex="[")}, "structured"),
    ],
)
async def test_what_the_engine_refuses_is_refused_with_the_same_words(prompt, params, error):
    async with both_sides() as (engine, remote, link):
        said = []
        for each in (engine, remote):
            with pytest.raises(InvalidRequest, match=error) as caught:
                await collect(each, prompt, SamplingParams(**params))
            said.append((str(caught.value), caught.value.param))
        assert said[0] == said[1] and not link.sinks and engine.num_requests == 0


async def test_readers_that_leave_and_slots_that_are_given_back():
    async with both_sides(limit=2) as (engine, remote, link):
        stream = remote.generate(PROMPT, SamplingParams(max_tokens=400, output_kind=RequestOutputKind.DELTA))
        await anext(stream)
        await stream.aclose()
        await settled(engine)
        async with remote.slot("one"), remote.slot("one"), remote.slot("two"):
            with pytest.raises(Exception, match="2 requests running"):
                await remote.slot("one").__aenter__()
        waiting = asyncio.create_task(remote.slot("one").__aenter__())
        await asyncio.sleep(0)
        waiting.cancel()
        await until(lambda: not link._slots)
        view = await remote.view(60.0)
        assert (
            view.num_requests == 0
            and view.replicas[0].host
            and view.replicas[0].steps
            and len(view.replicas[0].pages) == 64
        )
        assert view.figures["requests_finished"] == {"abort": 1}


async def test_the_end_of_the_connection_ends_requests_on_both_sides():
    async with both_sides() as (engine, remote, link):
        stream = remote.generate(PROMPT, SamplingParams(max_tokens=400, output_kind=RequestOutputKind.DELTA))
        await anext(stream)
        link.channel.abort()
        with pytest.raises(EngineStopped):
            async for _ in stream:
                pass
        await settled(engine)
        with pytest.raises(EngineStopped):
            await remote.view()
        with pytest.raises(EngineStopped):
            await last(remote, SamplingParams())


@pytest.mark.parametrize(
    "data", [b"\xff\xff\xff\xff", b"\0\0\0\1\x90", b"\0\0\0\2\x91\x63", b"\0\0\0\3\x92\1\xc0"], ids=repr
)
async def test_frames_that_are_none_end_the_connection(data):
    engine = faulty_server.build(tokenizer=byte_text_tokenizer())
    try:
        link = Link(Hub(wire.Setup(ServerOptions(), [], [], "info", "text")))
        ours, theirs = socket.socketpair()
        await asyncio.get_running_loop().create_unix_connection(lambda: link.channel, sock=ours)
        theirs.sendall(data)
        async with asyncio.timeout(5):
            await link.ended.wait()
        theirs.close()
    finally:
        engine.shutdown()


def test_every_error_survives_the_way():
    for error in (InvalidRequest("a", "b", "c"), EngineStopped("c"), EngineError("d")):
        sent = msgspec.msgpack.decode(msgspec.msgpack.encode(wire.failure(1, error)), type=wire.Failure)
        came = wire.error(sent)
        assert type(came) is type(error) and str(came) == str(error) and vars(came) == vars(error)


#: Answers to completions, by whichever process.
ANSWERS = 'jax_engine_http_requests_total{route="/v1/completions"'


def workers(pid):
    """Process ids of the API processes of a server."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sorted(int(child) for child in children if b"remote.worker" in Path(f"/proc/{child}/cmdline").read_bytes())


@contextlib.asynccontextmanager
async def one_session_per_worker(url, pid):
    """A client session with one open connection to each of two API processes: (session, worker's pid) of each."""
    found = {}
    async with contextlib.AsyncExitStack() as stack:
        while len(found) < 2:
            session = await stack.enter_async_context(aiohttp.ClientSession(url))
            response = await session.get("/health")
            await response.read()
            ((idle,),) = session.connector._conns.values()
            found.setdefault(owner(idle[0].transport.get_extra_info("sockname")[1], pid), session)
        yield found


def owner(port, pid):
    """Which worker holds the other end of the connection from a local port."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    inode = next(line.split()[9] for line in lines if line.split()[2].endswith(f":{port:04X}"))
    for worker in workers(pid):
        for entry in Path(f"/proc/{worker}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(entry) == f"socket:[{inode}]":
                    return worker
    raise AssertionError("no worker holds the connection")


async def metric(session, name):
    text = await (await session.get("/metrics")).text()
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


async def test_two_processes_serve_as_one_and_one_that_dies_is_replaced():
    flags = ("--api_processes=2", "--max_requests_per_client=2", "--drain_timeout_s=20", "--slow-steps")
    with server_process(*flags) as (process, url, lines):
        async with one_session_per_worker(url, process.pid) as sessions:
            (first, one), (second, other) = sessions.items()
            for worker in (first, second):
                assert "jaxlib" not in Path(f"/proc/{worker}/maps").read_text()
            song = await canary(one)
            assert await canary(other) == song
            counted = [
                await metric(session, 'jax_engine_http_requests_total{route="/v1/completions"')
                for session in (one, other)
            ]
            assert counted == [2, 2]
            streams = [await session.post(COMPLETIONS, json=ENDLESS) for session in (one, other)]
            for stream in streams:
                await stream.content.readline()
            refused = await one.post(COMPLETIONS, json=CANARY)
            assert refused.status == 429 and (await refused.json())["error"]["code"] == "too_many_requests"
            os.kill(second, signal.SIGKILL)
            with pytest.raises(aiohttp.ClientError):
                await streams[1].read()
            assert (await streams[0].text()).endswith("data: [DONE]\n\n")
            assert await canary(one) == song
            assert await metric(one, "jax_engine_kv_pages_used") == 0
            await until(lambda: len(workers(process.pid)) == 2)
            # 2 canaries of the dead one and its own, the stream, the 429, and the canary after.
            assert await metric(one, ANSWERS) == 5
        async with one_session_per_worker(url, process.pid) as sessions:
            assert second not in sessions
            for session in sessions.values():
                assert await canary(session) == song
            stream = await next(iter(sessions.values())).post(COMPLETIONS, json=ENDLESS | {"max_tokens": 100})
            await stream.content.readline()
            process.send_signal(signal.SIGTERM)
            await until(lambda: any("shutting down" in line for line in lines))
            for session in sessions.values():
                assert (await session.get("/health")).status == 503
            text = await stream.text()
            assert '"finish_reason":"length"' in text and text.endswith("data: [DONE]\n\n")
        gone = workers(process.pid)
        assert await asyncio.to_thread(process.wait, 20) == 0
    assert not any(Path(f"/proc/{worker}").exists() for worker in gone)


async def test_a_dead_engine_is_told_by_every_process():
    with server_process("--api_processes=2", "--step_timeout_s=5") as (process, url, lines):
        async with one_session_per_worker(url, process.pid) as sessions:
            one, other = sessions.values()
            running = await one.post(COMPLETIONS, json=ENDLESS)
            await running.content.readline()
            broken = await other.post(COMPLETIONS, json={"prompt": [faulty_server.RAISE]})
            assert broken.status == 503 and (await broken.json())["error"]["code"] == "engine_stopped"
            frames = (await running.text()).split("\n\n")
            assert "engine_stopped" in frames[-3] and frames[-2] == "data: [DONE]"
        gone = sessions.keys()
        assert await asyncio.to_thread(process.wait, 20) == 1
    assert not any(Path(f"/proc/{worker}").exists() for worker in gone)
    assert "ending the process" in "".join(lines)


async def test_an_engine_process_that_is_killed_takes_the_others_with_it():
    with server_process("--api_processes=2") as (process, url, _):
        started = workers(process.pid)
        async with aiohttp.ClientSession(url) as session:
            running = await session.post(COMPLETIONS, json=ENDLESS)
            await running.content.readline()
            process.kill()
            assert "engine_stopped" in await running.text()
        await until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in started))
