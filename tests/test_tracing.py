"""OpenTelemetry: a span for each request, below the client's own, that says how long each phase took."""

import builtins
import http.server
import threading

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from jax_engine import ConfigError
from jax_engine.testing.fake_engine import FakeAsyncEngine
from serving.app import AppSettings, create_app
from serving.state import STATE
from serving.tracing import Tracing
from tests import faulty_server
from tests.test_server_errors import client_of
from tests.test_server_life import until

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


@pytest.fixture
def spans(monkeypatch):
    """Those that were sent, once the server is told to send."""
    memory = InMemorySpanExporter()
    monkeypatch.setattr("serving.tracing._exporter", lambda: memory)
    return memory


async def finished(client, spans):
    client.app[STATE].tracing._provider.force_flush()
    return spans.get_finished_spans()


async def test_a_span_has_its_phases_and_the_clients_parent(spans):
    engine = faulty_server.build()
    try:
        async with client_of(engine, otel=True) as client:
            body = {"prompt": ["x", "y"], "max_tokens": 5, "temperature": 0.5, "n": 2, "stream": True}
            response = await client.post("/v1/completions", json=body, headers=TRACEPARENT)
            assert (await response.text()).endswith("data: [DONE]\n\n")
            await client.post("/v1/completions", json={"prompt": "z", "max_tokens": 3})
            *two, alone = await finished(client, spans)
    finally:
        engine.shutdown()
    for span in two:
        assert f"{span.context.trace_id:032x}" == TRACE and f"{span.parent.span_id:016x}" == PARENT
        assert span.attributes["gen_ai.usage.output_tokens"] == 10 and span.attributes["gen_ai.request.n"] == 2
        assert (
            span.attributes["gen_ai.usage.input_tokens"] == 2 and span.attributes["gen_ai.request.temperature"] == 0.5
        )
        assert span.attributes["gen_ai.response.finish_reasons"] == ("length", "length")
        assert [event.name for event in span.events] == ["queue", "prefill", "decode"]
        moments = [span.start_time, *(event.timestamp for event in span.events), span.end_time]
        assert moments == sorted(moments) and 0 < span.attributes["gen_ai.latency.time_to_first_token"] < 60
        assert span.status.is_ok or span.status.is_unset
    assert alone.parent is None and alone.attributes["gen_ai.usage.output_tokens"] == 3
    assert alone.resource.attributes["service.name"] == "jax-engine"
    assert not any(value == "x" for span in (*two, alone) for value in span.attributes.values())


async def test_a_client_that_leaves_makes_a_span_that_says_so(spans):
    engine = FakeAsyncEngine(delay_s=0.01, max_model_len=10_000)
    async with client_of(engine, otel=True) as client:
        response = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 5000, "stream": True})
        await response.content.readline()
        response.close()
        await until(lambda: engine.num_requests == 0)
        (span,) = await finished(client, spans)
    assert not span.status.is_ok and "did not come to its end" in span.status.description


async def test_spans_go_where_the_standard_variables_say(monkeypatch):
    seen = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "my-service")
        async with client_of(FakeAsyncEngine(), otel=True) as client:
            assert (await client.post("/v1/completions", json={"prompt": "secret words"})).status == 200
        await until(lambda: seen)  # the end of the server sends what is left
        collector.shutdown()
    path, data = seen[0]
    assert path == "/v1/traces" and b"my-service" in data and b"llm_request" in data and b"secret" not in data


def test_without_the_extra_the_flag_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ConfigError, match=r"pip install '\.\[otel\]'"):
        create_app(FakeAsyncEngine(), AppSettings(otel=True))


def test_an_exporter_that_is_none(monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with pytest.raises(ConfigError, match="otlp or console"):
        Tracing()
