"""Who is admitted next, and who gives way. Small objects that the scheduler asks; they change no sequence.

To add a policy: a class with the same methods, and a line in POLICIES.
"""

import heapq
from collections.abc import Callable, Sequence as AbstractSequence

from jax_engine.sequence import Sequence


class WaitingQueue:
    """Waiting sequences, smallest key first. Dropping one is lazy, so that every operation is O(log n)."""

    def __init__(self, key: Callable[[Sequence], tuple]):
        self._key = key
        self._heap: list[tuple[tuple, int, Sequence]] = []
        self._members: set[Sequence] = set()

    def __len__(self) -> int:
        return len(self._members)

    def push(self, sequence: Sequence) -> None:
        """Puts a sequence in line."""
        self._members.add(sequence)
        heapq.heappush(self._heap, (self._key(sequence), sequence.order, sequence))

    def discard(self, sequence: Sequence) -> None:
        """Takes a sequence out of the line, wherever it stands."""
        self._members.discard(sequence)

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
    """First come, first served. The last to come is the first to be preempted."""

    def key(self, sequence: Sequence) -> tuple:
        """Order in which sequences are admitted, smallest first."""
        return (sequence.order,)

    def victim(self, candidates: AbstractSequence[Sequence]) -> Sequence:
        """Which of the running sequences gives up its pages."""
        return max(candidates, key=self.key)


class Priority(Fcfs):
    """Lower `Request.priority` first; within one priority, first come, first served."""

    def key(self, sequence: Sequence) -> tuple:
        return (sequence.request.priority, sequence.order)


POLICIES = {"fcfs": Fcfs, "priority": Priority}
