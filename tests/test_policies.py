"""Who is served first under each policy, who gives way, and how prompts are fitted beside running streams."""

import dataclasses
import random

import pytest

from jax_engine.buckets import fill
from jax_engine.config import SCHEDULING_POLICIES, EngineConfig, resolve
from jax_engine.errors import ConfigError, InvalidRequest
from jax_engine.model_config import ModelConfig
from jax_engine.policies import POLICIES, Fair, Slo
from jax_engine.scheduler import Scheduler
from jax_engine.step_time import StepTime
from tests.scheduling import make_engine, make_limits, make_sequence

ONE_AT_A_TIME = {"max_num_seqs": 1, "max_num_batched_tokens": 8, "max_inflight_steps": 1, "num_pages": 64}


def served(scheduler: Scheduler, now: float = 0.0) -> list:
    """The requests, in the order in which they got their first step."""
    order = []
    while scheduler.has_work:
        schedule = scheduler.schedule(now)
        order += [sequence.request for sequence in schedule.admitted]
        scheduler.commit(schedule, [1] * len(schedule.rows))
        scheduler.check()
    return order


def line(policy: str, sequences, **limits) -> Scheduler:
    scheduler = Scheduler(make_limits(**(ONE_AT_A_TIME | limits)), policy)
    for sequence in sequences:
        scheduler.add(sequence)
    return scheduler


def test_priority_serves_low_numbers_first_and_ages():
    def sequence(priority, arrival):
        return make_sequence(4, 1, priority=priority, arrival_time=arrival)

    scheduler = line("priority", [sequence(5, 0.0), sequence(-1, 0.0), sequence(3, 0.0)])
    assert [request.priority for request in served(scheduler)] == [-1, 3, 5]
    # Ten seconds are worth a level: the one that waits since 0 passes those that come 11 seconds later.
    late = [sequence(0, 11.0), sequence(1, 0.0), sequence(0, 9.0)]
    scheduler = line("priority", late, priority_ageing_s=10.0)
    assert [request.arrival_time for request in served(scheduler)] == [9.0, 0.0, 11.0]


def test_nobody_starves_under_a_flood_of_better_priority():
    scheduler = line("priority", [make_sequence(4, 1, priority=3)], priority_ageing_s=1.0)
    for now in range(1, 100):
        scheduler.add(make_sequence(4, 1, priority=0, arrival_time=float(now)))
        schedule = scheduler.schedule(float(now))
        scheduler.commit(schedule, [1] * len(schedule.rows))
        if any(sequence.request.priority == 3 for sequence in schedule.admitted):
            break
    assert now <= 5


def test_fair_serves_a_light_user_beside_a_hog():
    def order(policy):
        users = ["hog"] * 40 + ["light"] * 3
        scheduler = line(policy, [make_sequence(4, 4, False, user=user) for user in users])
        return [request.user for request in served(scheduler)]

    assert [place for place, user in enumerate(order("fair")) if user == "light"] == [1, 3, 5]
    assert [place for place, user in enumerate(order("fcfs")) if user == "light"] == [40, 41, 42]


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_fair_shares_tokens_by_weight_while_both_have_work(weight):
    chance = random.Random(1)
    limits = make_limits(num_pages=400, user_weights={"ann": weight}, max_model_len=128)
    scheduler = Scheduler(limits, "fair")
    given = {"ann": 0.0, "bob": 0.0}
    for step in range(3000):
        for user, lengths in (("ann", (1, 5)), ("bob", (20, 60))):
            while len(scheduler._policy._lines.get(user, ())) < 5:
                scheduler.add(make_sequence(chance.randint(*lengths), chance.randint(*lengths), False, user=user))
        schedule = scheduler.schedule()
        for row in schedule.rows:
            prompt = min(row.start + row.count, row.sequence.num_prompt_tokens) - row.start
            given[row.sequence.request.user] += max(0, prompt) + 2 * row.samples
        scheduler.commit(schedule, [1] * len(schedule.rows))
        if step == 200:
            given = dict.fromkeys(given, 0.0)
    assert given["ann"] / given["bob"] == pytest.approx(weight, rel=0.05)


def test_fair_lets_nobody_save_up_service():
    policy = Fair(make_limits())
    served_long = make_sequence(4, 1, user="busy")
    policy.push(served_long)
    policy.charge(served_long, 1000, 0)
    newcomer = make_sequence(4, 1, user="new")
    policy.push(newcomer)
    assert policy.level(newcomer) == policy.level(served_long) == 1000


def test_fair_forgets_users_who_are_gone(monkeypatch):
    monkeypatch.setattr(Fair, "MIN_COUNTERS", 10)
    policy = Fair(make_limits())
    for number in range(500):
        sequence = make_sequence(4, 1, user=str(number))
        policy.push(sequence)
        policy.charge(sequence, 5, 0)
        assert policy.pop() is sequence
    assert len(policy._counters) <= 30 and not policy._lines and len(policy._heap) <= 2


