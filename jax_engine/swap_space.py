"""SwapSpace: which way back a preempted sequence takes, and how much of the host's memory swapped pages use.

The scheduler calls it; the pages themselves are copied by the runner. Never touches a device.
"""

import math

from jax_engine.config import Limits
from jax_engine.schedule import PageCopy
from jax_engine.sequence import Sequence

#: Pages are copied, and kept in host memory, in groups of this many.
COPY_PAGES = 8


class SwapSpace:
    """Tickets for sets of pages kept in host memory.

    Args:
        limits: num_swap_pages pages fit; the mode and the costs decide who is swapped.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self._sizes: dict[int, int] = {}  # ticket -> pages it takes
        self._num_used = 0
        self._num_tickets = 0

    @property
    def num_free(self) -> int:
        """Pages that still fit."""
        return self.limits.num_swap_pages - self._num_used

    def seconds_to_recompute(self, sequence: Sequence) -> float:
        """Time to compute the sequence's tokens again."""
        return sequence.num_computed * self.limits.token_seconds

    def seconds_to_swap(self, sequence: Sequence) -> float:
        """Time to copy its pages to the host and back; infinite where they do not fit."""
        size = _rounded(self._num_pages(sequence))
        return 2 * size * self.limits.swap_page_seconds if size <= self.num_free else math.inf

    def seconds_to_bring_back(self, sequence: Sequence) -> float:
        """Time of the way back that the sequence would take."""
        return self.seconds_to_swap(sequence) if self.prefers_swap(sequence) else self.seconds_to_recompute(sequence)

    def prefers_swap(self, sequence: Sequence) -> bool:
        """Whether the sequence is copied to the host, rather than computed again."""
        mode, swap = self.limits.preemption_mode, self.seconds_to_swap(sequence)
        if mode == "recompute" or not math.isfinite(swap) or not sequence.num_computed:
            return False
        return mode == "swap" or swap < self.seconds_to_recompute(sequence)

    def take(self, sequence: Sequence) -> tuple[int, list[int]]:
        """Reserves room for what the sequence has computed and still looks at. Returns the ticket, and the pages to
        copy: those of the first group, then of the next."""
        kept = zip(sequence.tables, self._kept(sequence.num_computed), strict=True)
        pages = [page for table, (first, end) in kept for page in table[first:end]]
        self._num_tickets += 1
        self._sizes[self._num_tickets] = _rounded(len(pages))
        self._num_used += _rounded(len(pages))
        return self._num_tickets, pages

    def copies_back(self, sequence: Sequence, num_found: int) -> list[PageCopy]:
        """What to copy to the sequence's pages, but for the first `num_found`, which hold it already."""
        assert sequence.swap is not None
        copies, offset = [], 0
        for table, (first, end) in zip(sequence.tables, self._kept(sequence.num_swapped), strict=True):
            missing = max(first, num_found)
            if missing < end:
                copies.append(PageCopy(sequence.swap, offset + missing - first, table[missing:end]))
            offset += end - first
        return copies

    def give_back(self, ticket: int) -> None:
        """Frees the room of a ticket."""
        self._num_used -= self._sizes.pop(ticket)

    def check(self, tickets: set[int]) -> None:
        """Asserts the invariants; for tests.

        Args:
            tickets: those that sequences hold.
        """
        assert self._sizes.keys() == tickets, "a ticket is lost or held by nobody"
        assert self._num_used == sum(self._sizes.values()) <= self.limits.num_swap_pages

    def _num_pages(self, sequence: Sequence) -> int:
        return self.limits.page_groups.num_kept(sequence.num_computed, self.limits.page_size)

    def _kept(self, num_tokens: int) -> list[tuple[int, int]]:
        """For each group of layers, which pages hold what is needed of so many tokens: first, and end."""
        groups, page_size = self.limits.page_groups, self.limits.page_size
        end, first = -(-num_tokens // page_size), groups.first_kept(num_tokens, page_size)
        return [(0, end)] * groups.num_full + [(first, end)] * groups.num_sliding


def _rounded(num_pages: int) -> int:
    """Pages with the unused ones of the last group."""
    return -(-num_pages // COPY_PAGES) * COPY_PAGES
