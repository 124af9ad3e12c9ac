"""StepLog: what the scheduler was told, what it decided, and how long each step took.

Written by the engine, from its thread. The last steps are kept in memory, one record each; with a file, everything
that the scheduler was told is written as well (requests with their token ids, tokens, ends), so that replay.py can run
the real scheduler through it again. A file therefore holds what users wrote, as token ids: only its owner may read it.
It never changes a decision, and a disk that fails ends the log, not the engine.

How device time is measured, without a tool of the platform: a step can start when its dispatch has returned and the
step before it is finished. It is finished when the wait for its result returns. The time between is its device time,
exact if the host was waiting at both of these moments; if a result was there before anybody asked, the time is only an
upper bound and `exact` is false. The way of the tokens to the host counts as part of the step.
"""

import contextlib
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from enum import Enum
from typing import Any, BinaryIO

import msgspec

from jax_engine.buckets import Bucket
from jax_engine.config import EngineConfig, Limits
from jax_engine.errors import ConfigError
from jax_engine.request import FinishReason, Request
from jax_engine.schedule import Schedule
from jax_engine.scheduler import Scheduler
from jax_engine.sequence import Sequence

_log = logging.getLogger(__name__)

#: Of the lines below. A reader refuses others.
FORMAT = 1
#: Steps kept in memory. A step of 256 sequences takes about 4 KB.
CAPACITY = 1024
_FILE_BUFFER = 1 << 20


class Header(msgspec.Struct, tag="header", frozen=True, kw_only=True):
    """First line: what was run, on what.

    Attributes:
        started: of the engine, seconds since 1970. All other times of a log are seconds on the engine's clock.
    """

    format: int = FORMAT
    version: str
    platform: str
    device: str
    vocab_size: int
    max_position_embeddings: int
    started: float
    config: EngineConfig
    limits: Limits


class Added(msgspec.Struct, tag="added", frozen=True):
    """A request was put in line, without its text. Each sequence: number, index, most tokens in total, stop token ids,
    seed."""

    request: Request
    sequences: list[tuple[int, int, int, tuple[int, ...], int]]


class Ended(msgspec.Struct, tag="ended", frozen=True):
    """A sequence was ended from outside the scheduler: a stop string, an abort, a failure."""

    sequence: int
    reason: FinishReason
    stop_reason: int | str | None = None


class Step(msgspec.Struct, tag="step", frozen=True):
    """A decision, and its dispatch unless it had no rows.

    Attributes:
        number: of the dispatched step; of a decision without rows, that of the step to come.
        time: when scheduling began.
        decision: the other fields of Schedule, a sequence by its number; a row is [sequence, start, count, samples].
        bucket: None when there were no rows.
        free_pages, num_running, num_waiting: after the decision.
        host: seconds of schedule, build and dispatch.
        compiles: programs compiled since the last step; 0 once the engine is ready.
    """

    number: int
    time: float
    decision: dict[str, Any]
    bucket: Bucket | None
    free_pages: int
    num_running: int
    num_waiting: int
    host: list[float]
    compiles: int = 0

    @property
    def padding(self) -> int:
        """Computed token slots that held no token."""
        return self.bucket.num_tokens - self.decision["num_tokens"] if self.bucket else 0


class Done(msgspec.Struct, tag="done"):
    """A step's result was taken in.

    Attributes:
        number: of the step.
        ready: when its result was on the host.
        device: seconds of device time, exact or an upper bound (see the module).
        wait: seconds the host waited. commit: seconds of taking it in.
        tokens: one per row; only in a file.
        seconds: what the scheduler was told; see Scheduler.commit.
    """

    number: int
    ready: float
    device: float
    exact: bool
    wait: float
    commit: float
    tokens: list[int] = []
    seconds: float | None = None


class CacheReset(msgspec.Struct, tag="cache_reset"):
    """The prefix cache was emptied."""


Event = Header | Added | Ended | CacheReset | Step | Done


class StepRecord(msgspec.Struct, frozen=True):
    """One step from the memory: the decision and, once it was taken in, the result."""

    step: Step
    done: Done | None


