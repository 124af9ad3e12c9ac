"""The scheduler and the page pool against their invariants, and whole requests against answers computed by hand."""

import dataclasses
import random

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from jax_engine.errors import InvalidRequest
from jax_engine.page_pool import PagePool
from jax_engine.request import FinishReason
from jax_engine.sampling_params import RequestOutputKind, SamplingParams
from jax_engine.scheduler import Scheduler
from jax_engine.sequence import Status
from tests.scheduling import EOS, VOCAB, expected, make_engine, make_limits, make_sequence, run

requests_strategy = st.lists(
    st.tuples(
        st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40),
        st.integers(1, 30),
        st.booleans(),
        st.integers(-1, 1),
        st.integers(1, 3),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    requests=requests_strategy,
    scheduling=st.sampled_from(["static", "sync", "async"]),
    depth=st.integers(1, 4),
    num_pages=st.integers(16, 40),
    budget=st.integers(4, 16),
    policy=st.sampled_from(["fcfs", "priority", "fair", "slo"]),
    one_bucket=st.booleans(),
)
def test_tokens_are_those_of_each_request_alone(requests, scheduling, depth, num_pages, budget, policy, one_bucket):
    limits = make_limits(
        scheduling=scheduling,
        max_inflight_steps=depth if scheduling == "async" else 1,
        num_pages=num_pages,
        max_num_batched_tokens=budget,
        decode_buckets=() if one_bucket else (1, 2, 4),
        token_buckets=(16,) if one_bucket else (8, 16),
    )
    engine = make_engine(limits, policy)
    for number, (prompt, max_tokens, ignore_eos, priority, n) in enumerate(requests):
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=ignore_eos, n=n)
        engine.submit(engine.make_request(str(number), prompt, params, priority))
    outputs = run(engine)
    for number, (prompt, max_tokens, ignore_eos, _, n) in enumerate(requests):
        output = outputs[str(number)]
        want = expected(prompt, max_tokens, limits.max_model_len, ignore_eos)
        assert output.finished and len(output.outputs) == n
        for completion in output.outputs:
            assert completion.token_ids == want
            stopped = want[-1] == EOS and not ignore_eos
            assert completion.finish_reason == (FinishReason.STOP if stopped else FinishReason.LENGTH)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(requests=requests_strategy, depth=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_arrivals_and_aborts_at_any_time(requests, depth, seed):
    chance = random.Random(seed)
    limits = make_limits(max_inflight_steps=depth, num_pages=20)
    engine = make_engine(limits)
    todo = list(enumerate(requests))
    aborted, outputs = set(), {}
    for _ in range(10_000):
        if not todo and not engine.has_work:
            break
        if todo and chance.random() < 0.4:
            number, (prompt, max_tokens, ignore_eos, _, n) = todo.pop(0)
            params = SamplingParams(
                temperature=0, max_tokens=max_tokens, ignore_eos=ignore_eos, n=n, output_kind=RequestOutputKind.DELTA
            )
            engine.submit(engine.make_request(str(number), prompt, params))
        if chance.random() < 0.1:
            victim = str(chance.randrange(len(requests)))
            if engine.abort(victim) is not None:
                aborted.add(victim)
        for output in engine.step():
            for completion in output.outputs:
                outputs.setdefault((output.request_id, completion.index), []).extend(completion.token_ids)
        engine.scheduler.check()
    assert engine.scheduler.pool.num_free == limits.num_pages
    for number, (prompt, max_tokens, ignore_eos, _, n) in enumerate(requests):
        want = expected(prompt, max_tokens, limits.max_model_len, ignore_eos)
        for index in range(n):
            got = outputs.get((str(number), index), [])
            assert got == want[: len(got)]
            assert str(number) in aborted or got == want


def test_static_admits_nobody_until_the_batch_has_ended():
    scheduler = Scheduler(make_limits(scheduling="static", max_inflight_steps=1))
    first = [make_sequence(4, 2, stop=False), make_sequence(4, 9, stop=False)]
    late = make_sequence(4, 2)
    for sequence in first:
        scheduler.add(sequence)
    running = True
    while running:
        schedule = scheduler.schedule()
        if first[0] in {row.sequence for row in schedule.rows}:
            scheduler.add(late) if late.order < 0 else None
        running = any(sequence.status is not Status.FINISHED for sequence in first)
        assert (late not in {row.sequence for row in schedule.rows}) or not running
        scheduler.commit(schedule, [1] * len(schedule.rows))


def test_a_static_batch_is_not_cut_short_by_the_budget_of_one_step():
    scheduler = Scheduler(make_limits(scheduling="static", max_inflight_steps=1))
    sequences = [make_sequence(12, 9, stop=False) for _ in range(5)]
    for sequence in sequences:
        scheduler.add(sequence)
    together = 0
    while scheduler.has_work:
        schedule = scheduler.schedule()
        together = max(together, len(schedule.rows))
        assert sequences[4].slot < 0 or not any(s.status is Status.RUNNING for s in sequences[:4])
        scheduler.commit(schedule, [1] * len(schedule.rows))
    assert together == 4


def test_decodes_and_prompt_chunks_share_a_step():
    scheduler = Scheduler(make_limits())
    short, long = make_sequence(3, 20), make_sequence(40, 5)
    scheduler.add(short)
    schedule = scheduler.schedule()
    scheduler.commit(schedule, [1])
    scheduler.add(long)
    schedule = scheduler.schedule()
    assert [(row.sequence, row.start, row.count, row.samples) for row in schedule.rows] == [
        (short, 3, 1, True),
        (long, 0, 15, False),
    ]


def test_priority_policy_serves_low_numbers_first():
    scheduler = Scheduler(make_limits(max_num_seqs=1, max_num_batched_tokens=8), "priority")
    sequences = []
    for priority in (5, -1, 3):
        sequence = make_sequence(4, 1)
        sequence.request = dataclasses.replace(sequence.request, priority=priority)
        scheduler.add(sequence)
        sequences.append(sequence)
    order = []
    while scheduler.has_work:
        schedule = scheduler.schedule()
        order += [row.sequence.request.priority for row in schedule.rows]
        scheduler.commit(schedule, [1] * len(schedule.rows))
    assert order == [-1, 3, 5]


def test_a_prompt_that_cannot_fit_is_refused():
    engine = make_engine(make_limits())
    with pytest.raises(InvalidRequest, match="64 tokens"):
        engine.make_request("r", [1] * 64, SamplingParams())
    with pytest.raises(InvalidRequest, match="empty"):
        engine.make_request("r", [], SamplingParams())
    with pytest.raises(InvalidRequest, match=r"\[0, 23\)"):
        engine.make_request("r", [23], SamplingParams())


def test_page_pool_refuses_what_it_does_not_have():
    pool = PagePool(2, 4)
    sequence = make_sequence(4, 1)
    pool.grow(sequence, 2)
    pool.check([sequence])
    with pytest.raises(ValueError, match="0 of 2 free"):
        pool.grow(make_sequence(1, 1), 1)
    pool.release(sequence)
    pool.check([])
    sequence.pages.append(1)
    with pytest.raises(AssertionError):
        pool.check([sequence])
