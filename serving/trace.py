"""Timelines for people: device idle time split by cause, and the Chrome trace format, which Perfetto opens.

Used by routes/debug.py and by server.py for --trace_file. Format: the "Trace Event Format" document of Chromium;
times are microseconds.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from jax_engine.engine_view import ReplicaView
from jax_engine.timeline import HostSpan, StepSpan

_HOST, _DEVICE = 1, 2


class IdleSpan(NamedTuple):
    """The device had no step during [start, end), while the host was in phase `cause`."""

    start: float
    end: float
    cause: str


def idle_spans(host: Sequence[HostSpan], steps: Sequence[StepSpan]) -> list[IdleSpan]:
    """The gaps between steps, cut where the host went from one phase to the next.

    Args:
        host, steps: each in order of time, without overlap among themselves.
    """
    found, first = [], 0
    for before, after in pairwise(steps):
        if after.start <= before.ready:
            continue
        while first < len(host) and host[first].end <= before.ready:
            first += 1
        for span in host[first:]:
            if span.start >= after.start:
                break
            start, end = max(span.start, before.ready), min(span.end, after.start)
            if start < end:
                found.append(IdleSpan(start, end, span.phase))
    return found


def chrome_trace(replicas: Sequence[ReplicaView]) -> dict[str, Any]:
    """The spans as a trace: for each replica a row for its thread, a row for its device, counters. See idle_spans."""
    events = [event for number, replica in enumerate(replicas) for event in _events(number, replica)]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _events(number: int, replica: ReplicaView) -> list[dict[str, Any]]:
    process = number + 1
    name = f"jax-engine, replica {number}" if number else "jax-engine"
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "args": {"name": name}},
        {"ph": "M", "tid": _HOST, "name": "thread_name", "args": {"name": "engine thread"}},
        {"ph": "M", "tid": _DEVICE, "name": "thread_name", "args": {"name": "device"}},
    ]
    events += [_slice(_HOST, span.phase, span.start, span.end) for span in replica.host]
    idle = idle_spans(replica.host, replica.steps)
    events += [_slice(_DEVICE, f"idle: {span.cause}", span.start, span.end) for span in idle]
    for step in replica.steps:
        events.append(_slice(_DEVICE, f"step {step.number}", step.start, step.ready, step._asdict()))
        for gauge in ("running", "waiting", "used_pages"):
            value = {gauge: getattr(step, gauge)}
            events.append({"ph": "C", "name": gauge, "ts": _us(step.dispatched), "args": value})
    return [event | {"pid": process} for event in events]


def write_trace(path: str, replicas: Sequence[ReplicaView]) -> None:
    """Writes a trace file.

    Raises:
        OSError: it cannot be written.
    """
    Path(path).write_bytes(msgspec.json.encode(chrome_trace(replicas)))


def _slice(row: int, name: str, start: float, end: float, args: dict[str, Any] | None = None) -> dict[str, Any]:
    event = {"ph": "X", "tid": row, "name": name, "ts": _us(start), "dur": _us(end) - _us(start)}
    return event if args is None else event | {"args": args}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)
