"""Several replicas behind one AsyncEngine, on runners whose answers are computed by hand: routing, aborts, bounds,
sums, and what happens when one of them dies. Real models on several devices: on_eight_devices.py.
"""

import asyncio
import dataclasses
import random
import time

import pytest

from jax_engine.async_engine import AsyncEngine
from jax_engine.config import EngineConfig, Limits
from jax_engine.engine import Engine
from jax_engine.engine_view import look
from jax_engine.errors import ConfigError, EngineStopped, InvalidRequest, QueueFull
from jax_engine.request import FinishReason, Request
from jax_engine.request_queue import RequestQueue
from jax_engine.router import Router
from jax_engine.sampling_params import RequestOutputKind, SamplingParams
from jax_engine.testing.fake_runner import FakeRunner
from serving.metrics import ServerMetrics
from tests.test_async_engine import until

LIMITS = Limits(
    max_model_len=64,
    max_num_seqs=2,
    max_num_batched_tokens=16,
    page_size=4,
    num_pages=40,
    scheduling="async",
    max_inflight_steps=2,
    token_buckets=(16,),
    decode_buckets=(2,),
)
PROMPT = [5, 6, 7]
VOCAB_SIZE = 50


def make(count: int = 2, **config) -> AsyncEngine:
    chosen = EngineConfig(**config)
    queue = RequestQueue(chosen)
    engines = [
        Engine(
            FakeRunner(LIMITS, VOCAB_SIZE), None, vocab_size=VOCAB_SIZE, eos_token_ids=(), config=chosen, queue=queue
        )
        for _ in range(count)
    ]
    return AsyncEngine(chosen, *engines)


@pytest.fixture
def engine():
    made = make()
    yield made
    made.shutdown()
    assert [replica.num_requests for replica in made.replicas] == [0, 0]


@pytest.fixture
def slow_engine(engine, monkeypatch):
    """The same, whose steps take long enough for a test to find its requests unfinished."""
    for replica in engine.replicas:

        def dispatch(batch, wrapped=replica._runner.dispatch):
            time.sleep(0.01)
            return wrapped(batch)

        monkeypatch.setattr(replica._runner, "dispatch", dispatch)
    return engine


def params(**changes) -> SamplingParams:
    return SamplingParams(**({"temperature": 0, "max_tokens": 20, "ignore_eos": True, "detokenize": False} | changes))


async def collect(engine: AsyncEngine, prompt=PROMPT, request_id=None, **changes) -> list[int]:
    kind = {"output_kind": RequestOutputKind.FINAL_ONLY}
    async for output in engine.generate(prompt, params(**kind | changes), request_id):
        tokens = output.outputs[0].token_ids
    return tokens


def request(prompt: list[int], salt: str | None = None, **changes) -> Request:
    return Request(request_id="r", prompt_token_ids=tuple(prompt), sampling_params=params(**changes), cache_salt=salt)


async def test_replicas_share_the_work_and_give_what_one_gives(engine):
    draw = random.Random(3)
    prompts = [[draw.randrange(VOCAB_SIZE) for _ in range(draw.randrange(1, 30))] for _ in range(30)]
    one = make(1)
    want = await asyncio.gather(*(collect(one, prompt) for prompt in prompts))
    one.shutdown()
    assert await asyncio.gather(*(collect(engine, prompt) for prompt in prompts)) == want
    done = [replica.metrics.requests["length"] for replica in engine.replicas]
    assert sum(done) == 30 and min(done) >= 10


async def test_counters_are_added_up_and_gauges_shown_by_replica(engine):
    await asyncio.gather(*(collect(engine, [number] * 9) for number in range(8)))
    parts = [replica.metrics.snapshot() for replica in engine.replicas]
    total = engine.metrics.snapshot()
    for name in ("steps", "generated_tokens", "batched_tokens", "padding_tokens", "looked_up_tokens"):
        assert total[name] == sum(part[name] for part in parts) and all(part[name] for part in parts), name
    assert total["generated_tokens"] == 160 and total["requests_finished"] == {"length": 8}
    assert sum(total["histograms"]["time_to_first_token"]["counts"]) == 8
    assert sum(total["device_idle_seconds"].values()) <= total["wall_seconds"] * 1.01, "a share of the time"
    assert engine.gauges.num_pages == 80
    view = look(engine, 60.0)
    assert [len(replica.pages) for replica in view.replicas] == [40, 40] and all(r.steps for r in view.replicas)
    text = ServerMetrics("m").exposition(view).decode()
    assert 'jax_engine_replica_requests_running{model="m",replica="1"} 0.0' in text
    assert 'jax_engine_kv_pages{model="m"} 80.0' in text


async def test_seeds_do_not_depend_on_the_replica(engine, monkeypatch):
    def seeds(made: AsyncEngine) -> list:
        drawn = []
        for replica in made.replicas:

            def add(sequence, wrapped=replica.scheduler.add):
                drawn.append((sequence.request.request_id, sequence.seed))
                wrapped(sequence)

            monkeypatch.setattr(replica.scheduler, "add", add)
        return drawn

    one = make(1)
    found = []
    for made in (one, engine):
        drawn = seeds(made)
        await asyncio.gather(*(collect(made, [n] * 5, f"{n}", seed=9 if n == 3 else None) for n in range(8)))
        found.append(sorted(drawn))
    one.shutdown()
    assert found[0] == found[1] and len({seed for _, seed in found[0]}) == 8


