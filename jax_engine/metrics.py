"""Counters of one engine: where the host's time goes, when the device stands idle and why, what is padding.

The engine writes them from its thread; anybody may read a snapshot. No clock of its own: times come in.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from jax_engine.buckets import Bucket

#: The phases of one turn of the engine's loop, in order. `wait` is the wait for the device, the rest is host work.
PHASES = ("schedule", "build", "dispatch", "grammar", "wait", "commit")


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
        self.requests: Counter[str] = Counter()
        self._since = self._clock()

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

    def snapshot(self) -> dict[str, Any]:
        """All of it as plain numbers: seconds and counts."""
        return {
            "wall_seconds": self._clock() - self._since,
            "steps": self.steps.total(),
            "steps_by_bucket": {f"{b.num_tokens}x{b.num_seqs}": count for b, count in self.steps.items()},
            "tokens_by_kind": {kind: self.tokens[kind] for kind in ("prompt", "decode")},
            "batched_tokens": self.tokens["batched"],
            "padding_tokens": self.tokens["padding"],
            "host_seconds": {phase: self.host_seconds[phase] for phase in PHASES},
            "device_idle_seconds": {cause: self.device_idle_seconds[cause] for cause in (*PHASES, "no_work")},
            "preemptions": self.preemptions,
            "requests_finished": dict(self.requests),
            "compiles_after_ready": self.compiles_after_ready,
        }
