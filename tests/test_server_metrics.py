"""What the server says about itself: metrics, load, request ids, log lines."""

import asyncio
import json
import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jax_engine.testing.fake_engine import FakeAsyncEngine
from serving import logs, observe
from serving.state import STATE
from tests.test_server_errors import client_of, error_of

BODY = {"prompt": "x", "max_tokens": 3}


async def scrape(client):
    """name of a sample -> {labels -> value}"""
    response = await client.get("/metrics")
    assert response.status == 200 and response.headers["Content-Type"].startswith("text/plain; version=")
    samples = {}
    for family in text_string_to_metric_families(await response.text()):
        assert family.documentation
        for sample in family.samples:
            samples.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return samples


def engine_with_numbers():
    engine = FakeAsyncEngine()
    metrics = engine.metrics
    metrics.histograms["time_to_first_token"].observe(0.004)
    metrics.histograms["time_to_first_token"].observe(1000.0)
    metrics.add_phase("build", 0.25, True)
    metrics.add_no_work(2.0)
    metrics.tokens["generated"] = 7
    metrics.requests["stop"] = 2
    metrics.add_lookup(100, 64)
    metrics.preemptions_by_way["swap"] = 3
    return engine


async def test_engine_numbers_are_exported_as_they_are():
    async with client_of(engine_with_numbers()) as client:
        samples = await scrape(client)
    model = ("model", "fake-model")
    assert samples["jax_engine_generated_tokens_total"] == {(model,): 7.0}
    assert samples["jax_engine_device_idle_seconds_total"][("cause", "build"), model] == 0.25
    assert samples["jax_engine_device_idle_seconds_total"][("cause", "no_work"), model] == 2.0
    assert samples["jax_engine_requests_finished_total"][model, ("reason", "stop")] == 2.0
    assert samples["jax_engine_requests_finished_total"][model, ("reason", "error")] == 0.0
    assert samples["jax_engine_prefix_hit_tokens_total"] == {(model,): 64.0}
    assert samples["jax_engine_prefix_lookup_tokens_total"] == {(model,): 100.0}
    assert samples["jax_engine_preemptions_total"] == {(model, ("way", "recompute")): 0, (model, ("way", "swap")): 3}
    assert samples["jax_engine_compiles_after_ready_total"] == {(model,): 0.0}
    buckets = samples["jax_engine_time_to_first_token_seconds_bucket"]
    assert buckets[("le", "0.002"), model] == 0.0 and buckets[("le", "0.005"), model] == 1.0
    assert buckets[("le", "+Inf"), model] == samples["jax_engine_time_to_first_token_seconds_count"][(model,)] == 2.0
    assert not any(name.startswith("vllm:") for name in samples)


async def test_vllms_names_by_choice():
    async with client_of(engine_with_numbers(), vllm_metrics=True) as client:
        samples = await scrape(client)
    labels = (("engine", "0"), ("model_name", "fake-model"))
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total"):
        assert samples[f"vllm:{name}"] == {labels: 0.0}
    assert samples["vllm:prefix_cache_queries_total"] == {labels: 100.0}
    assert samples["vllm:prefix_cache_hits_total"] == {labels: 64.0}
    assert samples["vllm:generation_tokens_total"] == {labels: 7.0}
    assert samples["vllm:request_success_total"][labels[0], ("finished_reason", "stop"), labels[1]] == 2.0
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency", "request_queue_time"):
        assert f"vllm:{name}_seconds_bucket" in samples


async def test_answers_are_counted_by_route_not_by_address():
    async with client_of(FakeAsyncEngine()) as client:
        for path in ("/nothing/1", "/nothing/2", "/health"):
            await client.get(path)
        await client.post("/v1/completions", json=BODY)
        await client.post("/v1/completions", data=b"{")
        counted = (await scrape(client))["jax_engine_http_requests_total"]
    assert counted[("route", "unknown"), ("status", "404")] == 2.0
    assert counted[("route", "/v1/completions"), ("status", "200")] == 1.0
    assert counted[("route", "/v1/completions"), ("status", "415")] == 1.0


async def test_load_tells_what_is_running():
    engine = FakeAsyncEngine(stall=True)
    async with client_of(engine) as client:
        running = asyncio.create_task(client.post("/v1/completions", json=BODY))
        async with asyncio.timeout(10):
            while not engine.num_requests:
                await asyncio.sleep(0.005)
        load = await (await client.get("/load")).json()
        running.cancel()
    assert load == {"server_load": 1, "running": 1, "waiting": 0, "kv_pages_used": 1, "kv_pages": 64}


@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_health_follows_the_engine(path):
    engine = FakeAsyncEngine()
    async with client_of(engine) as client:
        assert (await client.get(path)).status == 200
        engine.is_alive = False
        assert (await error_of(await client.get(path), 503))["code"] == "engine_stopped"


async def test_request_ids_come_back_also_with_errors_and_streams():
    async with client_of(FakeAsyncEngine()) as client:
        headers = {"X-Request-Id": "mine-1"}
        for body in (BODY, BODY | {"stream": True}, {"prompt": 7}):
            response = await client.post("/v1/completions", json=body, headers=headers)
            assert response.headers["X-Request-Id"] == "mine-1"
        for bad in ("a b", "x" * 129, 'quote"'):
            response = await client.get("/health", headers={"X-Request-Id": bad})
            assert len(response.headers["X-Request-Id"]) == 32


def test_json_log_lines():
    record = logging.LogRecord("serving", logging.INFO, __file__, 1, "answer %s\nline", ("é",), None)
    token = logs.request_id.set("r-1")
    try:
        line = json.loads(logs.JsonFormatter().format(record))
        text = logs.TextFormatter().format(record)
    finally:
        logs.request_id.reset(token)
    assert line["message"] == "answer é\nline" and line["level"] == "info" and line["request_id"] == "r-1"
    assert line["time"].endswith("Z") and text.endswith("[r-1]")
    assert "request_id" not in json.loads(logs.JsonFormatter().format(record))


async def test_the_line_of_figures():
    engine = engine_with_numbers()
    before = engine.metrics.snapshot() | {"wall_seconds": 0.0}
    engine.metrics.tokens["generated"] += 50
    engine.metrics.add_phase("schedule", 1.0, True)
    view = await engine.view()
    view.figures["wall_seconds"] = 10.0
    line = observe.figures(before, view)
    assert "output 5 tok/s" in line and "device idle 10% (schedule 10%)" in line and "KV 0%" in line


async def test_the_line_of_figures_after_a_long_pause():
    """Having no work is counted when it ends, so some of it lay before the line's interval."""
    engine = engine_with_numbers()
    before = engine.metrics.snapshot() | {"wall_seconds": 0.0}
    engine.metrics.add_phase("schedule", 1.0, True)
    engine.metrics.add_no_work(40.0)
    view = await engine.view()
    view.figures["wall_seconds"] = 10.0
    assert "device idle 100% (schedule 10%, no_work 90%)" in observe.figures(before, view)


async def test_loop_lag_is_measured():
    async with client_of(FakeAsyncEngine()) as client:
        measuring = asyncio.create_task(observe.measure_lag(client.app[STATE].metrics))
        async with asyncio.timeout(10):
            while (await scrape(client))["jax_engine_event_loop_lag_seconds_count"][()] < 1:
                await asyncio.sleep(0.05)
        measuring.cancel()
