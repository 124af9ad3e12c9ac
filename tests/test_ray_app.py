"""Two engines behind Ray Serve, real processes on this machine, with a fake device: routed by prefix, one killed under
load, and what clients see of it. Long, and needs the extra `ray`.

    python -m pytest -m long tests/test_ray_app.py
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections import Counter
from pathlib import Path

import aiohttp
import pytest

os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "40")  # read by ray; a busy machine is slow to start
ray = pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")
from ray import serve  # noqa: E402

from jax_engine import ConfigError  # noqa: E402
from jax_engine.config import EngineConfig  # noqa: E402
from serving import flags, ray_app  # noqa: E402
from serving.options import ServerOptions  # noqa: E402
from tests import faulty_server  # noqa: E402

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
ROOT = Path(__file__).resolve().parents[1]
LONG = {"max_tokens": 80, "temperature": 0, "ignore_eos": True}


def slow_engine():
    """The real engine over a fake device whose steps take 50 ms, so that a busy machine can follow."""
    faulty_server.FaultyRunner.step_s = 0.05
    return faulty_server.build(EngineConfig(model="faulty", max_num_seqs=8))


@pytest.fixture(scope="module")
def url():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "JAX_PLATFORMS": "cpu"}
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": environment}, log_to_driver=False)
    for _ in range(4):  # Serve gives its proxy a minute, which a busy machine may need twice
        with contextlib.suppress(TimeoutError):
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            break
    scaling = ray_app.RayOptions(max_replicas=2, requests_per_replica=4, num_cpus=0.5)
    serve.run(ray_app.deployment(slow_engine, ServerOptions(), scaling), name="engines")
    until(lambda: listens(port), 120)
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def listens(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def engine_processes():
    return [
        p for p in psutil.process_iter(["cmdline"]) if "ServeReplica:engines:Engines" in " ".join(p.info["cmdline"])
    ]


def until(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


async def ask(session, prompt, stream, seen=None):
    """(text, error's code or None); `seen` is told how many events of a stream have come."""
    body = {"prompt": prompt, "stream": stream, **LONG}
    async with session.post("/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        if not stream:
            return (await response.json())["choices"][0]["text"], None
        text, ended = "", False
        async for line in response.content:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    return text, event["error"]["code"]
                text += event["choices"][0]["text"]
                if seen is not None:
                    seen[prompt] += 1
            ended = ended or line == b"data: [DONE]\n"
        assert ended
        return text, None


async def test_the_handlers_are_those_of_the_server(url):
    async with aiohttp.ClientSession(url) as session:
        async with session.get("/v1/models") as response:
            assert (await response.json())["data"][0]["id"]
        async with session.post("/v1/completions", json={"prompt": "x", "temperature": -1}) as response:
            assert response.status == 400 and (await response.json())["error"]["param"] == "temperature"
        async with session.post(
            "/v1/completions", data=b'{"prompt"', headers={"Content-Type": "application/json"}
        ) as r:
            assert r.status == 400 and (await r.json())["error"]["type"] == "invalid_request_error"
        async with session.get("/metrics") as response:
            assert response.status == 404 and "several" in (await response.json())["error"]["message"]
        async with session.post("/v1/completions", data=b" " * (17 << 20)) as response:
            assert response.status == 413
        async with session.get("/v1/nothing", headers={"X-Request-Id": "mine"}) as response:
            assert response.status == 404 and response.headers["X-Request-Id"] == "mine"


def unfinished():
    """Requests in both engines, as their autoscaling sees them."""
    handle = serve.get_deployment_handle("Engines", "engines")
    figures = [handle.record_autoscaling_stats.remote().result(timeout_s=20) for _ in range(8)]
    return max(figure["unfinished"] for figure in figures)


async def test_a_second_engine_is_started_for_a_queue(url):
    """From here on there are two: fewer again only after ten minutes."""

    async def load(session):
        while len(engine_processes()) < 2:
            await asyncio.gather(*(ask(session, f"wake up {number}", False) for number in range(16)))

    def running():
        states = serve.status().applications["engines"].deployments["Engines"].replica_states
        return states.get("RUNNING", 0)

    assert running() == 1
    async with aiohttp.ClientSession(url) as session, asyncio.timeout(120):
        await load(session)
    await asyncio.to_thread(until, lambda: running() == 2, 120)


async def test_a_client_that_leaves_ends_its_request(url):
    async with aiohttp.ClientSession(url) as session:
        responses = []
        for _ in range(6):
            body = {"prompt": "x", "stream": True, **LONG, "max_tokens": 400}
            responses.append(await session.post("/v1/completions", json=body))
            await responses[-1].content.readline()
        assert await asyncio.to_thread(unfinished) > 0
        for response in responses:
            response.close()
        # Left to themselves they would take 20 s.
        await asyncio.to_thread(until, lambda: unfinished() == 0, 10)


async def test_one_engine_is_killed_under_load_and_nothing_accepted_is_lost(url):
    """Whole answers all come, and are right; so do streams that had not begun. A stream that had begun and was not the
    other engine's ends with an error that says so."""
    prompts = [f"question {number}" for number in range(14)]
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(180)) as session:
        right = dict(zip(prompts, await asyncio.gather(*(ask(session, p, False) for p in prompts)), strict=True))
        assert len(set(right.values())) > 1 and all(error is None for _, error in right.values())
        seen = Counter()
        whole = [asyncio.create_task(ask(session, p, False)) for p in prompts]
        streams = [asyncio.create_task(ask(session, p, True, seen)) for p in prompts]
        while len(seen) < 5:
            await asyncio.sleep(0.01)
        victim, other = engine_processes()
        victim.send_signal(signal.SIGKILL)
        answers = await asyncio.gather(*whole)
        streamed = dict(zip(prompts, await asyncio.gather(*streams), strict=True))
    assert dict(zip(prompts, answers, strict=True)) == right
    lost = {p for p, (_, error) in streamed.items() if error is not None}
    assert {streamed[p][1] for p in lost} <= {"engine_lost"}
    for prompt, (text, error) in streamed.items():
        assert right[prompt][0].startswith(text) if error else (text, None) == right[prompt]
    assert lost, "no stream was running on the killed engine: the test saw nothing"
    assert len(lost) <= 8, "more than the killed engine had slots for"
    until(lambda: len(engine_processes()) == 2 and other in engine_processes())
    async with aiohttp.ClientSession(url) as session:
        assert await ask(session, prompts[0], True) == right[prompts[0]]


async def test_turns_of_a_conversation_go_to_one_engine(url):
    """The engine that has the first turns says so: their tokens are cached."""
    async with aiohttp.ClientSession(url) as session:
        for number in range(4):
            messages = [{"role": "user", "content": f"{number} talks of many things, " * 8}]
            for turn in range(3):
                body = {"messages": messages, "max_tokens": 20, "ignore_eos": True, "temperature": 0}
                async with session.post("/v1/chat/completions", json=body) as response:
                    answer = await response.json()
                cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
                assert (cached > 100) == (turn > 0), (number, turn, cached)
                messages = [*messages, answer["choices"][0]["message"], {"role": "user", "content": "And then?"}]


class Context:
    """What Ray Serve tells a policy."""

    def __init__(self, unfinished, kv_use, queued=0, target=2):
        names = [f"engine {number}" for number in range(len(unfinished))]
        self.aggregated_metrics = {
            "unfinished": dict(zip(names, unfinished, strict=True)),
            "kv_use": dict(zip(names, kv_use, strict=True)),
        }
        self.total_queued_requests, self.target_num_replicas = queued, target


def test_engines_are_added_for_requests_and_for_pages():
    policy = ray_app.QueueAndPages(requests_per_replica=10, kv_use=0.8)
    assert policy(Context([10, 10], [0.1, 0.1]))[0] == 2
    assert policy(Context([10, 10], [0.1, 0.1], queued=20))[0] == 4
    assert policy(Context([1, 1], [1.0, 1.0]))[0] == pytest.approx(2.5)
    assert policy(Context([0, 0], [0.0, 0.0]))[0] == 0
    assert policy(Context([], [], target=3))[0] == 3, "nothing is known: stay"


def test_arguments_are_flags_of_serve():
    with pytest.raises(flags.UsageError, match="max_num_seqs"):
        ray_app.app({"model": "x", "max_num_seq": "3"})
    with pytest.raises(flags.UsageError, match="http_options"):
        ray_app.app({"model": "x", "port": "8000"})
    with pytest.raises(ConfigError, match="max_replicas"):
        ray_app.app({"model": "x", "min_replicas": "3"})
