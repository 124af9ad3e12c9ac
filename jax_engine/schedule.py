"""Schedule: one step's work, and every decision that led to it, as data.

Made by scheduler.py; read by the batch builder, the engine, and whoever records or replays decisions.
"""

import functools
from typing import NamedTuple

from jax_engine.buckets import Bucket
from jax_engine.sequence import Sequence


class Row(NamedTuple):
    """Tokens [start, start + count) of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    count: int
    samples: bool  # the row reaches the sequence's end, so its last logits give a new token


#: Row from a tuple of its fields, at half the price of calling Row: hundreds are made in every step.
make_row = functools.partial(tuple.__new__, Row)


class Preemption(NamedTuple):
    """A sequence that lost its pages: to whom, and how it will come back (`recompute` or `swap`)."""

    sequence: Sequence
    beneficiary: Sequence
    way: str
    tokens: int  # that are copied or will be computed again
    seconds_to_recompute: float
    seconds_to_swap: float | None  # None: it could not be swapped


class PageCopy(NamedTuple):
    """Pages to copy to, or from, what the host keeps under a ticket. `first`: which of the kept ones is pages[0]."""

    ticket: int
    first: int
    pages: list[int]


class Copies(NamedTuple):
    """Pages to copy before a step, those to the host before those from it; and tickets that are of no more use."""

    swapped_out: list[PageCopy]
    swapped_in: list[PageCopy]
    dropped_tickets: list[int]


class Schedule(NamedTuple):
    """One step's work, rows of a single token first, and every decision that led to it.

    Copies come before the step, those to the host before those from it; they are due also when there are no rows.
    """

    rows: list[Row]
    num_single: int  # rows of a single token
    num_tokens: int
    bucket: Bucket | None  # the compiled size; None without rows
    admitted: list[Sequence]  # sequences that were given a slot for this step
    grown: list[tuple[Sequence, int, list[int]]]  # new in page tables: whose, column of the first, ids
    preempted: list[Preemption]
    swapped_out: list[PageCopy]
    swapped_in: list[PageCopy]
    dropped_tickets: list[int]  # what the host keeps under these is of no more use
    time: float  # as it was told

    @property
    def copies(self) -> Copies | None:
        """What is to be copied or dropped; None: nothing."""
        copies = Copies(self.swapped_out, self.swapped_in, self.dropped_tickets)
        return copies if any(copies) else None


class TokenDelta(NamedTuple):
    """A token that `commit` accepted: row `row` of the schedule gave it to `sequence`."""

    sequence: Sequence
    row: int
    token_id: int


#: As make_row, for TokenDelta.
make_delta = functools.partial(tuple.__new__, TokenDelta)


#: What a step reports as the token of a row whose logits held a NaN.
INVALID_TOKEN = -1
#: And of a row whose constraints, taken together, allow no token.
NO_TOKEN_ALLOWED = -2