def test_slo_serves_the_least_slack_first_and_the_hopeless_last():
    classes = {"slow": (10.0, 1.0), "fast": (1.0, 0.1)}

    def sequence(name, arrival):
        return make_sequence(4, 1, slo_class=name, arrival_time=arrival)

    sequences = [sequence("slow", 0.0), sequence("fast", 0.5), sequence("fast", 0.0), sequence("slow", -20.0)]
    scheduler = line("slo", sequences, slo_classes=classes, token_seconds=0.01)
    order = [(request.slo_class, request.arrival_time) for request in served(scheduler, now=0.97)]
    # The third must have started by 0.96 and the last long ago; both go after all who can still make it.
    assert order == [("fast", 0.5), ("slow", 0.0), ("fast", 0.0), ("slow", -20.0)]


def test_slo_takes_pages_from_those_that_are_late():
    policy = Slo(make_limits(slo_classes={"only": (1.0, 1.0)}))
    late, on_time = make_sequence(4, 9, arrival_time=0.0), make_sequence(4, 9, arrival_time=5.0)
    late.order, on_time.order = 0, 1
    policy.tell_time(5.5)
    assert policy.rank(on_time) < policy.rank(late) and policy.level(late) > policy.level(on_time)


def test_an_unknown_class_is_refused():
    engine = make_engine(make_limits())
    with pytest.raises(InvalidRequest, match="one of default"):
        engine.make_request("r", [1], dataclasses.replace(make_sequence(1, 1).request.sampling_params), slo_class="x")
    with pytest.raises(InvalidRequest, match="512"):
        engine.make_request("r", [1], make_sequence(1, 1).request.sampling_params, user="x" * 513)


def test_the_policies_that_a_config_may_name_are_those_that_exist():
    assert set(POLICIES) == set(SCHEDULING_POLICIES)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_line_is_kept_small_when_those_in_it_leave(policy):
    limits = make_limits()
    queue = POLICIES[policy](limits)
    first = make_sequence(4, 1, user="first")
    queue.push(first)
    for number in range(2000):
        sequence = make_sequence(4, 1, user=str(number % 3))
        sequence.order = number + 1
        queue.push(sequence)
        queue.discard(sequence)
    assert queue.peek() is first and len(queue) == 1 and list(queue) == [first]


def test_a_step_fills_a_bucket_rather_than_spill_a_little():
    limits = make_limits(token_buckets=(16, 32, 64), max_num_batched_tokens=64)
    assert fill(limits, 0, 20) == 16 and fill(limits, 4, 16) == 12
    assert fill(limits, 0, 24) == 24, "half full is full enough"
    assert fill(limits, 0, 10) == 10 and fill(limits, 0, 64) == 64 and fill(limits, 30, 34) == 34
    assert fill(limits, 16, 3) == 3, "prompts always go on"


def test_a_long_line_does_not_keep_a_step_from_filling_a_bucket():
    """Only those for whom there are slots count: the whole line would always look like more than a bucket."""
    limits = make_limits(token_buckets=(16, 32, 64), max_num_batched_tokens=64, max_num_seqs=2, num_pages=64)
    scheduler = Scheduler(limits)
    for _ in range(50):
        scheduler.add(make_sequence(9, 2, False))
    assert [row.count for row in scheduler.schedule().rows] == [9, 7]


def test_concurrent_prefills_bound_what_a_bucket_is_filled_with():
    limits = make_limits(token_buckets=(16, 32, 64), max_num_batched_tokens=64, max_concurrent_prefills=1, num_pages=64)
    scheduler = Scheduler(limits)
    for _ in range(3):
        scheduler.add(make_sequence(20, 2, False))
    assert [row.count for row in scheduler.schedule().rows] == [16]


@pytest.mark.parametrize("policy", POLICIES)
def test_upcoming_names_those_who_will_be_taken(policy):
    queue = POLICIES[policy](make_limits())
    chance = random.Random(1)
    sequences = [make_sequence(4, 1, arrival_time=chance.random(), priority=chance.randrange(3)) for _ in range(40)]
    for number, sequence in enumerate(sequences):
        sequence.order = number
        queue.push(sequence)
    for sequence in sequences[::7]:
        queue.discard(sequence)
    upcoming = list(queue.upcoming())
    assert len(upcoming) == len(queue) and upcoming == [queue.pop() for _ in range(len(queue))]
    assert not list(queue.upcoming())


