"""The simulator: the real engine in virtual time gives what can be computed by hand."""

import dataclasses

import msgspec
import pytest

from jax_engine.errors import ConfigError
from jax_engine.page_groups import PageGroups
from jax_engine.planning.simulator import limits_for, simulate
from tests.planning import make_cost, random_trace, requests_of


def test_one_request_takes_what_can_be_computed_by_hand():
    # 64 tokens a step: 100 prompt tokens are two steps, 64 and then 36 in the same bucket; then four decodes of one.
    prediction = simulate(requests_of((0.0, 100, 5)), make_cost(), {"scheduling": "sync"})
    pairs = [64 * 65 // 2, 36 * 64 + 36 * 37 // 2]
    prefill = 2 * (10 + 6.4) + sum(pairs) * 2e-4
    decode = [1 + (100 + n) * 1e-3 for n in range(1, 5)]
    assert prediction.figures.ttft_ms["p50"] == pytest.approx(prefill)
    assert prediction.figures.latency_ms["p50"] == pytest.approx(prefill + sum(decode))
    assert prediction.figures.inter_token_ms["max"] == pytest.approx(max(decode))
    assert prediction.utilisation == pytest.approx(1) and prediction.steps == 6
    assert prediction.padding == pytest.approx((64 - 36) / (64 + 64 + 4))


def test_overlap_hides_the_host_up_to_the_device_time():
    load = requests_of((0.0, 10, 200))
    sync, overlapped = (simulate(load, make_cost(host_ms=0.8), {"scheduling": mode}) for mode in ("sync", "async"))
    hidden = simulate(load, make_cost(), {"scheduling": "sync"})
    assert sync.figures.duration_s == pytest.approx(hidden.figures.duration_s + 200 * 0.8e-3, rel=0.01)
    assert overlapped.figures.duration_s == pytest.approx(hidden.figures.duration_s, rel=0.02)
    slow_host = simulate(load, make_cost(host_ms=5.0), {"scheduling": "async"})
    assert slow_host.figures.duration_s == pytest.approx(200 * 5e-3, rel=0.05)


def test_a_stop_is_learnt_late_when_running_ahead():
    ended = [simulate(requests_of((0.0, 10, 20), ends=ends), make_cost()) for ends in ("length", "stop")]
    assert ended[1].steps == ended[0].steps + 1
    assert ended[1].figures.output_tok_per_s == pytest.approx(ended[0].figures.output_tok_per_s)


def test_the_modes_differ_as_they_should():
    load = random_trace(150, 50, seed=4)
    static, sync, overlapped = (
        simulate(load, make_cost(host_ms=0.5), {"scheduling": mode}).figures for mode in ("static", "sync", "async")
    )
    assert static.output_tok_per_s < sync.output_tok_per_s < overlapped.output_tok_per_s
    assert static.ttft_ms["p50"] > 1.3 * sync.ttft_ms["p50"]
    total = sum(request.output_tokens for request in load)
    assert overlapped.output_tok_per_s * overlapped.duration_s == pytest.approx(total)


def test_a_small_pool_preempts_and_a_small_model_length_refuses():
    load = requests_of(*[(0.0, 100, 200)] * 8)
    assert simulate(load, make_cost(num_pages=80)).preemptions > 0
    refused = simulate([*load, *requests_of((0.0, 500, 5))], make_cost(max_model_len=400)).figures
    assert refused.num_refused == 1 and refused.num_requests == 9


def test_replicas_share_the_load():
    load = random_trace(200, 60, seed=5)
    one, two = (simulate(load, make_cost(), replicas=replicas) for replicas in (1, 2))
    assert two.figures.ttft_ms["p99"] < one.figures.ttft_ms["p99"] / 2
    assert two.utilisation < one.utilisation
    with pytest.raises(ConfigError, match="log of one engine"):
        simulate(load, make_cost(), {"step_log": "x"}, replicas=2)


def test_the_simulator_repeats_itself():
    load = random_trace(60, 20, seed=6, groups=2, prefix_tokens=30)
    assert simulate(load, make_cost(host_ms=0.3)) == simulate(load, make_cost(host_ms=0.3))


def test_the_pool_stays_as_many_tokens():
    _, limits = limits_for(make_cost(num_pages=None), {"page_size": 32})
    assert limits.num_pages * 32 == 512 * 16
    assert limits_for(make_cost(), {"num_pages": 100})[1].num_pages == 100


def test_what_is_known_of_the_device_stays():
    known = make_cost(swap_space_gib=2.0)
    had = dataclasses.replace(known.header.limits, num_swap_pages=40, swap_page_seconds=1e-4, token_seconds=1e-3)
    known = msgspec.structs.replace(known, header=msgspec.structs.replace(known.header, limits=had))
    limits = limits_for(known, {"swap_space_gib": 1.0, "page_size": 32})[1]
    assert (limits.num_swap_pages, limits.swap_page_seconds, limits.token_seconds) == (10, 2e-4, 1e-3)
    with pytest.raises(ConfigError, match="speed of its copies"):
        limits_for(make_cost(), {"swap_space_gib": 1.0})


def test_shared_prefixes_are_computed_once():
    load = random_trace(80, 20, seed=11, groups=1, prefix_tokens=400)
    cached, not_cached = (simulate(load, make_cost(), {"enable_prefix_caching": on}) for on in (True, False))
    assert cached.figures.ttft_ms["p50"] < 0.5 * not_cached.figures.ttft_ms["p50"]


def test_a_model_that_shares_no_pages_shares_none_in_virtual_time():
    cost = make_cost()
    limits = dataclasses.replace(cost.header.limits, enable_prefix_caching=False, page_groups=PageGroups(1, 2, 9))
    cost = msgspec.structs.replace(cost, header=msgspec.structs.replace(cost.header, limits=limits))
    _, found = limits_for(cost, {})
    assert not found.enable_prefix_caching and found.page_groups == PageGroups(1, 2, 9)
    _, found = limits_for(make_cost(enable_prefix_caching=False), {"enable_prefix_caching": True})
    assert found.enable_prefix_caching, "there it was the operator's choice"


@pytest.mark.parametrize("scheduling", ["sync", "async"])
def test_the_bound_on_decode_gaps_counts_the_host_too(scheduling):
    cost = make_cost(host_ms=40, max_num_batched_tokens=512, token_buckets=(64, 128, 256, 512))
    load = requests_of((0.0, 10, 400), *[(0.5 + i, 400, 2) for i in range(10)])
    free, bound = (
        simulate(load, cost, {"scheduling": scheduling, "max_decode_gap_ms": limit}).figures.inter_token_ms["max"]
        for limit in (None, 75.0)
    )
    assert free > 75 >= bound, "of which the device has less than 40"
