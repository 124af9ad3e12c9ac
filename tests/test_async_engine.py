"""AsyncEngine on the tiny model: streams, cancellation, limits, and what happens when the engine stops or dies."""

import asyncio
import dataclasses
import time

import pytest

from jax_engine import async_engine
from jax_engine.async_engine import AsyncEngine
from jax_engine.errors import EngineStopped, InvalidRequest, QueueFull
from jax_engine.request import FinishReason
from jax_engine.sampling_params import RequestOutputKind, SamplingParams

PROMPT = [5, 6, 7]


@pytest.fixture
def engine(one_bucket):
    made = AsyncEngine(one_bucket.config, one_bucket.engine("async"))
    yield made
    made.shutdown()
    assert made._engine.num_requests == 0


def params(**changes) -> SamplingParams:
    return SamplingParams(**({"temperature": 0, "max_tokens": 20, "ignore_eos": True} | changes))


async def until(condition) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to pass within 5 s")


async def all_pages_back(engine: AsyncEngine) -> None:
    await until(lambda: engine._engine.scheduler.pool.num_free == engine.limits.num_pages)
    await until(lambda: engine.num_requests == 0)


async def collect(engine: AsyncEngine, **changes) -> list:
    return [output async for output in engine.generate(PROMPT, params(**changes))]


async def test_the_kinds_of_output_agree(engine):
    cumulative, delta, final = await asyncio.gather(*(collect(engine, output_kind=kind) for kind in RequestOutputKind))
    whole = final[0].outputs[0]
    assert len(final) == 1 and len(whole.token_ids) == 20
    assert cumulative[-1].outputs[0].token_ids == whole.token_ids
    assert cumulative[-1].outputs[0].text == whole.text
    assert [token for output in delta for token in output.outputs[0].token_ids] == whole.token_ids
    assert "".join(output.outputs[0].text for output in delta) == whole.text
    assert [output.finished for output in delta] == [False] * (len(delta) - 1) + [True]
    await all_pages_back(engine)


async def test_a_slow_reader_gets_several_tokens_at_a_time(engine):
    fields = {"n": 2, "logprobs": 1, "output_kind": RequestOutputKind.DELTA, "max_tokens": 40, "seed": 3}
    quick = await collect(engine, **fields)
    slow = []
    async for output in engine.generate(PROMPT, params(**fields)):
        slow.append(output)
        await until(lambda: engine._engine.num_requests == 0)
        await asyncio.sleep(0.01)
    assert len(slow) <= 3
    for index in (0, 1):
        parts = [[c for output in outputs for c in output.outputs if c.index == index] for outputs in (quick, slow)]
        for field in ("token_ids", "logprobs"):
            one, other = ([item for c in some for item in getattr(c, field)] for some in parts)
            assert one == other and len(one) == 40
        assert "".join(c.text for c in parts[0]) == "".join(c.text for c in parts[1])
        assert parts[1][-1].finish_reason is FinishReason.LENGTH
        assert parts[1][-1].cumulative_logprob == parts[0][-1].cumulative_logprob