async def test_an_abort_finds_its_replica(slow_engine):
    streams = [
        slow_engine.generate([n], params(max_tokens=60, output_kind=RequestOutputKind.DELTA), f"{n}") for n in range(4)
    ]
    for stream in streams:
        await anext(stream)
    assert [replica.num_requests for replica in slow_engine.replicas] == [2, 2]
    for number, stream in enumerate(streams):
        await slow_engine.abort(f"{number}")
        *_, last = [output async for output in stream]
        assert last.outputs[0].finish_reason is FinishReason.ABORT
    await until(lambda: all(replica.scheduler.pool.num_free == 40 for replica in slow_engine.replicas))


async def test_an_id_is_used_once_over_all_replicas(slow_engine):
    first = slow_engine.generate(PROMPT, params(max_tokens=60), "same")
    await anext(first)
    with pytest.raises(InvalidRequest, match="in use"):
        await collect(slow_engine, [1], "same")
    await slow_engine.abort("same")
    assert [output.finished async for output in first][-1]
    assert len(await collect(slow_engine, [1], "same")) == 20


async def test_one_bound_holds_for_the_queue_of_all():
    engine = make(max_queued_requests=3)
    for replica in engine.replicas:
        del replica.scheduler._free_slots[:]
    tasks = [asyncio.create_task(collect(engine, [number])) for number in range(3)]
    await until(lambda: len(engine.replicas[0].queue) == 3)
    assert engine.replicas[0].queue is engine.replicas[1].queue
    with pytest.raises(QueueFull, match="3 requests are waiting"):
        await collect(engine, [9])
    await asyncio.to_thread(engine.shutdown)
    for task in tasks:
        with pytest.raises(EngineStopped):
            await task


async def test_requests_that_wait_too_long_are_refused_by_their_own_replica():
    engine = make(queue_timeout_s=0.05)
    blocked, free = engine.replicas
    del blocked.scheduler._free_slots[:]
    results = await asyncio.gather(*(collect(engine, [n] * 4) for n in range(4)), return_exceptions=True)
    kinds = [type(result) for result in results]
    assert kinds.count(QueueFull) == 2 and kinds.count(list) == 2
    assert free.num_requests == blocked.num_requests == 0
    await asyncio.to_thread(engine.shutdown)


async def test_one_that_dies_ends_all_and_is_named(monkeypatch):
    engine = make()
    dispatch = engine.replicas[0]._runner.dispatch

    def held(batch):
        while engine.is_alive:
            time.sleep(0.001)
        return dispatch(batch)

    def broken(batch):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(engine.replicas[0]._runner, "dispatch", held)
    monkeypatch.setattr(engine.replicas[1]._runner, "dispatch", broken)
    tasks = [asyncio.create_task(collect(engine, [number])) for number in range(2)]
    for task in tasks:
        with pytest.raises(EngineStopped, match="replica 1 of the engine has died"):
            await task
    await until(lambda: not engine.is_alive)
    with pytest.raises(EngineStopped):
        await collect(engine)
    await asyncio.to_thread(engine.shutdown)


async def test_draining_waits_for_every_replica(slow_engine):
    tasks = [asyncio.create_task(collect(slow_engine, [number], max_tokens=60)) for number in range(4)]
    await until(lambda: all(replica.num_requests for replica in slow_engine.replicas))
    await slow_engine.drain(10.0)
    assert all(task.done() and len(task.result()) == 60 for task in tasks)
    with pytest.raises(EngineStopped):
        await collect(slow_engine)


async def test_the_prefix_cache_of_every_replica_is_reset(engine):
    prompts = [[number] * 12 for number in range(4)]
    for _ in range(2):
        await asyncio.gather(*(collect(engine, prompt) for prompt in prompts))
    assert engine.metrics.tokens["cached"] == 4 * 8, "each went where its prefix lay"
    await engine.reset_prefix_cache()
    await asyncio.gather(*(collect(engine, prompt) for prompt in prompts))
    assert engine.metrics.tokens["cached"] == 4 * 8


def test_the_router_sends_a_prompt_where_its_beginning_lies():
    router = Router(2, LIMITS)
    first, other = request([1] * 20), request([2] * 20)
    home = router.choose(first)
    assert router.choose(other) == 1 - home
    for placed, sent in ((home, first), (1 - home, other)):
        router.release(placed, sent)
    longer = request([1] * 20 + [3] * 10)
    assert router.choose(longer) == home
    router.release(home, longer)
    router.choose(request([9] * 20))
    assert router.choose(request([1] * 20, salt="theirs")) != router.choose(request([2] * 3))


def test_a_popular_beginning_does_not_crowd_one_replica():
    router = Router(2, LIMITS)
    prompts = [[7] * 12 + [number] * 20 for number in range(40)]
    places = [router.choose(request(prompt)) for prompt in prompts]
    assert 15 <= sum(places) <= 25


def test_work_is_shared_by_tokens_not_by_requests():
    router = Router(2, LIMITS)
    assert router.choose(request([1] * 20, max_tokens=40)) == 0
    assert [router.choose(request([n] * 4, max_tokens=6)) for n in range(2, 8)] == [1] * 6


def test_replicas_are_for_one_process():
    with pytest.raises(ConfigError, match="data_parallel_size 2 is for one process"):
        EngineConfig(data_parallel_size=2, num_processes=2, coordinator_address="localhost:7100")
    with pytest.raises(ConfigError, match="data_parallel_size must be at least 1"):
        EngineConfig(data_parallel_size=0)
    assert dataclasses.replace(EngineConfig(), data_parallel_size=2).data_parallel_size == 2
