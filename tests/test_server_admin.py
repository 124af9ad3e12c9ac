"""/admin/reset_prefix_cache: what was cached before is computed again; running requests and their answers stay."""

import json

import aiohttp
import pytest

from tests import faulty_server
from tests.test_server_faults import COMPLETIONS, ENDLESS, canary, server_process, settled
from tests.test_server_life import serving

RESET = "/admin/reset_prefix_cache"
KEY = {"Authorization": "Bearer boss"}
PROMPT = {"prompt": "the same beginning, long enough for full pages of the cache. " * 3, "max_tokens": 2}


async def cached_tokens(session, **fields):
    """Tokens of PROMPT that were found in the cache."""
    async with session.post(COMPLETIONS, json=PROMPT | fields) as response:
        return (await response.json())["usage"]["prompt_tokens_details"]["cached_tokens"]


async def reset(session):
    async with session.post(RESET, headers=KEY) as response:
        assert response.status == 200 and await response.json() == {"status": "reset"}


async def test_no_later_request_finds_what_was_cached():
    engine = faulty_server.build()
    try:
        async with serving(engine, admin_keys=["boss"]) as (session, _):
            before = await canary(session)
            assert await cached_tokens(session) == 0
            found = await cached_tokens(session)
            assert found > 0
            await reset(session)
            assert await cached_tokens(session) == 0
            assert await cached_tokens(session) == found, "it fills again"
            assert await canary(session) == before
            await settled(engine)
            engine._engine.scheduler.check()
    finally:
        engine.shutdown()


async def test_running_requests_go_on():
    engine = faulty_server.build()
    try:
        async with serving(engine, admin_keys=["boss"]) as (session, _):
            async with session.post(COMPLETIONS, json=ENDLESS | {"max_tokens": 60}) as response:
                whole = await response.text()
            response = await session.post(COMPLETIONS, json=ENDLESS | {"max_tokens": 60})
            begun = (await response.content.readline()).decode()
            assert engine.num_requests == 1
            for _ in range(3):
                await reset(session)
            assert texts(begun + await response.text()) == texts(whole)
            await settled(engine)
            engine._engine.scheduler.check()
    finally:
        engine.shutdown()


def texts(stream):
    """What a stream says, however it was cut into events."""
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    return "".join(event["choices"][0]["text"] for event in events)


@pytest.mark.parametrize("processes", [0, 2])
async def test_through_a_server_process(tmp_path, processes):
    keys = tmp_path / "admin"
    keys.write_text("boss\n")
    with server_process(f"--admin_key_file={keys}", f"--api_processes={processes}") as (_, url, _):
        async with aiohttp.ClientSession(url) as session:
            assert (await cached_tokens(session), await cached_tokens(session) > 0) == (0, True)
            for headers in ({}, {"Authorization": "Bearer other"}):
                async with session.post(RESET, headers=headers) as response:
                    assert response.status == 401
            async with session.get(RESET, headers=KEY) as response:
                assert response.status == 405
            await reset(session)
            assert await cached_tokens(session) == 0
