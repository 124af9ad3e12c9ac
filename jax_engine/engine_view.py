"""EngineView: what an engine shows of itself at one moment, as plain values that can be sent to another process.

Made by AsyncEngine.view; read by metrics exporters, the page and the log. Never imports jax.
"""

from dataclasses import dataclass
from typing import Any

from jax_engine.metrics import Gauges
from jax_engine.timeline import HostSpan, StepSpan


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaView:
    """One look at a replica of the model.

    Attributes:
        host, steps: the timeline's spans that were asked for, each in order of time.
        inflight: when the steps were dispatched that are not read back.
        pages: how many sequences hold each KV page, -1 for one kept in the prefix cache alone; empty where no spans
            were asked for.
    """

    gauges: Gauges
    host: list[HostSpan]
    steps: list[StepSpan]
    inflight: list[float]
    pages: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineView:
    """One look at an engine.

    Attributes:
        now: seconds on the engine's monotonic clock.
        num_requests: that have not finished.
        gauges, figures: of all replicas together; Metrics.snapshot().
        replicas: one, or as many as share the requests.
    """

    now: float
    num_requests: int
    gauges: Gauges
    figures: dict[str, Any]
    replicas: list[ReplicaView]


def look(engine: Any, seconds: float) -> EngineView:
    """A view of an engine; from any thread.

    Args:
        engine: with metrics, gauges, num_requests and replicas, as AsyncEngine has them.
        seconds: how far back spans are wanted; 0 for none.
    """
    metrics = engine.metrics
    now = metrics.now()
    return EngineView(
        now=now,
        num_requests=engine.num_requests,
        gauges=engine.gauges,
        figures=metrics.snapshot(),
        replicas=[_look_at(replica, now - seconds if seconds else None) for replica in engine.replicas],
    )


def _look_at(replica: Any, since: float | None) -> ReplicaView:
    spans = [] if since is None else replica.timeline.spans(since)
    return ReplicaView(
        gauges=replica.gauges,
        host=sorted((span for span in spans if isinstance(span, HostSpan)), key=lambda span: span.start),
        steps=[span for span in spans if isinstance(span, StepSpan)],
        inflight=replica.timeline.inflight(),
        pages=[] if since is None else replica.page_references(),
    )
