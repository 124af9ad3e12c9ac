"""The Grafana dashboard asks for metrics that exist, with labels that exist."""

import json
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from jax_engine.engine_view import look
from jax_engine.testing.fake_engine import FakeAsyncEngine
from serving.metrics import ServerMetrics

DASHBOARD = Path(__file__).resolve().parent.parent / "deploy/grafana/jax-engine.json"


def exported():
    """name -> label names, of every sample."""
    metrics = ServerMetrics("m")
    metrics.http_requests.labels("/x", "200").inc()
    families = text_string_to_metric_families(metrics.exposition(look(FakeAsyncEngine(), 0)).decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def test_every_expression_reads_exported_metrics():
    dashboard = json.loads(DASHBOARD.read_text())
    known = exported()
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    used = set()
    for expression in expressions:
        assert expression.count("(") == expression.count(")")
        names = re.findall(r"\b(?:jax_engine_|vllm:)\w+", expression)
        assert names
        labels = set(re.findall(r"(\w+)=~?\"", expression))
        for by in re.findall(r"by \(([\w, ]+)\)", expression):
            labels |= set(by.split(", "))
        for name in names:
            assert name in known, f"{name} is not exported"
            assert labels <= known[name], f"{name} has no label {labels - known[name]}"
        used |= set(names)
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in known if not name.endswith("_created")}
    shown = {re.sub(r"_bucket$", "", name) for name in used}
    left_out = {name for name in families - shown if not name.startswith("jax_engine_request_")}
    assert left_out == {"jax_engine_slow_readers_aborted_total"}


def test_panels_do_not_overlap():
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in json.loads(DASHBOARD.read_text())["panels"]]
    assert len(set(places)) == len(places)
