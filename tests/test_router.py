"""A foreign router in front of two of our servers: what it needs of one (/health, /v1/models, vLLM's names of metrics,
/load, drain) is there, and a server that leaves or is killed takes no request with it. Long, and needs `vllm-router`.

    python -m pytest -m long tests/test_router.py
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import aiohttp
import pytest

from tests.test_server_faults import server_process

ROUTER = shutil.which("vllm-router") or shutil.which("vllm-router", path=str(Path(sys.executable).parent))
pytestmark = [pytest.mark.long, pytest.mark.skipif(ROUTER is None, reason="vllm-router is not installed")]
MODEL = "faulty"
LONG = {"model": MODEL, "max_tokens": 100, "temperature": 0, "ignore_eos": True}
#: So that the test need not wait a minute for what an operator would wait for.
QUICK = [
    "--worker-startup-check-interval=1",
    "--health-check-interval-secs=1",
    "--health-failure-threshold=1",
    "--health-success-threshold=1",
    "--retry-initial-backoff-ms=50",
]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.asynccontextmanager
async def router(*urls, policy="cache_aware"):
    """A session with the router's address."""
    port, metrics_port = free_port(), free_port()
    command = [ROUTER, "--port", str(port), "--prometheus-port", str(metrics_port), "--policy", policy, *QUICK]
    process = subprocess.Popen(
        [*command, "--worker-urls", *urls], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ
    )
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", timeout=aiohttp.ClientTimeout(90)) as session:
            async with asyncio.timeout(60):
                while not await healthy(session):
                    assert process.poll() is None, process.stdout.read().decode()
                    await asyncio.sleep(0.2)
            yield session
    finally:
        process.kill()
        process.communicate()


async def healthy(session):
    try:
        async with session.get("/health") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


async def ask(session, prompt, stream=False):
    """(status, text)"""
    async with session.post("/v1/completions", json={"prompt": prompt, "stream": stream, **LONG}) as response:
        if response.status != 200 or not stream:
            body = await response.json()
            return response.status, body["choices"][0]["text"] if response.status == 200 else body
        text, ended = "", False
        async for line in response.content:
            if line.startswith(b"data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
            ended = ended or line.startswith(b"data: [DONE]")
        return 200 if ended else 0, text


def test_what_routers_read_is_there():
    """vLLM's names, as its routers and autoscalers ask for them."""

    async def scrape(url):
        async with aiohttp.ClientSession(url) as session:
            async with session.get("/metrics") as response:
                text = await response.text()
            async with session.get("/load") as response:
                assert (await response.json())["server_load"] == 0
            async with session.get("/v1/models") as response:
                assert (await response.json())["data"][0]["id"] == MODEL
        return text

    with server_process("--vllm_metrics") as (_, url, _):
        text = asyncio.run(scrape(url))
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_hits_total"):
        assert re.search(rf'^vllm:{name}{{engine="0",model_name="{MODEL}"}} [0-9.e-]+$', text, re.M), text


@pytest.fixture
def two():
    words = ("--slow-steps", "--vllm_metrics", "--drain_timeout_s=20")
    with server_process(*words) as (first, url, _), server_process(*words) as (second, other, _):
        yield [(first, url), (second, other)]


async def generated(url):
    async with aiohttp.ClientSession(url) as session, session.get("/metrics") as response:
        return float(re.search(r"^vllm:generation_tokens_total\S* (\S+)$", await response.text(), re.M)[1])


async def test_both_serve_and_answers_pass_unchanged(two):
    urls = [url for _, url in two]
    async with router(*urls, policy="round_robin") as session:
        async with session.get("/v1/models") as response:
            assert response.status == 200 and (await response.json())["data"][0]["id"] == MODEL
        async with aiohttp.ClientSession(urls[0]) as direct:
            right = await ask(direct, "hello")
        answers = await asyncio.gather(*(ask(session, "hello", stream) for stream in [False, True] * 4))
        assert set(answers) == {right}
        assert min([await generated(url) for url in urls]) >= 100, "both were asked"
        async with session.post("/v1/chat/completions", json={"model": MODEL, "messages": []}) as response:
            assert response.status == 400 and "error" in await response.json()
        async with session.post("/v1/completions", json={"prompt": "x", **LONG, "temperature": -1}) as response:
            assert response.status == 400 and "temperature" in await response.text()


async def test_a_server_that_drains_takes_no_request_with_it(two):
    (leaving, url), (_, other) = two
    async with router(url, other, policy="round_robin") as session:
        (_, right) = await ask(session, "hello")
        running = [asyncio.create_task(ask(session, "hello", stream)) for stream in [False, True] * 4]
        await asyncio.sleep(0.8)
        leaving.send_signal(signal.SIGTERM)
        later = []
        for _ in range(20):
            await asyncio.sleep(0.1)
            later.append(asyncio.create_task(ask(session, "hello")))
        answers = Counter(await asyncio.gather(*running, *later))
        assert answers == {(200, right): 28}
        assert leaving.wait(20) == 0


async def test_a_server_that_is_killed_is_left_out(two):
    (victim, url), (_, other) = two
    async with router(url, other, policy="round_robin") as session:
        (_, right) = await ask(session, "hello")
        victim.kill()
        async with asyncio.timeout(30):
            while (await ask(session, "hello"))[0] != 200:
                await asyncio.sleep(0.2)
        await asyncio.sleep(3)
        assert set(await asyncio.gather(*(ask(session, "hello") for _ in range(8)))) == {(200, right)}
