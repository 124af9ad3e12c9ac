"""Timelines for people: device idle time split by cause, and the Chrome trace format, which Perfetto opens.

Used by routes/debug.py and by server.py for --trace_file. Format: the "Trace Event Format" document of Chromium;
times are microseconds.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from jax_engine.timeline import HostSpan, StepSpan

_PROCESS, _HOST, _DEVICE = 1, 1, 2


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


def chrome_trace(host: Sequence[HostSpan], steps: Sequence[StepSpan]) -> dict[str, Any]:
    """The spans as a trace: a row for the engine's thread, a row for the device, counters. See idle_spans."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": _PROCESS, "name": "process_name", "args": {"name": "jax-engine"}},
        {"ph": "M", "pid": _PROCESS, "tid": _HOST, "name": "thread_name", "args": {"name": "engine thread"}},
        {"ph": "M", "pid": _PROCESS, "tid": _DEVICE, "name": "thread_name", "args": {"name": "device"}},
    ]
    events += [_slice(_HOST, span.phase, span.start, span.end) for span in host]
    events += [_slice(_DEVICE, f"idle: {idle.cause}", idle.start, idle.end) for idle in idle_spans(host, steps)]
    for step in steps:
        events.append(_slice(_DEVICE, f"step {step.number}", step.start, step.ready, step._asdict()))
        for name in ("running", "waiting", "used_pages"):
            value = {name: getattr(step, name)}
            events.append({"ph": "C", "pid": _PROCESS, "name": name, "ts": _us(step.dispatched), "args": value})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_trace(path: str, host: Sequence[HostSpan], steps: Sequence[StepSpan]) -> None:
    """Writes a trace file.

    Raises:
        OSError: it cannot be written.
    """
    Path(path).write_bytes(msgspec.json.encode(chrome_trace(host, steps)))


def _slice(row: int, name: str, start: float, end: float, args: dict[str, Any] | None = None) -> dict[str, Any]:
    event = {"ph": "X", "pid": _PROCESS, "tid": row, "name": name, "ts": _us(start), "dur": _us(end) - _us(start)}
    return event if args is None else event | {"args": args}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)