async def test_cancelling_the_reader_aborts(engine):
    task = asyncio.create_task(collect(engine, max_tokens=100))
    await until(lambda: engine._engine.num_requests == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await all_pages_back(engine)
    assert engine.metrics.requests["abort"] == 1


async def test_closing_the_iterator_aborts(engine):
    stream = engine.generate(PROMPT, params(max_tokens=100, output_kind=RequestOutputKind.DELTA))
    await anext(stream)
    await stream.aclose()
    await all_pages_back(engine)


async def test_abort_ends_the_stream(engine):
    outputs = []
    async for output in engine.generate(PROMPT, params(max_tokens=100), "mine"):
        outputs.append(output)
        if len(outputs) == 1:
            await engine.abort("mine")
    assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason is FinishReason.ABORT
    await all_pages_back(engine)


async def test_a_request_id_is_used_once_at_a_time(engine):
    first = engine.generate(PROMPT, params(max_tokens=100), "same")
    await anext(first)
    with pytest.raises(InvalidRequest, match="in use"):
        await anext(engine.generate(PROMPT, params(), "same"))
    assert len((await anext(first)).outputs) == 1, "the one that was first goes on"
    await first.aclose()
    await all_pages_back(engine)


async def test_bad_requests_fail_before_any_output(engine):
    with pytest.raises(InvalidRequest, match="empty"):
        await anext(engine.generate([], params()))
    with pytest.raises(InvalidRequest, match="got NoneType"):
        await anext(engine.generate(None, params()))
    with pytest.raises(InvalidRequest, match="SamplingParams are needed, got dict"):
        await anext(engine.generate(PROMPT, {"temperature": 0}))
    assert engine.num_requests == 0


async def test_prompts_in_the_forms_of_vllm(engine):
    outputs = [output async for output in engine.generate({"prompt_token_ids": PROMPT}, params(max_tokens=2))]
    assert outputs[-1].prompt_token_ids == list(PROMPT)


def with_one_slot(engine):
    """So that a second request has to wait."""
    del engine.scheduler._free_slots[1:]
    return engine


async def refused(engine: AsyncEngine) -> QueueFull:
    with pytest.raises(QueueFull) as caught:
        await anext(engine.generate(PROMPT, params()))
    return caught.value


@pytest.mark.parametrize("bound", [{"max_queued_requests": 2}, {"max_queued_tokens": 2 * len(PROMPT)}])
async def test_the_queue_is_bounded(one_bucket, bound):
    config = dataclasses.replace(one_bucket.config, **bound)
    engine = AsyncEngine(config, with_one_slot(one_bucket.engine("async", config=config)))
    running = engine.generate(PROMPT, params(max_tokens=100))
    await anext(running)
    waiting = [asyncio.create_task(collect(engine)) for _ in range(2)]
    await until(lambda: engine._engine.num_requests == 3)
    assert (await refused(engine)).retry_after > 0
    await running.aclose()
    assert all(await asyncio.gather(*waiting))
    assert await collect(engine), "there is room again"
    await all_pages_back(engine)
    engine.shutdown()


async def test_who_waits_too_long_is_refused(one_bucket):
    config = dataclasses.replace(one_bucket.config, queue_timeout_s=0.02)
    engine = AsyncEngine(config, with_one_slot(one_bucket.engine("async", config=config)))
    running = engine.generate(PROMPT, params(max_tokens=120))
    await anext(running)
    error = await refused(engine)
    assert "0.02 s" in str(error) and error.retry_after >= 1
    await running.aclose()
    assert await collect(engine)
    await all_pages_back(engine)
    engine.shutdown()


async def test_draining_finishes_what_runs_and_takes_no_more(engine):
    running = asyncio.create_task(collect(engine, max_tokens=60, output_kind=RequestOutputKind.FINAL_ONLY))
    await until(lambda: engine._engine.num_requests == 1)
    await engine.drain(timeout_s=10)
    assert (await running)[0].outputs[0].finish_reason is FinishReason.LENGTH
    with pytest.raises(EngineStopped):
        await anext(engine.generate(PROMPT, params()))


async def test_shutdown_ends_open_streams(one_bucket):
    engine = AsyncEngine(one_bucket.config, one_bucket.engine("async"))
    stream = engine.generate(PROMPT, params(max_tokens=100, output_kind=RequestOutputKind.DELTA))
    await anext(stream)
    await asyncio.to_thread(engine.shutdown)
    with pytest.raises(EngineStopped):
        while True:
            await anext(stream)
    assert not engine.is_alive


async def test_a_dead_engine_tells_everybody(one_bucket, monkeypatch):
    inner = one_bucket.engine("async")
    engine = AsyncEngine(one_bucket.config, inner)
    streams = [engine.generate(PROMPT, params(max_tokens=100)) for _ in range(3)]
    for stream in streams:
        await anext(stream)

    def broken(batch):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(inner._runner, "dispatch", broken)
    for stream in streams:
        with pytest.raises(EngineStopped):
            while True:
                await anext(stream)
    await until(lambda: not engine.is_alive)
    with pytest.raises(EngineStopped):
        await anext(engine.generate(PROMPT, params()))


async def test_an_idle_engine_sleeps(engine):
    await collect(engine)
    await all_pages_back(engine)
    busy, wall = time.process_time(), time.perf_counter()
    await asyncio.sleep(0.5)
    assert time.process_time() - busy < 0.1 * (time.perf_counter() - wall)


async def test_a_profile_is_written(engine, tmp_path):
    with pytest.raises(InvalidRequest, match="no profile can be stopped"):
        await engine.stop_profile()
    await engine.start_profile(str(tmp_path))
    with pytest.raises(InvalidRequest, match="no profile can be started"):
        await engine.start_profile(str(tmp_path))
    await collect(engine)
    await engine.stop_profile()
    assert list(tmp_path.rglob("*.xplane.pb"))


async def test_a_profile_that_nobody_stops_ends_and_is_written(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(async_engine, "MAX_PROFILE_S", 0.05)
    await engine.start_profile(str(tmp_path))
    await until(lambda: list(tmp_path.rglob("*.xplane.pb")))
    await asyncio.sleep(0.1)
    with pytest.raises(InvalidRequest, match="no profile can be stopped"):
        await engine.stop_profile()
    await engine.start_profile(str(tmp_path))
    await engine.stop_profile()
    assert engine._profile_end is None
