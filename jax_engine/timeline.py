"""Timeline: when the host did what and when the device worked, over the last few thousand turns of the engine's loop.

The engine writes it from its thread; the metrics exporter, the page and the trace export read `spans`. Times are
seconds on the engine's monotonic clock. It decides nothing and keeps no text or token ids.
"""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

#: What a turn of the loop appends at most: its phases, its step, a wait for work.
_SPANS_PER_TURN = 7


class HostSpan(NamedTuple):
    """The engine's thread was in `phase` during [start, end); phases are metrics.PHASES and `no_work`."""

    phase: str
    start: float
    end: float


class StepSpan(NamedTuple):
    """One step on the device.

    Attributes:
        number: counts from 0.
        dispatched: when the host had enqueued it.
        start: when the device could begin: it was dispatched, and the step before was ready.
        ready: when the host first saw it finished. It waits for the oldest step, so this is exact where the device is
            the slower side, and late by at most one phase where the host is.
        num_tokens: real tokens; batched_tokens - num_tokens are padding.
        decode_tokens: of num_tokens, those that follow the prompt.
        num_rows: sequences in the step. running, waiting, used_pages: as the step was dispatched.
    """

    number: int
    dispatched: float
    start: float
    ready: float
    num_tokens: int
    batched_tokens: int
    decode_tokens: int
    num_rows: int
    running: int
    waiting: int
    used_pages: int


@dataclass(slots=True)
class _InFlight:
    """A step that was dispatched and not read back."""

    dispatched: float
    counts: tuple[int, ...]
    ready: float | None = None


class Timeline:
    """The last spans of one engine.

    Args:
        turns: how many turns of the loop are kept.
    """

    def __init__(self, turns: int = 4096):
        self._spans: deque[HostSpan | StepSpan] = deque(maxlen=turns * _SPANS_PER_TURN)
        self._inflight: deque[_InFlight] = deque()
        self._last_ready = 0.0
        self._num_steps = 0

    def add_phase(self, phase: str, start: float, end: float) -> None:
        """Books what the host did."""
        self._spans.append(HostSpan(phase, start, end))

    def add_dispatch(self, now: float, *counts: int) -> None:
        """Books that a step was enqueued; `counts` are the fields of StepSpan from num_tokens on."""
        self._inflight.append(_InFlight(now, counts))

    def seen_ready(self, now: float) -> None:
        """Books that every step in flight was seen finished."""
        for step in self._inflight:
            if step.ready is None:
                step.ready = now

    def add_result(self, now: float) -> float:
        """Books that the oldest step was read back. Returns the seconds it took the device."""
        step = self._inflight.popleft()
        start = max(step.dispatched, self._last_ready)
        ready = max(start, now if step.ready is None else step.ready)
        self._spans.append(StepSpan(self._num_steps, step.dispatched, start, ready, *step.counts))
        self._last_ready = ready
        self._num_steps += 1
        return ready - start

    def inflight(self) -> list[float]:
        """When the steps were dispatched that are not read back; may be called from any thread."""
        return [step.dispatched for step in self._inflight.copy()]

    def spans(self, since: float = 0.0) -> list[HostSpan | StepSpan]:
        """What ended after `since`, in order of booking; may be called from any thread."""
        return [span for span in self._spans.copy() if (span.end if isinstance(span, HostSpan) else span.ready) > since]
