"""Counters of one engine, or of all replicas: where the host's time goes, when the device stands idle and why, what is
padding, and how long requests wait.

The engine writes them from its thread; anybody may read a snapshot. No clock of its own: times come in.
"""

import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from jax_engine.buckets import Bucket

#: The phases of one turn of the engine's loop, in order. `wait` is the wait for the device, the rest is host work.
PHASES = ("schedule", "build", "dispatch", "grammar", "wait", "commit")


#: Upper bounds of latency histograms, in seconds: 1-2-5 steps, from a decode step on an accelerator to a long wait.
LATENCY_BOUNDS = tuple(base * 10.0**power for power in range(-3, 3) for base in (1, 2, 5))[:-1]
#: Upper bounds of token-count histograms.
TOKEN_BOUNDS = tuple(float(2**power) for power in range(18))


class Histogram:
    """Counts of values by bucket. One thread writes; others may read.

    Args:
        bounds: increasing upper bounds, each within its bucket; values above the last are counted too.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]):
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Counts one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def add(self, other: "Histogram") -> None:
        """Counts what another of equal bounds has counted."""
        self.counts = [own + its for own, its in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    @property
    def count(self) -> int:
        """How many values were counted."""
        return sum(self.counts)

    def snapshot(self) -> dict[str, Any]:
        """Bounds, counts (one more than bounds) and the sum of the values."""
        return {"bounds": self.bounds, "counts": list(self.counts), "sum": self.total}


def _histograms() -> dict[str, Histogram]:
    seconds = ("queue", "time_to_first_token", "inter_token", "end_to_end", "step")
    tokens = ("prompt_tokens", "output_tokens")
    return {name: Histogram(LATENCY_BOUNDS) for name in seconds} | {name: Histogram(TOKEN_BOUNDS) for name in tokens}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauges:
    """What an engine holds at one moment.

    Attributes:
        running, waiting: sequences with a slot, and sequences in line.
        inflight_steps: steps dispatched and not read back; at most max_inflight_steps.
        used_pages: KV pages that somebody holds, of num_pages.
    """

    running: int
    waiting: int
    inflight_steps: int
    max_inflight_steps: int
    used_pages: int
    num_pages: int

    @classmethod
    def total(cls, parts: Sequence["Gauges"]) -> "Gauges":
        """What several replicas hold between them."""
        return cls(**{field.name: sum(getattr(part, field.name) for part in parts) for field in fields(cls)})


class Metrics:
    """Sums since the last `reset`.

    The device counts as idle during a phase if every dispatched step was already finished when the phase began. A step
    that finishes within a phase counts as busy to the phase's end, so idle time is measured low by at most one phase
    per gap, and only where the host was slower than the device.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self.compiles_after_ready = 0
        self.reset()

    def reset(self) -> None:
        """Starts counting anew; compiles_after_ready goes on."""
        self.host_seconds: defaultdict[str, float] = defaultdict(float)
        self.device_idle_seconds: defaultdict[str, float] = defaultdict(float)
        self.steps: Counter[Bucket] = Counter()
        self.tokens: Counter[str] = Counter()
        self.preemptions = 0
        self.preemptions_by_way: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        #: Seconds: queue (arrival to first schedule), time_to_first_token and end_to_end (from arrival), inter_token
        #: (between the steps that brought a request tokens), step (on the device). Counts: prompt_tokens and
        #: output_tokens of finished requests.
        self.histograms = _histograms()
        self._since = self._clock()

    @classmethod
    def total(cls, parts: Sequence["Metrics"]) -> "Metrics":
        """What several replicas have counted by now, added up; of one, the one itself.

        Idle time is their mean, so that it stays a share of the time that has passed.
        """
        if len(parts) == 1:
            return parts[0]
        total = cls(parts[0]._clock)
        total._since = min(part._since for part in parts)
        for part in parts:
            total.compiles_after_ready += part.compiles_after_ready
            total.preemptions += part.preemptions
            for name in ("steps", "tokens", "preemptions_by_way", "requests"):
                getattr(total, name).update(dict(getattr(part, name)))  # a copy: its engine goes on
            for phase, seconds in list(part.host_seconds.items()):
                total.host_seconds[phase] += seconds
            for cause, seconds in list(part.device_idle_seconds.items()):
                total.device_idle_seconds[cause] += seconds / len(parts)
            for name, histogram in part.histograms.items():
                total.histograms[name].add(histogram)
        return total

    def now(self) -> float:
        """The engine's clock, in seconds."""
        return self._clock()

    def add_phase(self, phase: str, seconds: float, device_idle: bool) -> None:
        """Books one phase of a turn."""
        self.host_seconds[phase] += seconds
        if device_idle:
            self.device_idle_seconds[phase] += seconds

    def add_no_work(self, seconds: float) -> None:
        """Books time in which there was nothing to do."""
        self.device_idle_seconds["no_work"] += seconds

    def add_compilation(self) -> None:
        """Books a compilation; there should be none once the engine is ready."""
        self.compiles_after_ready += 1

    def add_step(self, bucket: Bucket, num_tokens: int, num_decode_tokens: int) -> None:
        """Books one dispatched step of `num_tokens` tokens."""
        self.steps[bucket] += 1
        self.tokens["batched"] += bucket.num_tokens
        self.tokens["decode"] += num_decode_tokens
        self.tokens["prompt"] += num_tokens - num_decode_tokens
        self.tokens["padding"] += bucket.num_tokens - num_tokens

    def add_lookup(self, num_tokens: int, num_cached: int) -> None:
        """Books that a prompt of `num_tokens` was looked up in the prefix cache, which had `num_cached` of them."""
        self.tokens["looked_up"] += num_tokens
        self.tokens["cached"] += num_cached

    def snapshot(self) -> dict[str, Any]:
        """All of it as plain numbers: seconds and counts."""
        return {
            "wall_seconds": self._clock() - self._since,
            "steps": self.steps.total(),
            "steps_by_bucket": {f"{b.num_tokens}x{b.num_seqs}": count for b, count in self.steps.items()},
            "tokens_by_kind": {kind: self.tokens[kind] for kind in ("prompt", "decode")},
            "generated_tokens": self.tokens["generated"],
            "batched_tokens": self.tokens["batched"],
            "padding_tokens": self.tokens["padding"],
            "host_seconds": {phase: self.host_seconds[phase] for phase in PHASES},
            "device_idle_seconds": {cause: self.device_idle_seconds[cause] for cause in (*PHASES, "no_work")},
            "preemptions": self.preemptions,
            "preemptions_by_way": {way: self.preemptions_by_way[way] for way in ("recompute", "swap")},
            "looked_up_tokens": self.tokens["looked_up"],
            "cached_tokens": self.tokens["cached"],
            "requests_finished": dict(self.requests),
            "compiles_after_ready": self.compiles_after_ready,
            "histograms": {name: histogram.snapshot() for name, histogram in self.histograms.items()},
        }
