"""Replay: the real scheduler, told again what a step log says it was told, has to decide the same.

Called by `jax-engine replay` and by tests. No device and no clock: results of steps come from the log. It stops at the
first difference, since every later one could follow from it.
"""

from typing import Any

import msgspec

from jax_engine.errors import EngineError
from jax_engine.schedule import Schedule
from jax_engine.scheduler import Scheduler
from jax_engine.sequence import Sequence
from jax_engine.step_log import Added, CacheReset, Done, Ended, LogError, LogReader, Step, decision


class Difference(msgspec.Struct, frozen=True):
    """Where a replay left the log: step number, seconds since the first event, what differs, and both values."""

    step: int
    field: str
    logged: Any
    replayed: Any

    def __str__(self) -> str:
        return f"step {self.step}: {self.field} differs\n  log:    {self.logged}\n  replay: {self.replayed}"


class Replay:
    """One pass through a log.

    Attributes:
        num_decisions, num_steps, num_requests: how many were compared, dispatched and put in line.
        difference: the first one, or None.
    """

    def __init__(self, log: LogReader):
        self._log = log
        self.scheduler = Scheduler(log.header.limits, log.header.config.policy)
        self._sequences: dict[int, Sequence] = {}
        self._schedules: dict[int, Schedule] = {}
        self.num_decisions = self.num_steps = self.num_requests = 0
        self.difference: Difference | None = None

    def run(self) -> Difference | None:
        """Goes through the log up to its end or the first difference, which is returned.

        Raises:
            LogError: the log is damaged.
        """
        for event in self._log:
            match event:
                case Added():
                    self._add(event)
                case Step():
                    self.difference = self._step(event)
                case Done():
                    self._done(event)
                case Ended():
                    self.scheduler.finish(self._sequence(event.sequence), event.reason, event.stop_reason)
                case CacheReset():
                    self.scheduler.pool.clear_index()
            if self.difference is not None:
                break
        return self.difference

    def _add(self, event: Added) -> None:
        self.num_requests += 1
        for number, index, longest, stops, seed in event.sequences:
            sequence = Sequence(event.request, index, longest, frozenset(stops), seed)
            try:
                self.scheduler.add(sequence)
            except EngineError as error:
                raise LogError(f"request {event.request.request_id!r} of the log is refused: {error}") from None
            if sequence.order != number:
                step = self.num_steps
                self.difference = Difference(step, f"number of {event.request.request_id!r}", number, sequence.order)
            self._sequences[number] = sequence

    def _step(self, event: Step) -> Difference | None:
        schedule = self.scheduler.schedule(event.decision["time"])
        self.num_decisions += 1
        replayed = msgspec.json.decode(msgspec.json.encode(decision(schedule)))  # as a log would have it
        if schedule.rows:
            self.num_steps += 1
            self._schedules[event.number] = schedule
        replayed["bucket"] = schedule.bucket and list(schedule.bucket)
        replayed["free_pages"] = self.scheduler.pool.num_free
        logged = event.decision | {"bucket": event.bucket and list(event.bucket), "free_pages": event.free_pages}
        for field in ("rows", *(logged.keys() | replayed.keys()) - {"rows"}):
            if logged.get(field) != replayed.get(field):
                return _difference(event.number, field, logged.get(field), replayed.get(field))
        return None

    def _done(self, event: Done) -> None:
        schedule = self._schedules.pop(event.number, None)
        if schedule is None or len(event.tokens) != len(schedule.rows):
            raise LogError(f"the log takes in step {event.number} with {len(event.tokens)} tokens; it has no such step")
        self.scheduler.commit(schedule, event.tokens, event.seconds)

    def _sequence(self, number: int) -> Sequence:
        if number not in self._sequences:
            raise LogError(f"the log ends sequence {number}, which it never added")
        return self._sequences[number]


def _difference(step: int, field: str, logged: Any, replayed: Any) -> Difference:
    """Narrowed down to the first entry that differs, where both are lists."""
    if isinstance(logged, list) and isinstance(replayed, list):
        for index, (one, other) in enumerate(zip(logged, replayed, strict=False)):
            if one != other:
                return Difference(step, f"{field}[{index}]", one, other)
        return Difference(step, f"number of {field}", len(logged), len(replayed))
    return Difference(step, field, logged, replayed)
