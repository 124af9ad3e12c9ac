"""Prometheus metrics of one server: the engine's counters as they are at the scrape, and the server's own.

Made by app.create_app; routes/metrics.py answers with `exposition`. The engine's numbers are read, never copied into
counters of our own, so a scrape can neither lag behind nor drift. Where several processes serve, their own numbers are
summed by prometheus_client through the files that it keeps for each of them. Names: docs/operations.md.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from jax_engine.engine_view import EngineView
from jax_engine.metrics import Gauges

CONTENT_TYPE = CONTENT_TYPE_LATEST
#: Names the folder where processes that serve together keep their numbers; prometheus_client reads it too.
SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"

#: Ours -> (key in Metrics.histograms, help, vLLM's name or None).
_HISTOGRAMS = {
    "request_queue_seconds": ("queue", "Arrival to first schedule.", "request_queue_time_seconds"),
    "time_to_first_token_seconds": ("time_to_first_token", "Arrival to first token.", "time_to_first_token_seconds"),
    "inter_token_seconds": (
        "inter_token",
        "Between the steps that brought a request tokens.",
        "inter_token_latency_seconds",
    ),
    "request_seconds": ("end_to_end", "Arrival to last token.", "e2e_request_latency_seconds"),
    "step_seconds": ("step", "Time of a step on the device.", None),
    "request_prompt_tokens": ("prompt_tokens", "Prompt tokens of finished requests.", "request_prompt_tokens"),
    "request_output_tokens": ("output_tokens", "Output tokens of finished requests.", "request_generation_tokens"),
}
_LAG_BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class ServerMetrics:
    """The registry of one server.

    Args:
        model: label of every engine metric.
        vllm_names: export what vLLM has under its names too.
    """

    def __init__(self, model: str, *, vllm_names: bool = False):
        self._model, self._vllm_names = model, vllm_names
        self._registry = CollectorRegistry()
        self.http_requests = Counter(
            "jax_engine_http_requests", "Answers by route and status.", ("route", "status"), registry=self._registry
        )
        self.loop_lag = Histogram(
            "jax_engine_event_loop_lag_seconds",
            "How much later than asked for the event loop wakes up.",
            buckets=_LAG_BOUNDS,
            registry=self._registry,
        )
        self.aborted_readers = Counter(
            "jax_engine_slow_readers_aborted", "Streams ended because nobody read them.", registry=self._registry
        )

    def exposition(self, view: EngineView) -> bytes:
        """All metrics in Prometheus' text format; those of the engine as `view` has them."""
        shared = CollectorRegistry()
        shared.register(_EngineCollector(view, self._model, self._vllm_names))
        if SHARED_FOLDER not in os.environ:
            return generate_latest(shared) + generate_latest(self._registry)
        MultiProcessCollector(shared)  # type: ignore[no-untyped-call]
        return generate_latest(shared)


class _EngineCollector(Collector):
    """One view as metrics."""

    def __init__(self, view: EngineView, model: str, vllm_names: bool):
        self._view, self._model, self._vllm_names = view, model, vllm_names

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        snapshot, gauges = self._view.figures, self._view.gauges
        yield from _ours(snapshot, gauges, _Families("jax_engine_", {"model": self._model}))
        if len(self._view.replicas) > 1:
            replicas = [replica.gauges for replica in self._view.replicas]
            yield from _by_replica(replicas, _Families("jax_engine_replica_", {"model": self._model}))
        if self._vllm_names:
            yield from _vllms(snapshot, gauges, _Families("vllm:", {"model_name": self._model, "engine": "0"}))


class _Families:
    """Makes metric families that share a prefix and labels."""

    def __init__(self, prefix: str, labels: Mapping[str, str]):
        self._prefix, self._names, self._values = prefix, list(labels), list(labels.values())

    def gauge(self, name: str, help: str, value: float) -> Metric:
        family = GaugeMetricFamily(self._prefix + name, help, labels=self._names)
        family.add_metric(self._values, value)
        return family

    def counter(self, name: str, help: str, value: float) -> Metric:
        family = CounterMetricFamily(self._prefix + name, help, labels=self._names)
        family.add_metric(self._values, value)
        return family

    def counters(self, name: str, help: str, label: str, values: Mapping[str, float]) -> Metric:
        family = CounterMetricFamily(self._prefix + name, help, labels=[*self._names, label])
        for key, value in values.items():
            family.add_metric([*self._values, key], value)
        return family

    def gauges(self, name: str, help: str, label: str, values: Mapping[str, float]) -> Metric:
        family = GaugeMetricFamily(self._prefix + name, help, labels=[*self._names, label])
        for key, value in values.items():
            family.add_metric([*self._values, key], value)
        return family

    def histogram(self, name: str, help: str, snapshot: Mapping[str, Any]) -> Metric:
        family = HistogramMetricFamily(self._prefix + name, help, labels=self._names)
        buckets, total = [], 0
        for bound, count in zip((*map(repr, snapshot["bounds"]), "+Inf"), snapshot["counts"], strict=True):
            total += count
            buckets.append((bound, total))
        family.add_metric(self._values, buckets, snapshot["sum"])
        return family


