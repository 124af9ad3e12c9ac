"""Who is admitted next, and who gives way: the line of waiting sequences, in the order of one policy.

The scheduler puts sequences in line, tells the time and what each step gave to whom, and asks. A policy changes no
sequence, has no clock, and does all of it in O(log n). To add one: derive a class from Fcfs, and name it in POLICIES
and in config.SCHEDULING_POLICIES.
"""

import heapq
import itertools
from collections.abc import Callable, Iterator

from jax_engine.config import Limits
from jax_engine.sequence import Sequence


class WaitingQueue:
    """Waiting sequences, smallest key first. Dropping one is lazy, so that every operation is O(log n)."""

    def __init__(self, key: Callable[[Sequence], tuple]):
        self._key = key
        self._heap: list[tuple[tuple, int, Sequence]] = []
        self._members: set[Sequence] = set()

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._members)

    def push(self, sequence: Sequence) -> None:
        """Puts a sequence in line."""
        self._members.add(sequence)
        heapq.heappush(self._heap, (self._key(sequence), sequence.order, sequence))

    def discard(self, sequence: Sequence) -> None:
        """Takes a sequence out of the line, wherever it stands."""
        self._members.discard(sequence)
        if len(self._heap) > 2 * len(self._members) + 64:  # so that what is dropped does not pile up
            self._heap = [entry for entry in self._heap if entry[2] in self._members]
            heapq.heapify(self._heap)

    def upcoming(self) -> Iterator[Sequence]:
        """Those in line, in its order; each takes O(log n), and the queue must not change meanwhile."""
        heap, frontier = self._heap, [(*self._heap[0][:2], 0)] if self._heap else []
        while frontier:
            *_, index = heapq.heappop(frontier)
            if heap[index][2] in self._members:
                yield heap[index][2]
            for child in range(2 * index + 1, min(2 * index + 3, len(heap))):
                heapq.heappush(frontier, (*heap[child][:2], child))

    def peek(self) -> Sequence | None:
        """The sequence that is next, or None."""
        while self._heap and self._heap[0][2] not in self._members:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def pop(self) -> Sequence:
        """Takes out and returns the sequence that is next; the queue must not be empty."""
        sequence = self.peek()
        assert sequence is not None
        heapq.heappop(self._heap)
        self._members.discard(sequence)
        return sequence


class Fcfs:
    """First come, first served. Nobody gives way to one who came later."""

    #: Whether `charge` is to be told what every row was given.
    charges = False

    def __init__(self, limits: Limits):
        self.limits = limits
        self.now = 0.0
        self._queue = WaitingQueue(self.rank)

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Sequence]:
        """Those in line, in no order."""
        return iter(self._queue)

    def rank(self, sequence: Sequence) -> tuple:
        """The order in which sequences are served, smallest first. The first of all never gives way to anybody."""
        return (sequence.order,)

    def level(self, sequence: Sequence) -> float:
        """The larger, the sooner a sequence gives way; among equals the cheapest to bring back does."""
        return 0.0

    def tell_time(self, now: float) -> None:
        """Sets the time, in seconds, at which the next questions are asked."""
        self.now = now

    def charge(self, sequence: Sequence, num_prompt: int, num_output: int) -> None:
        """Notes that a step computes so many new tokens for a sequence."""

    def push(self, sequence: Sequence) -> None:
        """Puts a sequence in line, new or preempted."""
        self._queue.push(sequence)

    def discard(self, sequence: Sequence) -> None:
        """Takes a sequence out of the line."""
        self._queue.discard(sequence)

    def upcoming(self) -> Iterator[Sequence]:
        """Those in line, about in the order in which they will be next if no time passes."""
        return self._queue.upcoming()

    def peek(self) -> Sequence | None:
        """Who is next, or None."""
        return self._queue.peek()

    def pop(self) -> Sequence:
        """Takes out and returns who is next; there is somebody."""
        return self._queue.pop()


class Priority(Fcfs):
    """Lower `Request.priority` first. Waiting `priority_ageing_s` seconds is worth one level, so nobody starves: a
    request is passed only by those that arrive within that time for each level between them."""

    def rank(self, sequence: Sequence) -> tuple:
        request = sequence.request
        return (request.priority * self.limits.priority_ageing_s + request.arrival_time, sequence.order)

    def level(self, sequence: Sequence) -> float:
        return sequence.request.priority


class _Line(WaitingQueue):
    """The waiting sequences of one user, in order of arrival."""

    def __init__(self, user: str | None):
        super().__init__(lambda sequence: (sequence.order,))
        self.user = user


