"""Scheduler, page pool, batches and a fake device together, in any order of events, against every invariant.

The fake device keeps the tokens that steps write at their places and derives each answer from them, so a page that is
lost, shared by mistake, found under a wrong text, given away too early or brought back wrongly changes an answer.
"""

import dataclasses

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jax_engine.batch import BatchBuilder
from jax_engine.page_groups import PageGroups
from jax_engine.request import FinishReason, Request
from jax_engine.sampling_params import SamplingParams
from jax_engine.scheduler import Scheduler
from jax_engine.sequence import Sequence, Status
from jax_engine.testing.fake_runner import FakeRunner
from tests.scheduling import EOS, VOCAB, expected, make_limits

#: Prompts begin with one of these, so that they share pages.
BEGINNINGS = ([], [5] * 8, [5] * 8 + [7] * 12, list(range(20)))

configurations = st.fixed_dictionaries(
    {
        "max_inflight_steps": st.integers(1, 4),
        "page_groups": st.sampled_from(
            [PageGroups(), PageGroups(), PageGroups(1, 1, 6), PageGroups(1, 3, 3), PageGroups(2, 1, 13)]
        ),
        "spare_pages": st.integers(0, 16),  # beside those of the longest sequence
        "scheduling": st.sampled_from(["static", "async", "async"]),
        "max_num_batched_tokens": st.integers(4, 16),
        "decode_buckets": st.sampled_from([(), (1, 2, 4)]),
        "enable_prefix_caching": st.booleans(),
        "fill_buckets": st.booleans(),
        "max_concurrent_prefills": st.sampled_from([None, 1, 2]),
        "prefill_token_budget": st.sampled_from([None, 3, 8]),
        "max_decode_gap_s": st.sampled_from([None, 0.5]),
        "num_swap_pages": st.sampled_from([0, 8, 64]),
        "preemption_mode": st.sampled_from(["auto", "recompute", "swap"]),
        "token_seconds": st.sampled_from([0.0, 1.0]),
        "swap_page_seconds": st.sampled_from([0.0, 1.0]),
        "user_weights": st.sampled_from([{}, {"ann": 3.0}]),
        "slo_classes": st.just({"fast": (2.0, 1.0), "slow": (50.0, 20.0)}),
    }
)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, steps are scheduled and committed, requests are aborted: in any order, at any depth."""

    @initialize(options=configurations, policy=st.sampled_from(["fcfs", "priority", "fair", "slo"]))
    def start(self, options, policy):
        spare_pages = options.pop("spare_pages")
        limits = make_limits(**options)
        self.limits = dataclasses.replace(limits, num_pages=limits.full_pages + spare_pages * limits.page_groups.num)
        self.scheduler = Scheduler(self.limits, policy)
        self.policy = policy
        self.builder = BatchBuilder(self.limits, VOCAB)
        self.device = FakeRunner(self.limits, VOCAB)
        self.flight = []
        self.sequences: list[Sequence] = []
        self.failed: set[Sequence] = set()
        self.computed: dict[Sequence, set[int]] = {}  # positions, ever
        self.now = 0.0

    @rule(
        beginning=st.sampled_from(BEGINNINGS),
        rest=st.lists(st.integers(0, 2), max_size=20),
        max_tokens=st.integers(1, 24),
        n=st.sampled_from([1, 1, 1, 3]),
        priority=st.integers(-1, 1),
        user=st.sampled_from([None, "ann", "bob"]),
        slo_class=st.sampled_from([None, "slow"]),
        salt=st.sampled_from([None, None, "a"]),
        judged=st.booleans(),
    )
    def add(self, beginning, rest, max_tokens, n, priority, user, slo_class, salt, judged):
        prompt = (*beginning, *rest) or (1,)
        request = Request(
            request_id=str(len(self.sequences)),
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(n=n, max_tokens=max_tokens, prompt_logprobs=0 if judged else None),
            arrival_time=self.now,
            priority=priority,
            user=user,
            slo_class=slo_class,
            cache_salt=salt,
        )
        for index in range(n):
            self.sequences.append(Sequence(request, index, len(prompt) + max_tokens, frozenset({EOS}), 0))
            self.scheduler.add(self.sequences[-1])

    @precondition(lambda self: len(self.flight) < self.limits.max_inflight_steps)
    @rule(seconds=st.sampled_from([0.0, 0.1, 3.0]))
    def schedule(self, seconds):
        self.now += seconds
        schedule = self.scheduler.schedule(self.now)
        self.check_schedule(schedule)
        if schedule.copies is not None:
            self.device.copy_pages(schedule.copies)
        if schedule.rows:
            handle = self.device.dispatch(self.builder.build(schedule))
            self.flight.append((schedule, handle))
        elif not self.flight:
            assert not self.scheduler.has_work, "work, but nothing scheduled and nothing in flight"

    def check_schedule(self, schedule):
        rows, limits = schedule.rows, self.limits
        assert schedule.num_tokens == sum(row.count for row in rows) <= limits.max_num_batched_tokens
        assert len({row.sequence for row in rows}) == len(rows) <= limits.max_num_seqs, "a sequence twice in one step"
        assert [row.count == 1 for row in rows] == [index < schedule.num_single for index in range(len(rows))]
        if limits.prefill_token_budget is not None:
            prompt = sum(row.count for row in rows if row.start + row.count < len(row.sequence.token_ids))
            assert prompt <= limits.prefill_token_budget
        pool = self.scheduler.pool
        for sequence, start, count, _ in rows:
            numbers = {position // limits.page_size for position in range(start, start + count)}
            written = {table[number] for table in sequence.tables for number in numbers}
            assert all(pool._references[page] == 1 for page in written), "a page that others hold is written"
            self.computed.setdefault(sequence, set()).update(range(start, start + count))
        for preemption in schedule.preempted:
            assert preemption.sequence is not preemption.beneficiary
            if self.policy in ("fcfs", "priority"):  # of the others the rank has changed by now
                rank = self.scheduler._policy.rank
                assert rank(preemption.sequence) > rank(preemption.beneficiary), "who ranks before gave way"
            assert preemption.way == "recompute" or limits.num_swap_pages
            if limits.preemption_mode == "recompute":
                assert preemption.way == "recompute"
        assert not {p.sequence for p in schedule.preempted} & {row.sequence for row in rows}

    @precondition(lambda self: self.flight)
    @rule(bad_row=st.sampled_from([None] * 9 + [0]), seconds=st.sampled_from([None, 0.1, 0.6]))
    def commit(self, bad_row, seconds):
        schedule, handle = self.flight.pop(0)
        tokens = list(handle.result().tokens)
        if bad_row is not None and schedule.rows[0].samples:
            tokens[0] = -1
            if schedule.rows[0].sequence.status is not Status.FINISHED:
                self.failed.add(schedule.rows[0].sequence)
        for delta in self.scheduler.commit(schedule, tokens, seconds):
            assert schedule.rows[delta.row].sequence is delta.sequence

    @precondition(lambda self: any(s.status is not Status.FINISHED for s in self.sequences))
    @rule(data=st.data())
    def abort(self, data):
        alive = [sequence for sequence in self.sequences if sequence.status is not Status.FINISHED]
        victim = data.draw(st.sampled_from(alive))
        for sequence in alive:
            if sequence.request is victim.request:
                self.scheduler.finish(sequence, FinishReason.ABORT)

    @invariant()
    def invariants(self):
        if hasattr(self, "scheduler"):
            self.scheduler.check()

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        for _ in range(10_000):
            if len(self.flight) < self.limits.max_inflight_steps:
                self.schedule(0.1)
            if not self.flight:
                break
            self.commit(None, 0.1)
            self.scheduler.check()
        assert not self.scheduler.has_work
        assert self.scheduler.pool.num_free == self.limits.num_pages
        assert self.scheduler.swap_space.num_free == self.limits.num_swap_pages
        for sequence in self.sequences:
            prompt = list(sequence.request.prompt_token_ids)
            want = expected(prompt, sequence.max_tokens_total - len(prompt), self.limits.max_model_len)
            got = sequence.token_ids[len(prompt) :]
            if sequence.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                assert got == want
                judged = sequence.num_prompt_tokens if sequence.scores_prompt else 0
                assert set(range(judged)) <= self.computed[sequence], "a prompt token was never judged"
            else:
                assert got == want[: len(got)]
                assert sequence.finish_reason is FinishReason.ABORT or sequence in self.failed


def run_machine(num_examples: int, num_steps: int) -> None:
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(
            max_examples=num_examples,
            stateful_step_count=num_steps,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )


def test_two_thousand_steps():
    run_machine(40, 50)


@pytest.mark.long
def test_a_hundred_thousand_steps():
    run_machine(1000, 100)