class StepLog:
    """The recorder.

    Args:
        header: describes the engine; needed for a file.
        path: of the file to write, or None. A file that exists is replaced.
        max_bytes: the file ends before it grows beyond this.
        capacity: steps kept in memory; with 0 and no file nothing is noted at all.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(
        self,
        *,
        header: Header | None = None,
        path: str | None = None,
        max_bytes: int = 1 << 30,
        capacity: int = CAPACITY,
    ):
        self._encode = msgspec.json.Encoder().encode
        self._steps: deque[tuple[int, bytes]] = deque(maxlen=capacity)
        self._dones: deque[tuple[int, bytes]] = deque(maxlen=capacity)
        self._is_off = not capacity and path is None
        self._turn: list[Event] = []  # what happened since the last end_turn, in order
        self._phases: dict[str, tuple[float, float]] = {}  # began, ended; of this turn
        self._number = 0  # of the next step
        self._dispatched: deque[tuple[int, float]] = deque()  # steps in flight: number, when dispatch returned
        self._ready, self._ready_is_exact = float("-inf"), True  # of the last step taken in
        self._compiles = 0
        self._bytes_left = max_bytes
        self._file: BinaryIO | None = None
        if path is not None:
            assert header is not None, "a file begins with a header"
            self._file = _create(path)
            self._write(self._encode(header))

    def records(self) -> list[StepRecord]:
        """The last steps, oldest first. May be called from any thread; decodes them, so not for a loop."""
        done = {number: msgspec.json.decode(line, type=Done) for number, line in self._dones.copy()}
        steps = self._steps.copy()
        return [StepRecord(msgspec.json.decode(line, type=Step), done.get(number)) for number, line in steps]

    def timed(self, phase: str, began: float, ended: float) -> None:
        """Notes a phase of this turn (see metrics.PHASES)."""
        self._phases[phase] = began, ended
        if phase == "commit" and self._turn:
            done = next(event for event in reversed(self._turn) if isinstance(event, Done))
            done.commit = ended - began  # it was noted before what its commit brought about

    def added(self, request: Request, sequences: Iterable[Sequence]) -> None:
        """Notes a request that the scheduler has taken in."""
        if self._file is not None:
            known = [(s.order, s.index, s.max_tokens_total, tuple(s.stop_token_ids), s.seed) for s in sequences]
            self._turn.append(Added(replace(request, prompt=None, grammar=None), known))

    def ended(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Notes that the engine ends a sequence."""
        if self._file is not None:
            self._turn.append(Ended(sequence.order, reason, stop_reason))

    def cache_reset(self) -> None:
        """Notes that the prefix cache was emptied."""
        if self._file is not None:
            self._turn.append(CacheReset())

    def scheduled(self, schedule: Schedule, bucket: Bucket | None, scheduler: Scheduler, compiles: int) -> None:
        """Notes a decision, after its dispatch if it had rows.

        Args:
            bucket: None when there were no rows.
            compiles: programs compiled since the engine was ready.
        """
        if self._is_off or (bucket is None and self._file is None):
            return
        began, ended = self._phases["schedule"]
        host = [ended - began]
        for phase in ("build", "dispatch"):
            began_phase, ended = self._phases[phase] if bucket else (ended, ended)
            host.append(ended - began_phase)
        self._turn.append(
            Step(
                self._number,
                began,
                decision(schedule),
                bucket,
                scheduler.pool.num_free,
                scheduler.num_running,
                scheduler.num_waiting,
                host,
                compiles - self._compiles,
            )
        )
        self._compiles = compiles
        if bucket is not None:
            self._dispatched.append((self._number, ended))
            self._number += 1

    def committed(self, tokens: list[int], waited: bool, seconds: float | None = None) -> None:
        """Notes that the scheduler has taken in the result of the oldest step in flight.

        Args:
            tokens: one per row.
            waited: the result was not there yet when it was asked for.
            seconds: what the scheduler was told; see Scheduler.commit.
        """
        if self._is_off:
            return
        number, dispatched = self._dispatched.popleft()
        began, ready = self._phases["wait"]
        # What the host cannot see is when a step ended that was ready before anybody asked.
        exact = waited and (self._ready_is_exact or dispatched >= self._ready)
        device = ready - max(dispatched, self._ready)
        tokens = [] if self._file is None else tokens
        self._turn.append(Done(number, ready, device, exact, ready - began, 0.0, tokens, seconds))
        self._ready, self._ready_is_exact = ready, waited

    def end_turn(self, idle: bool) -> None:
        """Writes down what this turn brought.

        Args:
            idle: the engine has no work left, so that there is time to reach the disk.
        """
        for event in self._turn:
            line = self._encode(event)
            if isinstance(event, Step) and event.bucket is not None:
                self._steps.append((event.number, line))
            elif isinstance(event, Done):
                self._dones.append((event.number, line))
            if self._file is not None:
                self._write(line)
        self._turn.clear()
        self._phases.clear()
        if idle:
            self.flush()

    def flush(self) -> None:
        """Hands what is written to the operating system."""
        if self._file is not None:
            try:
                self._file.flush()
            except OSError as error:
                self._give_up(str(error))

    def close(self) -> None:
        """Ends the file; the memory stays."""
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, line: bytes) -> None:
        if self._file is None:
            return
        self._bytes_left -= len(line) + 1
        if self._bytes_left < 0:
            self.flush()
            self._give_up("it has reached its largest size")
            return
        try:
            self._file.write(line)
            self._file.write(b"\n")
        except OSError as error:
            self._give_up(str(error))

    def _give_up(self, why: str) -> None:
        _log.warning("the step log ends here: %s", why)
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()