class Fair(Fcfs):
    """Weighted fair sharing of tokens among users: the Virtual Token Counter (Sheng et al., arXiv 2401.00588).

    Each user has a counter of the tokens he was given, divided by his weight; output tokens count double, as they take
    a step each. The user with the smallest counter is served first. One who comes back after a pause starts level with
    those who waited meanwhile: nobody saves up service.
    """

    charges = True
    OUTPUT_COST = 2.0
    #: Counters that are kept before those without meaning are dropped.
    MIN_COUNTERS = 10_000

    def __init__(self, limits: Limits):
        super().__init__(limits)
        self._counters: dict[str | None, float] = {}
        self._lines: dict[str | None, _Line] = {}  # only of users who wait
        self._heap: list[tuple[float, int, _Line]] = []  # (counter at that time, tie-break, line); lazily renewed
        self._num_lines = 0
        self._num_waiting = 0
        self._floor = 0.0  # the counter of the user who was served last
        self._max_counters = self.MIN_COUNTERS

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        return itertools.chain.from_iterable(self._lines.values())

    def rank(self, sequence: Sequence) -> tuple:
        return (self.level(sequence), sequence.order)

    def level(self, sequence: Sequence) -> float:
        return self._counters.get(sequence.request.user, self._floor)

    def charge(self, sequence: Sequence, num_prompt: int, num_output: int) -> None:
        cost = (num_prompt + self.OUTPUT_COST * num_output) / self.limits.user_weights.get(
            sequence.request.user or "", 1.0
        )
        self._counters[sequence.request.user] = self.level(sequence) + cost

    def push(self, sequence: Sequence) -> None:
        line = self._lines.get(sequence.request.user)
        if line is None:
            line = self._open_line(sequence)
        line.push(sequence)
        self._num_waiting += 1

    def discard(self, sequence: Sequence) -> None:
        line = self._lines[sequence.request.user]
        line.discard(sequence)
        self._left(line)

    def upcoming(self) -> Iterator[Sequence]:
        # What they will have been given before their turn is left out of account: the lines are taken one by one.
        lines = sorted(self._lines.values(), key=lambda line: self._counters[line.user])
        return itertools.chain.from_iterable(line.upcoming() for line in lines)

    def peek(self) -> Sequence | None:
        line = self._least()
        return None if line is None else line.peek()

    def pop(self) -> Sequence:
        line = self._least()
        assert line is not None
        sequence = line.pop()
        self._floor = max(self._floor, self._counters[line.user])
        self._left(line)
        return sequence

    def _open_line(self, sequence: Sequence) -> _Line:
        user = sequence.request.user
        counter = self.level(sequence)
        if not sequence.num_preemptions:
            least = self._least()
            counter = max(counter, self._floor if least is None else self._counters[least.user])
        self._counters[user] = counter
        line = self._lines[user] = _Line(user)
        self._num_lines += 1
        heapq.heappush(self._heap, (counter, self._num_lines, line))
        if len(self._counters) > self._max_counters:
            # At or below the floor a counter has no meaning: who comes back is lifted to the floor anyway.
            kept = {u: c for u, c in self._counters.items() if u in self._lines or c > self._floor}
            self._counters, self._max_counters = kept, 2 * len(kept) + self.MIN_COUNTERS
        return line

    def _left(self, line: _Line) -> None:
        self._num_waiting -= 1
        if not line:
            del self._lines[line.user]

    def _least(self) -> _Line | None:
        """The line of the waiting user with the smallest counter, or None."""
        while self._heap:
            counter, number, line = self._heap[0]
            if self._lines.get(line.user) is not line:
                heapq.heappop(self._heap)
            elif counter < self._counters[line.user]:  # he was served since; counters only grow
                heapq.heapreplace(self._heap, (self._counters[line.user], number, line))
            else:
                return line
        return None


class Slo(Fcfs):
    """Least slack first: who has to start soonest to meet the targets of his class.

    Token number n of a request is due at arrival + ttft + n * itl. A waiting sequence must start before that by the
    time its missing tokens take to compute. Those who can no longer meet their target yield to all who can, and give
    way first.
    """

    def __init__(self, limits: Limits):
        super().__init__(limits)
        self._queue = WaitingQueue(lambda sequence: (self._latest_start(sequence),))
        self._late = WaitingQueue(lambda sequence: (sequence.order,))

    def __len__(self) -> int:
        return len(self._queue) + len(self._late)

    def __iter__(self) -> Iterator[Sequence]:
        return itertools.chain(self._queue, self._late)

    def rank(self, sequence: Sequence) -> tuple:
        start = self._latest_start(sequence)
        return (True, sequence.order) if start < self.now else (False, start, sequence.order)

    def level(self, sequence: Sequence) -> float:
        return float(self._latest_start(sequence) < self.now)

    def discard(self, sequence: Sequence) -> None:
        self._queue.discard(sequence)
        self._late.discard(sequence)

    def upcoming(self) -> Iterator[Sequence]:
        return itertools.chain(self._queue.upcoming(), self._late.upcoming())

    def peek(self) -> Sequence | None:
        while (sequence := self._queue.peek()) is not None and self._latest_start(sequence) < self.now:
            self._late.push(self._queue.pop())
        return sequence if sequence is not None else self._late.peek()

    def pop(self) -> Sequence:
        self.peek()
        return (self._queue or self._late).pop()

    def _latest_start(self, sequence: Sequence) -> float:
        classes = self.limits.slo_classes
        ttft, itl = classes.get(sequence.request.slo_class or "") or next(iter(classes.values()))
        due = sequence.request.arrival_time + ttft + itl * sequence.num_output_tokens
        return due - (len(sequence.token_ids) - sequence.num_computed) * self.limits.token_seconds


POLICIES: dict[str, type[Fcfs]] = {"fcfs": Fcfs, "priority": Priority, "fair": Fair, "slo": Slo}
