"""RequestQueue: how many requests may wait for their first step, for how long, and when to ask again.

The engines tell it who comes and goes; their schedulers decide in which order. It has no clock: times come in.
"""

import math
import threading
from collections import OrderedDict
from typing import NamedTuple

from jax_engine.config import EngineConfig
from jax_engine.errors import InvalidRequest, QueueFull
from jax_engine.request import Request

#: Seconds over which the drain rate is averaged.
_MEMORY_S = 30.0
#: What a caller is told when nothing was drained yet, and at most.
_UNKNOWN_S, _LONGEST_S = 1.0, 120.0


class _Entry(NamedTuple):
    arrived_at: float
    num_tokens: int


class RequestQueue:
    """The requests none of whose sequences has been given a slot. Everything is O(1).

    Replicas of a model share one, each from its own thread.

    Args:
        config: max_queued_requests, max_queued_tokens and queue_timeout_s.
    """

    def __init__(self, config: EngineConfig):
        self.max_requests = config.max_queued_requests
        self.max_tokens = config.max_queued_tokens or math.inf
        self.timeout_s = config.queue_timeout_s or math.inf
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # in order of arrival
        self._num_tokens = 0
        self._lock = threading.RLock()
        self._drained_requests = self._drained_tokens = self._drain_seconds = 0.0
        self._last_drain: float | None = None

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_tokens(self) -> int:
        """Prompt tokens of those who wait."""
        return self._num_tokens

    def check(self, request: Request) -> None:
        """Asks whether the request may join.

        Raises:
            QueueFull: not now.
        """
        with self._lock:
            tokens = self._num_tokens + len(request.prompt_token_ids)
            if len(self) >= self.max_requests:
                problem = f"{len(self)} requests are waiting, as many as are allowed"
            elif tokens > self.max_tokens and self._entries:  # one that is too large for the bound may come alone
                problem = f"with this prompt {tokens} prompt tokens would wait; at most {self.max_tokens} may"
            else:
                return
            raise QueueFull(f"{problem}; try again later", self.retry_after(len(request.prompt_token_ids)))

    def retry_after(self, num_tokens: int = 0) -> float:
        """Seconds after which a request of so many tokens should find room, at the rate of late."""
        with self._lock:
            if not self._drain_seconds:
                return _UNKNOWN_S
            requests = len(self) + 1 - self.max_requests
            tokens = self._num_tokens + num_tokens - self.max_tokens
            waits = [0.0]
            for excess, drained in ((requests, self._drained_requests), (tokens, self._drained_tokens)):
                if excess > 0:
                    waits.append(excess * self._drain_seconds / drained if drained else _LONGEST_S)
            return min(max(waits), _LONGEST_S)

    def join(self, request: Request, now: float, *, bounded: bool = False) -> None:
        """Puts a request in line. bounded: if it may join.

        Raises:
            QueueFull: see check.
            InvalidRequest: its id is in line, at whichever replica.
        """
        with self._lock:
            if request.request_id in self._entries:
                raise InvalidRequest(f"request id {request.request_id!r} is in use", "request_id")
            if bounded:
                self.check(request)
            self._entries[request.request_id] = _Entry(now, len(request.prompt_token_ids))
            self._num_tokens += len(request.prompt_token_ids)
            if self._last_drain is None:
                self._last_drain = now

    def admit(self, request_id: str, now: float) -> None:
        """Notes that a request was given its first slot; one that is not in line changes nothing."""
        with self._lock:
            since = self._last_drain
            entry = self.leave(request_id)
            if entry is None or since is None:
                return
            if self._entries:
                self._last_drain = now
            passed = now - since
            kept = math.exp(-passed / _MEMORY_S)
            self._drain_seconds = self._drain_seconds * kept + passed
            self._drained_requests = self._drained_requests * kept + 1
            self._drained_tokens = self._drained_tokens * kept + entry.num_tokens

    def leave(self, request_id: str) -> _Entry | None:
        """Takes a request out of the line."""
        with self._lock:
            entry = self._entries.pop(request_id, None)
            if entry is not None:
                self._num_tokens -= entry.num_tokens
                if not self._entries:
                    self._last_drain = None  # an empty queue drains nothing: the time does not count
            return entry

    def expired(self, now: float) -> list[str]:
        """Requests that have waited too long, oldest first; they stay in line until they leave."""
        with self._lock:
            found = []
            for request_id, entry in self._entries.items():
                if now - entry.arrived_at < self.timeout_s:
                    break
                found.append(request_id)
            return found