def decision(schedule: Schedule) -> dict[str, Any]:
    """A schedule's fields but for the bucket as plain values, sequences by their number."""
    fields = {name: _plain(getattr(schedule, name)) for name in schedule._fields if name not in ("rows", "bucket")}
    fields["rows"] = [(row[0].order, *row[1:]) for row in schedule.rows]
    return fields


def _plain(value: Any) -> Any:
    if isinstance(value, Sequence):
        return value.order
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _create(path: str) -> BinaryIO:
    """A new file that only its owner may read."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.fchmod(descriptor, 0o600)  # also one that was there before
    except OSError as error:
        raise ConfigError(f"step_log {path!r} cannot be written: {error.strerror}") from None
    return os.fdopen(descriptor, "wb", buffering=_FILE_BUFFER)


class LogError(ConfigError):
    """A file is no step log, or is damaged."""


class LogReader:
    """The events of a log, in order.

    Attributes:
        header: the first line.
        cut_off: whether the last line was incomplete, known once all events were read; all before it is of use.

    Raises:
        LogError: at once, or while reading: the file is no log, of another format, or a line is damaged.
    """

    def __init__(self, path: str):
        self._path = path
        self._decode = msgspec.json.Decoder(Added | Ended | Step | Done).decode
        self.cut_off = False
        try:
            self._file = open(path, "rb")  # noqa: SIM115 - __iter__ closes it
        except OSError as error:
            raise LogError(f"step log {path!r} cannot be read: {error.strerror}") from None
        first = self._file.readline()
        try:
            stated = msgspec.json.decode(first, type=dict).get("format")
            if stated != FORMAT:
                raise LogError(f"{path}: format {FORMAT} is read, got {stated!r}; use the jax-engine that wrote it")
            self.header = msgspec.json.decode(first, type=Header)
        except msgspec.MsgspecError as error:
            raise LogError(f"{path}: the first line is no header of a step log: {error}") from None

    def __iter__(self) -> Iterator[Added | Ended | Step | Done]:
        with self._file:
            for number, line in enumerate(self._file, 2):
                try:
                    yield self._decode(line)
                except msgspec.MsgspecError as error:
                    if not line.endswith(b"\n"):  # written by a process that was killed
                        self.cut_off = True
                        return
                    raise LogError(f"{self._path}:{number}: {error}") from None