def test_upcoming_takes_the_least_served_user_first_and_those_who_are_late_last():
    fair, slo = POLICIES["fair"](make_limits()), POLICIES["slo"](make_limits(slo_classes={"only": (1.0, 1.0)}))
    sequences = [make_sequence(4, 1, user=user, arrival_time=time) for user, time in (("a", 0.0), ("b", 9.0))]
    for number, sequence in enumerate(sequences):
        sequence.order = number
        fair.push(sequence)
        slo.push(sequence)
    fair.charge(sequences[0], 100, 0)
    slo.tell_time(9.0)
    slo.peek()
    assert list(fair.upcoming()) == list(slo.upcoming()) == sequences[::-1]


def test_prefill_token_budget_and_concurrent_prefills():
    limits = make_limits(max_num_batched_tokens=16, prefill_token_budget=6, max_concurrent_prefills=1, num_pages=64)
    scheduler = Scheduler(limits)
    for _ in range(3):
        scheduler.add(make_sequence(20, 3, False))
    while scheduler.has_work:
        schedule = scheduler.schedule()
        prompts = [row for row in schedule.rows if row.start < row.sequence.num_prompt_tokens]
        assert sum(row.count for row in prompts) <= 6
        assert len(scheduler._prefilling) <= 1
        scheduler.commit(schedule, [1] * len(schedule.rows))


def test_the_bound_on_decode_gaps_sizes_the_prefill_share():
    limits = make_limits(
        max_num_batched_tokens=512,
        token_buckets=(64, 128, 256, 512),
        decode_buckets=(1, 2, 4),
        max_decode_gap_s=0.100,
        max_model_len=4096,
        num_pages=2048,
        fill_buckets=False,
    )

    def seconds(schedule):  # half a millisecond a token, and attention on top
        pairs = sum(row.count * (row.start + row.count) for row in schedule.rows)
        return 0.005 + schedule.bucket.num_tokens * 0.0005 + pairs * 1e-8

    scheduler = Scheduler(limits)
    stream = make_sequence(8, 2000, False)
    scheduler.add(stream)
    gaps = []
    for step in range(300):
        if step % 40 == 5:
            scheduler.add(make_sequence(2000, 2, False))
        schedule = scheduler.schedule(float(step))
        scheduler.commit(schedule, [1] * len(schedule.rows), seconds(schedule))
        if step > 5:
            assert any(row.sequence is stream for row in schedule.rows), "the stream missed a step"
            gaps.append(seconds(schedule))
    assert max(gaps) <= 0.100, max(gaps)
    assert max(gaps) > 0.060, "the prompts could have had more"


def test_step_time_learns_bases_and_slope():
    model = StepTime((64, 128))
    assert model.predict(64, 0) is None and model.largest(0.01, 4, 500, 0, 0) == 60
    for number in range(400):
        pairs = 1000 * (number % 10)
        model.learn(64, pairs, 0.01 + pairs * 1e-6)
    assert model.predict(64, 5000) == pytest.approx(0.015, rel=0.15)
    assert model.predict(128, 0) >= 2 * 0.01 * 0.9, "of a bucket not seen yet no less than in proportion"
    assert model.largest(0.005, 4, 500, 0, 0) == 60, "prompts go on even if the bound cannot be kept"


def test_step_time_forgives_one_slow_step_but_not_two():
    model = StepTime((64, 128))
    for _ in range(100):
        model.learn(64, 0, 0.01)
    model.learn(64, 0, 0.05)
    alone = model.predict(64, 0)
    assert alone is not None and alone < 0.0115, "one stall is no reason to cut every prompt"
    model.learn(64, 0, 0.05)
    again = model.predict(64, 0)
    assert again is not None and again > 0.02, "slow steps that come again are to be expected"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "best"}, "policy must be one of"),
        ({"slo_classes": ("fast:10",)}, "name:ttft_ms:itl_ms"),
        ({"slo_classes": ()}, "at least one class"),
        ({"user_weights": ("ann=0",)}, "name=weight"),
        ({"user_weights": ("ann",)}, "name=weight"),
        ({"preemption_mode": "swap"}, "swap_space_gib"),
        ({"swap_space_gib": -1.0}, "at least 0"),
        ({"max_decode_gap_ms": 0.0}, "above 0"),
        ({"deterministic": True, "decode_buckets": (1,)}, "one bucket"),
        ({"deterministic": True, "token_buckets": (8, 16)}, "one bucket"),
        ({"max_queued_tokens": 0}, "at least 1"),
    ],
)
def test_wrong_choices_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**options)


def test_deterministic_has_one_bucket():
    model = ModelConfig.placeholder(2, 4096)
    limits = resolve(EngineConfig(deterministic=True), model, platform="cpu", num_pages=100)
    assert limits.decode_buckets == () and limits.token_buckets == (64,) == (limits.max_num_batched_tokens,)
