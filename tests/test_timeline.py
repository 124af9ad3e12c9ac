"""The timeline and the histograms: what is booked is what happened."""

import itertools

import pytest

from jax_engine.metrics import LATENCY_BOUNDS, Histogram
from jax_engine.sampling_params import SamplingParams
from jax_engine.timeline import HostSpan, StepSpan, Timeline

COUNTS = (5, 8, 3, 4, 4, 0, 7)


def steps(timeline):
    return [span for span in timeline.spans() if isinstance(span, StepSpan)]


def test_a_step_begins_when_it_is_dispatched_and_the_one_before_is_ready():
    timeline = Timeline()
    timeline.add_dispatch(1.0, *COUNTS)
    timeline.add_dispatch(2.0, *COUNTS)
    assert timeline.add_result(5.0) == 4.0
    assert timeline.add_result(6.0) == 1.0
    assert [(span.number, span.start, span.ready) for span in steps(timeline)] == [(0, 1.0, 5.0), (1, 5.0, 6.0)]
    assert steps(timeline)[0][4:] == COUNTS


def test_a_step_that_was_seen_ready_ended_then_and_not_when_it_was_read():
    timeline = Timeline()
    timeline.add_dispatch(1.0, *COUNTS)
    timeline.seen_ready(3.0)
    timeline.seen_ready(4.0)
    timeline.add_dispatch(7.0, *COUNTS)
    assert timeline.add_result(8.0) == 2.0
    assert timeline.add_result(9.0) == 2.0


def test_old_spans_are_forgotten_and_since_cuts():
    timeline = Timeline(turns=2)
    for second in range(100):
        timeline.add_phase("build", float(second), second + 0.5)
    assert len(timeline.spans()) == 14
    assert timeline.spans(since=98.5) == [HostSpan("build", 99.0, 99.5)]


def test_histogram_buckets_hold_their_upper_bound():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 3.0):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1] and histogram.count == 5 and histogram.total == 8.0
    assert list(LATENCY_BOUNDS) == sorted(set(LATENCY_BOUNDS))


@pytest.mark.parametrize("scheduling", ["static", "sync", "async"])
def test_an_engine_books_every_phase_step_and_wait(many_buckets, scheduling):
    engine = many_buckets.engine(scheduling)
    ticks = itertools.count()
    engine.clock = engine.metrics._clock = lambda: float(next(ticks))
    params = SamplingParams(max_tokens=5, ignore_eos=True, temperature=0, n=2)
    for name in ("a", "b"):
        engine.submit(engine.make_request(name, [1, 2, 3], params))
    while engine.has_work:
        engine.step()
    figures = engine.metrics.snapshot()
    counts = {name: sum(histogram["counts"]) for name, histogram in figures["histograms"].items()}
    assert counts["queue"] == counts["time_to_first_token"] == counts["end_to_end"] == counts["prompt_tokens"] == 2
    assert counts["output_tokens"] == 4 and figures["histograms"]["output_tokens"]["sum"] == 20
    assert counts["inter_token"] == 8  # per request and step, not per completion
    assert figures["generated_tokens"] == 20
    assert figures["looked_up_tokens"] == 12
    assert counts["step"] == figures["steps"] == len(steps(engine.timeline))
    phases = {span.phase for span in engine.timeline.spans() if isinstance(span, HostSpan)}
    assert phases == {"schedule", "build", "dispatch", "wait", "commit"}
    for span in steps(engine.timeline):
        assert span.dispatched <= span.start <= span.ready and span.num_tokens <= span.batched_tokens
    ready = [span.ready for span in steps(engine.timeline)]
    assert all(after.start >= before for before, after in zip(ready, steps(engine.timeline)[1:], strict=False))
    assert sum(span.num_tokens for span in steps(engine.timeline)) == sum(figures["tokens_by_kind"].values())
    references = engine.scheduler.pool.references()
    assert len(references) == engine.limits.num_pages and set(references) <= {-1, 0}
    gauges = engine.gauges
    assert (gauges.running, gauges.waiting, gauges.used_pages, gauges.inflight_steps) == (0, 0, 0, 0)
