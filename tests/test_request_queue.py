"""The bounds of the queue, and what a refused caller is told."""

import pytest

from jax_engine.config import EngineConfig
from jax_engine.errors import QueueFull
from jax_engine.request_queue import RequestQueue
from tests.scheduling import make_sequence


def request(number: int, num_tokens: int = 10):
    return make_sequence(num_tokens, 1, request_id=str(number)).request


def test_bounds_by_requests_and_by_tokens():
    queue = RequestQueue(EngineConfig(max_queued_requests=3, max_queued_tokens=50))
    for number in range(2):
        queue.check(request(number))
        queue.join(request(number), 0.0)
    with pytest.raises(QueueFull, match="51 prompt tokens would wait; at most 50"):
        queue.check(request(9, 31))
    queue.check(request(9, 30))
    queue.join(request(2), 0.0)
    with pytest.raises(QueueFull, match="3 requests are waiting"):
        queue.check(request(3))
    queue.leave("0")
    queue.check(request(3))
    assert (len(queue), queue.num_tokens) == (2, 20)


def test_a_prompt_above_the_bound_may_come_alone():
    RequestQueue(EngineConfig(max_queued_tokens=5)).check(request(0, 10))


def test_retry_after_follows_the_drain_rate():
    queue = RequestQueue(EngineConfig(max_queued_requests=10))
    for number in range(50):
        queue.join(request(number), 0.0)
    assert queue.retry_after() == 1.0, "nothing is known yet"
    for number in range(30):
        queue.admit(str(number), (number + 1) * 0.5)  # two a second
    assert queue.retry_after() == pytest.approx(11 * 0.5)
    queue.admit("30", 1000.0)  # then it hangs
    assert queue.retry_after() == 120.0


def test_an_empty_queue_says_nothing_of_the_drain_rate():
    queue = RequestQueue(EngineConfig(max_queued_requests=1))
    for number in range(10):
        queue.join(request(number), number * 100.0)
        queue.admit(str(number), number * 100.0 + 0.25)
    queue.join(request(10), 2000.0)
    assert queue.retry_after() == pytest.approx(0.25)


def test_the_oldest_expire_first():
    queue = RequestQueue(EngineConfig(queue_timeout_s=5.0))
    for number in range(4):
        queue.join(request(number), float(number))
    assert queue.expired(4.9) == []
    assert queue.expired(6.0) == ["0", "1"]
    queue.leave("0")
    assert queue.expired(6.0) == ["1"]