def _ours(snapshot: Mapping[str, Any], gauges: Any, make: _Families) -> Iterator[Metric]:
    yield make.gauge("requests_running", "Sequences that hold a slot.", gauges.running)
    yield make.gauge("requests_waiting", "Sequences in line.", gauges.waiting)
    yield make.gauge("kv_pages_used", "KV pages that somebody holds.", gauges.used_pages)
    yield make.gauge("kv_pages", "KV pages in the pool.", gauges.num_pages)
    yield make.gauge("inflight_steps", "Steps dispatched and not read back.", gauges.inflight_steps)
    yield make.counter("steps", "Steps dispatched.", snapshot["steps"])
    yield make.counters("tokens", "Tokens computed, by kind.", "kind", snapshot["tokens_by_kind"])
    yield make.counter("generated_tokens", "Tokens that requests were given.", snapshot["generated_tokens"])
    yield make.counter("padding_tokens", "Tokens of steps that were only padding.", snapshot["padding_tokens"])
    yield make.counters(
        "preemptions", "Sequences that lost their pages, by how they came back.", "way", snapshot["preemptions_by_way"]
    )
    yield make.counter(
        "prefix_lookup_tokens", "Prompt tokens looked up in the prefix cache.", snapshot["looked_up_tokens"]
    )
    yield make.counter("prefix_hit_tokens", "Of them, those it had.", snapshot["cached_tokens"])
    yield make.counters(
        "requests_finished", "Completions, by why they ended.", "reason", _reasons(snapshot["requests_finished"])
    )
    yield make.counters("host_seconds", "Engine thread, by phase.", "phase", snapshot["host_seconds"])
    yield make.counters(
        "device_idle_seconds",
        "The device had nothing to do, by what the host was doing.",
        "cause",
        snapshot["device_idle_seconds"],
    )
    yield make.counter(
        "compiles_after_ready", "Programs compiled since ready; stays 0.", snapshot["compiles_after_ready"]
    )
    for name, (key, help, _) in _HISTOGRAMS.items():
        yield make.histogram(name, help, snapshot["histograms"][key])


def _by_replica(replicas: Sequence[Gauges], make: _Families) -> Iterator[Metric]:
    for name, field, help in (
        ("requests_running", "running", "Sequences that hold a slot, by replica."),
        ("requests_waiting", "waiting", "Sequences in line at the replica."),
        ("kv_pages_used", "used_pages", "KV pages that somebody holds, by replica."),
        ("inflight_steps", "inflight_steps", "Steps dispatched and not read back, by replica."),
    ):
        values = {str(number): getattr(gauges, field) for number, gauges in enumerate(replicas)}
        yield make.gauges(name, help, "replica", values)


def _vllms(snapshot: Mapping[str, Any], gauges: Any, make: _Families) -> Iterator[Metric]:
    """What vLLM's dashboards, autoscalers and routers read."""
    used = gauges.used_pages / gauges.num_pages
    yield make.gauge("num_requests_running", "Sequences that hold a slot.", gauges.running)
    yield make.gauge("num_requests_waiting", "Sequences in line.", gauges.waiting)
    yield make.gauge("kv_cache_usage_perc", "Share of KV pages in use; 1 is all.", used)
    yield make.gauge("gpu_cache_usage_perc", "The same under its former name.", used)
    yield make.counter("num_preemptions", "Sequences that lost their pages to others.", snapshot["preemptions"])
    yield make.counter("prefix_cache_queries", "Prompt tokens looked up in the cache.", snapshot["looked_up_tokens"])
    yield make.counter("prefix_cache_hits", "Of them, those it had.", snapshot["cached_tokens"])
    yield make.counter("prompt_tokens", "Prompt tokens computed.", snapshot["tokens_by_kind"]["prompt"])
    yield make.counter("generation_tokens", "Tokens generated.", snapshot["generated_tokens"])
    yield make.counters(
        "request_success",
        "Completions, by why they ended.",
        "finished_reason",
        _reasons(snapshot["requests_finished"]),
    )
    for key, help, name in _HISTOGRAMS.values():
        if name is not None:
            yield make.histogram(name, help, snapshot["histograms"][key])


def _reasons(counts: Mapping[str, int]) -> dict[str, int]:
    """Every reason, also those that have not occurred: a rate needs a zero to start from."""
    return {reason: counts.get(reason, 0) for reason in ("stop", "length", "abort", "error")}
