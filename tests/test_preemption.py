"""Preemption on the tiny real model: a pool of a few pages, both ways back, and equal results bit for bit."""

import dataclasses
import random

import pytest

from jax_engine.sampling_params import SamplingParams
from jax_engine.schedule import Preemption, Schedule
from jax_engine.scheduler import Scheduler
from jax_engine.swap_space import SwapSpace
from tests.scheduling import expected, make_engine, make_limits, make_sequence, run

#: Costs that make one way the cheaper one.
SWAP = {"preemption_mode": "auto", "token_seconds": 1.0, "swap_page_seconds": 1e-6}
RECOMPUTE = {"preemption_mode": "auto", "token_seconds": 1e-6, "swap_page_seconds": 1.0}


@pytest.fixture(scope="module")
def deterministic(one_bucket):
    """One bucket, with swap space."""
    return type(one_bucket)(deterministic=True, token_buckets=(24,), swap_space_gib=0.01)


def random_requests(seed: int, count: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of which some share their beginning, with seeds, penalties and log-probabilities."""
    chance = random.Random(seed)
    shared = [chance.randrange(256) for _ in range(16)]
    requests = []
    for _ in range(count):
        prompt = chance.choice([[], shared]) + [chance.randrange(256) for _ in range(chance.randint(1, 20))]
        params = SamplingParams(
            temperature=chance.choice([0.0, 0.9]),
            top_p=chance.choice([1.0, 0.9]),
            seed=chance.getrandbits(40),
            repetition_penalty=chance.choice([1.0, 1.3]),
            presence_penalty=chance.choice([0.0, 0.7]),
            max_tokens=chance.randint(50, 70),
            ignore_eos=True,
            logprobs=3,
            prompt_logprobs=chance.choice([None, 2]),
        )
        requests.append((prompt, params))
    return requests


def serve(engine, requests, chance: random.Random | None = None):
    """All outputs, and the preemptions."""
    preemptions: list[Preemption] = []
    schedule = engine.scheduler.schedule

    def recording(now):
        made = schedule(now)
        preemptions.extend(made.preempted)
        return made

    engine.scheduler.schedule = recording
    waiting, outputs = list(enumerate(requests)), {}
    while waiting or engine.has_work:
        while waiting and (chance is None or chance.random() < 0.3):
            number, (prompt, params) = waiting.pop(0)
            engine.submit(engine.make_request(str(number), prompt, params))
        for output in engine.step():
            outputs[output.request_id] = output
        engine.scheduler.check()
    assert engine.scheduler.pool.num_free == engine.limits.num_pages
    assert engine.scheduler.swap_space.num_free == engine.limits.num_swap_pages
    return [(outputs[str(i)].outputs, outputs[str(i)].prompt_logprobs) for i in range(len(requests))], preemptions


@pytest.mark.parametrize("costs", [SWAP, RECOMPUTE], ids=["swap", "recompute"])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_preempted_requests_give_the_same_bit_for_bit(deterministic, costs, depth, monkeypatch):
    monkeypatch.setattr(deterministic.runner._page_store, "_most_beside", depth - 1)  # both ways out are taken
    requests = random_requests(1, 16)
    want, none = serve(deterministic.engine("sync", enable_prefix_caching=False), requests)
    assert not none
    engine = deterministic.engine("async", depth, num_pages=20, **costs)
    got, preemptions = serve(engine, requests, random.Random(2))
    ways = {preemption.way for preemption in preemptions}
    assert ways == ({"swap"} if costs is SWAP else {"recompute"})
    assert len({preemption.sequence for preemption in preemptions}) >= 8
    assert got == want


def test_every_request_is_preempted_and_gives_the_same(deterministic):
    """Without prefix hits nothing but the copies can bring the KV back."""
    requests = random_requests(3, 10)
    want, _ = serve(deterministic.engine("sync", enable_prefix_caching=False), requests)
    for costs in (SWAP, RECOMPUTE):
        engine = deterministic.engine("async", 3, num_pages=17, enable_prefix_caching=False, **costs)
        due = set(range(len(requests)))

        def preempt_everybody(scheduler=engine.scheduler, due=due):
            """Takes a running sequence's pages, whoever it is, the first time it has some output."""
            for sequence in list(scheduler._running):
                if int(sequence.request.request_id) in due and sequence.num_output_tokens > 5:
                    due.remove(int(sequence.request.request_id))
                    return sequence
            return None

        schedule = engine.scheduler.schedule
        engine.scheduler.schedule = with_forced_preemptions(engine.scheduler, schedule, preempt_everybody)
        got, _ = serve(engine, requests)
        assert not due
        assert got == want


def with_forced_preemptions(scheduler: Scheduler, schedule, choose):
    """`schedule`, with a chosen sequence preempted before it."""

    def forced(now):
        victim = choose()
        extra = Schedule([], 0, 0, None, [], [], [], [], [], [], now)
        if victim is not None:
            scheduler._preempt(victim, victim, extra)
        made = schedule(now)
        return made._replace(
            preempted=extra.preempted + made.preempted,
            swapped_out=extra.swapped_out + made.swapped_out,
            dropped_tickets=extra.dropped_tickets + made.dropped_tickets,
        )

    return forced


def test_a_real_pool_measures_what_copies_cost(deterministic):
    limits = deterministic.limits
    assert limits.num_swap_pages > 0 and limits.swap_page_seconds >= 0 and limits.token_seconds > 0


# On the fake device.


@pytest.mark.parametrize("costs", [SWAP, RECOMPUTE], ids=["swap", "recompute"])
def test_the_schedule_says_who_gave_way_to_whom_and_why(costs):
    limits = make_limits(num_pages=16, num_swap_pages=64, **costs)
    engine = make_engine(limits)
    preemptions = []
    for number in range(4):
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        engine.submit(engine.make_request(str(number), [number] * 8, params))
    while engine.has_work:
        schedule = engine.scheduler.schedule

        def recording(now, schedule=schedule):
            made = schedule(now)
            preemptions.extend(made.preempted)
            return made

        engine.scheduler.schedule = recording
        engine.step()
        engine.scheduler.schedule = schedule
    assert preemptions
    for preemption in preemptions:
        assert preemption.sequence.order > preemption.beneficiary.order, "who came first gave way"
        cheaper = "swap" if preemption.seconds_to_swap < preemption.seconds_to_recompute else "recompute"
        assert preemption.way == cheaper


def test_the_cheapest_to_bring_back_gives_way_among_equals():
    scheduler = Scheduler(make_limits(num_pages=16, token_seconds=1.0, max_inflight_steps=1), "fcfs")
    first, short, long = (make_sequence(size, 30, False) for size in (8, 7, 12))
    for sequence in (first, short, long):
        scheduler.add(sequence)
    while not (schedule := scheduler.schedule()).preempted:
        scheduler.commit(schedule, [1] * len(schedule.rows))
    assert [preemption.sequence for preemption in schedule.preempted] == [short]


def test_nobody_takes_pages_from_those_who_rank_before_him():
    scheduler = Scheduler(make_limits(num_pages=8, max_inflight_steps=1, enable_prefix_caching=False), "priority")
    late, urgent = make_sequence(15, 30, False), make_sequence(12, 30, False, priority=-100)
    scheduler.add(late)
    commit(scheduler, scheduler.schedule())
    scheduler.add(urgent)
    schedules = []
    while not (late.num_preemptions or urgent.num_preemptions):
        schedules.append(scheduler.schedule())
        commit(scheduler, schedules[-1])
    assert late.num_preemptions and not urgent.num_preemptions
    assert any(urgent in rows and late not in rows for rows in ({row[0] for row in s.rows} for s in schedules)), (
        "the pool was full when the first to run, who ranks last, needed a page"
    )


def test_who_has_a_chunk_in_a_step_does_not_give_way_in_it():
    """Its pages would be another's while the step writes its keys and values to them."""
    scheduler = Scheduler(make_limits(max_inflight_steps=1))
    first, second = make_sequence(6, 30, False), make_sequence(9, 30, False)
    for sequence in (first, second):
        scheduler.add(sequence)
    schedule = scheduler.schedule()
    chunks = schedule.rows
    assert {row.sequence: row.count for row in chunks} == {first: 6, second: 9}
    assert scheduler._victim(first, chunks) is None
    commit(scheduler, schedule)
    assert scheduler._victim(first, []) is second, "it has no row in the next step yet"


def test_who_joins_leaves_a_page_for_each_that_runs():
    scheduler = Scheduler(make_limits(num_pages=8, max_inflight_steps=1, enable_prefix_caching=False))
    running, joining = make_sequence(12, 30, False), make_sequence(16, 30, False)
    scheduler.add(running)
    commit(scheduler, scheduler.schedule())
    commit(scheduler, scheduler.schedule())
    scheduler.add(joining)
    assert len(running.pages) == 4 and scheduler.pool.num_free == 4, "just enough for 16 tokens"
    assert not scheduler.schedule().admitted


def commit(scheduler, schedule):
    scheduler.commit(schedule, [1] * len(schedule.rows))


def test_swap_space_is_never_overdrawn():
    engine = make_engine(make_limits(num_pages=16, num_swap_pages=8, **SWAP))
    requests = [([number] * 6, 40) for number in range(8)]
    for number, (prompt, max_tokens) in enumerate(requests):
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        engine.submit(engine.make_request(str(number), prompt, params))
    outputs = run(engine)
    for number, (prompt, max_tokens) in enumerate(requests):
        assert outputs[str(number)].outputs[0].token_ids == expected(prompt, max_tokens, 64, ignore_eos=True)
    assert engine.metrics.preemptions > 0


def test_costs_decide_the_way_back():
    sequence = make_sequence(32, 4)
    sequence.num_computed = 32
    limits = make_limits(num_swap_pages=8, token_seconds=0.01, swap_page_seconds=0.01)
    assert SwapSpace(limits).prefers_swap(sequence), "16 page copies against 32 tokens"
    assert not SwapSpace(dataclasses.replace(limits, swap_page_seconds=0.03)).prefers_swap(sequence)
    assert not SwapSpace(dataclasses.replace(limits, num_swap_pages=7)).prefers_swap(sequence)
    assert not SwapSpace(dataclasses.replace(limits, preemption_mode="recompute")).prefers_swap(sequence)
