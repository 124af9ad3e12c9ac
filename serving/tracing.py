"""Tracing: a span for each request, sent with OpenTelemetry as its standard OTEL_* variables say.

Made by app.create_app where --otel is given; generation.py tells it what the engine says of each request.
The parent of a span is the client's, where it sent a W3C `traceparent`. Holds no text and no token ids.
"""

import os
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from jax_engine import ConfigError, RequestMetrics, RequestOutput, SamplingParams

#: The headers of the HTTP request that is being handled.
headers: ContextVar[Mapping[str, str] | None] = ContextVar("headers", default=None)

_NS = 10**9
#: Attributes under OpenTelemetry's names for generative models, and vLLM's for what those lack.
_SAMPLING = {
    "gen_ai.request.max_tokens": "max_tokens",
    "gen_ai.request.temperature": "temperature",
    "gen_ai.request.top_p": "top_p",
    "gen_ai.request.n": "n",
}


class Tracing:
    """Where spans go.

    Args:
        exporter: one of OpenTelemetry's; by default what OTEL_TRACES_EXPORTER names: otlp (over HTTP) or console.

    Raises:
        ConfigError: the extra is not installed, or the exporter is not known.
    """

    def __init__(self, exporter: Any = None):
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise _missing() from None
        resource = Resource.create({} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "jax-engine"})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(_exporter() if exporter is None else exporter))
        self._tracer = self._provider.get_tracer("jax-engine")
        self._extract = TraceContextTextMapPropagator().extract

    def begin(self, request_id: str, model: str, params: SamplingParams) -> "RequestTrace":
        """Notes that a request is put in line. Call its `see` with each output, and its `end` in any case."""
        return RequestTrace(self._start, request_id, model, params)

    def _start(self, start_ns: int, attributes: dict[str, Any]) -> Any:
        context = self._extract(headers.get() or {})
        return self._tracer.start_span("llm_request", context=context, start_time=start_ns, attributes=attributes)

    def shutdown(self) -> None:
        """Sends what has not been sent; may take seconds."""
        self._provider.shutdown()


class RequestTrace:
    """What is known of one request until its span can be made."""

    def __init__(
        self, start: Callable[[int, dict[str, Any]], Any], request_id: str, model: str, params: SamplingParams
    ):
        self._start = start
        self._attributes: dict[str, Any] = {"gen_ai.request.model": model, "gen_ai.request.id": request_id}
        for name, field in _SAMPLING.items():
            if (value := getattr(params, field)) is not None:
                self._attributes[name] = value
        self._began = time.monotonic()
        self._num_tokens = 0
        self._reasons: dict[int, str] = {}
        self._last: RequestOutput | None = None

    def see(self, output: RequestOutput) -> None:
        """Takes in an output that holds what is new, or all at the end."""
        self._last = output
        for completion in output.outputs:
            self._num_tokens += len(completion.token_ids)
            if completion.finish_reason is not None:
                self._reasons[completion.index] = str(completion.finish_reason)

    def end(self) -> None:
        """Makes the span, with an event where each of the request's phases began."""
        from opentelemetry.trace import StatusCode

        now, last = time.monotonic(), self._last
        shift = time.time_ns() - int(now * _NS)
        finished = last is not None and last.finished
        metrics = last.metrics if last is not None and finished else RequestMetrics(self._began)
        if last is not None:
            self._attributes["gen_ai.usage.input_tokens"] = len(last.prompt_token_ids)
        self._attributes["gen_ai.usage.output_tokens"] = self._num_tokens
        self._attributes["gen_ai.response.finish_reasons"] = list(self._reasons.values())
        ended = metrics.finished_time or now
        span = self._start(int(metrics.arrival_time * _NS) + shift, self._attributes | _latencies(metrics, ended))
        for name, moment in _phases(metrics):
            span.add_event(name, timestamp=int(moment * _NS) + shift)
        if last is None or not finished:
            span.set_status(StatusCode.ERROR, "the request did not come to its end")
        elif last.error is not None:
            span.set_status(StatusCode.ERROR, "the request failed")
        span.end(int(ended * _NS) + shift)


def _phases(metrics: RequestMetrics) -> list[tuple[str, float]]:
    """When each phase of a request began, those that did."""
    moments = {
        "queue": metrics.arrival_time,
        "prefill": metrics.first_scheduled_time,
        "decode": metrics.first_token_time,
    }
    return [(name, moment) for name, moment in moments.items() if moment is not None]


def _latencies(metrics: RequestMetrics, ended: float) -> dict[str, float]:
    """Seconds from arrival."""
    found = {"gen_ai.latency.e2e": ended - metrics.arrival_time}
    if metrics.first_scheduled_time is not None:
        found["gen_ai.latency.time_in_queue"] = metrics.first_scheduled_time - metrics.arrival_time
    if metrics.first_token_time is not None:
        found["gen_ai.latency.time_to_first_token"] = metrics.first_token_time - metrics.arrival_time
    return found


def _missing() -> ConfigError:
    return ConfigError("--otel needs OpenTelemetry, which is not installed: pip install '.[otel]'")


def _exporter() -> Any:
    """What OTEL_TRACES_EXPORTER names."""
    name = os.environ.get("OTEL_TRACES_EXPORTER", "otlp")
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    if name != "otlp":
        raise ConfigError(f"OTEL_TRACES_EXPORTER must be otlp or console, got {name!r}")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise _missing() from None
    return OTLPSpanExporter()
