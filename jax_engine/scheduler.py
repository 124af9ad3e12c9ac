"""Scheduler: which tokens of which sequences go into the next step.

The engine calls `schedule`, dispatches what comes out, and calls `commit` with the sampled tokens, in the order of
dispatch, one or more steps later. Sequence counters are written here and nowhere else. No clock, no device, no I/O:
the same calls give the same decisions.
"""

from collections.abc import Sequence as AbstractSequence
from typing import NamedTuple

from jax_engine.config import Limits
from jax_engine.errors import InvalidRequest
from jax_engine.page_pool import PagePool
from jax_engine.policies import POLICIES, WaitingQueue
from jax_engine.request import FinishReason
from jax_engine.sequence import Sequence, Status


class Row(NamedTuple):
    """Tokens [start, start + count) of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    count: int
    samples: bool  # the row reaches the sequence's end, so its last logits give a new token


class Schedule(NamedTuple):
    """One step's work, rows of a single token first."""

    rows: list[Row]
    num_single: int  # rows of a single token
    num_tokens: int
    admitted: list[Sequence]  # sequences that were given a slot for this step
    grown: list[tuple[Sequence, int, list[int]]]  # pages added: to whom, index of the first in its table, ids
    preempted: list[Sequence]


class TokenDelta(NamedTuple):
    """A token that `commit` accepted: row `row` of the schedule gave it to `sequence`."""

    sequence: Sequence
    row: int
    token_id: int


#: What a step reports as the token of a row whose logits held a NaN.
INVALID_TOKEN = -1
#: And of a row whose constraints, taken together, allow no token.
NO_TOKEN_ALLOWED = -2


class Scheduler:
    """Iteration-level scheduling (Orca, OSDI 2022) with chunked prefill under one token budget (Sarathi-Serve,
    arXiv 2403.02310) over a paged KV pool (vLLM, arXiv 2309.06180).

    Running sequences are served before waiting ones, single tokens before prompt chunks. A sequence that needs a page
    when none is free takes those of the policy's victim, whose tokens are computed again later.
    """

    def __init__(self, limits: Limits, policy: str = "fcfs"):
        self.limits = limits
        self.pool = PagePool(limits.num_pages, limits.page_size)
        self._policy = POLICIES[policy]()
        self._waiting = WaitingQueue(self._policy.key)
        self._running: dict[Sequence, None] = {}  # in order of admission
        self._leaving: set[Sequence] = set()  # keep slot and pages until their last step in flight is committed
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self._num_added = 0
        self._batch_is_closed = False  # in static scheduling nobody joins a closed batch until it has ended

    @property
    def num_waiting(self) -> int:
        """Sequences in line."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot and still get work."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._running) or len(self._waiting) > 0

    def add(self, sequence: Sequence) -> None:
        """Puts a new sequence in line.

        Raises:
            InvalidRequest: it could not run even alone.
        """
        longest = min(self.limits.max_model_len, self.limits.num_pages * self.limits.page_size)
        if sequence.num_prompt_tokens >= longest:
            raise InvalidRequest(
                f"the prompt has {sequence.num_prompt_tokens} tokens; prompt and output together may have {longest}",
                "prompt",
            )
        sequence.max_tokens_total = min(sequence.max_tokens_total, longest)
        sequence.order = self._num_added
        self._num_added += 1
        self._waiting.push(sequence)

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Ends a sequence; what is in flight for it will be dropped. Finishing twice changes nothing."""
        if sequence.status is Status.FINISHED:
            return
        if sequence.status is Status.RUNNING:
            self._leave(sequence)
        else:
            self._waiting.discard(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        sequence.stop_reason = stop_reason

    def schedule(self) -> Schedule:
        """Decides the next step. No rows means: nothing can be done before a step in flight is committed."""
        work = Schedule([], 0, 0, [], [], [])
        chunks: list[Row] = []
        self._schedule_decodes(work)
        budget = self.limits.max_num_batched_tokens - len(work.rows)
        if len(work.rows) < len(self._running):
            for sequence in self._running:
                if budget and len(sequence.token_ids) - sequence.num_computed > 1:
                    budget -= self._take(sequence, budget, work.rows, chunks)
        self._admit(budget, work, chunks)
        num_single = len(work.rows)
        work.rows.extend(chunks)
        return work._replace(num_single=num_single, num_tokens=num_single + sum(row.count for row in chunks))

    def _schedule_decodes(self, work: Schedule) -> None:
        """One token for every running sequence that lacks just one."""
        page_size = self.limits.page_size
        rows = work.rows
        for sequence in list(self._running):
            start = sequence.num_computed
            num_tokens = len(sequence.token_ids) + sequence.num_pending
            if num_tokens - start != 1 or num_tokens >= sequence.max_tokens_total:
                continue
            if start >= len(sequence.pages) * page_size and not self._make_room(sequence, work):
                continue
            rows.append(Row(sequence, start, 1, True))
            sequence.num_computed = start + 1
            sequence.num_pending += 1
            sequence.num_inflight_steps += 1

    def _make_room(self, sequence: Sequence, work: Schedule) -> bool:
        """Gives a running sequence one more page, if need be at the cost of one that ranks behind it."""
        if sequence.status is not Status.RUNNING:
            return False  # a victim of this very step
        while not self.pool.num_free:
            if any(leaving.pages for leaving in self._leaving):
                return False  # pages come back with a step in flight; no need to take anybody's
            scheduled = {row.sequence for row in work.rows}
            victim = self._policy.victim([other for other in self._running if other not in scheduled])
            if self._policy.key(victim) <= self._policy.key(sequence):
                return False
            self._preempt(victim)
            work.preempted.append(victim)
        self._grow(sequence, 1, work)
        return True

    def _grow(self, sequence: Sequence, count: int, work: Schedule) -> None:
        first = len(sequence.pages)
        work.grown.append((sequence, first, self.pool.grow(sequence, count)))

    def _take(self, sequence: Sequence, budget: int, singles: list[Row], chunks: list[Row]) -> int:
        """Schedules as much of the sequence's gap as the budget allows; its pages are there. Returns the tokens."""
        start = sequence.num_computed
        gap = len(sequence.token_ids) - start
        count = min(gap, budget)
        row = Row(sequence, start, count, count == gap)
        (singles if count == 1 else chunks).append(row)
        sequence.num_computed = start + count
        sequence.num_pending += row.samples
        sequence.num_inflight_steps += 1
        return count

    def _admit(self, budget: int, work: Schedule, chunks: list[Row]) -> None:
        """Lets waiting sequences join, in the policy's order, while slots, pages and budget last."""
        if self.limits.scheduling == "static" and self._batch_is_closed and self._running:
            return
        while budget and self._free_slots and (sequence := self._waiting.peek()) is not None:
            if sequence in self._leaving:
                break  # preempted with steps in flight: its last tokens are not known yet
            # All pages of what is known are taken at once, so a prefill never stalls half-way; one page for each
            # running sequence stays free, so that joining does not at once lead to preemption.
            pages = self.pool.pages_for(len(sequence.token_ids))
            reserve = len(self._running)
            if pages + reserve > self.pool.num_free:
                break
            self._waiting.pop()
            sequence.status = Status.RUNNING
            sequence.slot = self._free_slots.pop()
            self._running[sequence] = None
            work.admitted.append(sequence)
            self._grow(sequence, pages, work)
            budget -= self._take(sequence, budget, work.rows, chunks)
        # A static batch stays open only while nothing but the budget of one step keeps others from joining.
        self._batch_is_closed = budget > 0 or not self._free_slots or not self._waiting

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.status = Status.WAITING
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self._waiting.push(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Takes a sequence out of the running ones; it keeps slot and pages while a step in flight writes to them."""
        del self._running[sequence]
        if sequence.num_inflight_steps:
            self._leaving.add(sequence)
        else:
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1

    def commit(self, schedule: Schedule, tokens: AbstractSequence[int]) -> list[TokenDelta]:
        """Takes in the result of the oldest step in flight.

        Args:
            schedule: what was dispatched.
            tokens: one per row; read only where the row samples.

        Returns:
            The tokens that were accepted. Those of sequences that had ended meanwhile are dropped.
        """
        deltas = []
        for index, row in enumerate(schedule.rows):
            sequence = row.sequence
            sequence.num_inflight_steps -= 1
            if row.samples:
                sequence.num_pending -= 1
                if sequence.status is not Status.FINISHED:
                    self._append(sequence, tokens[index])
                    deltas.append(TokenDelta(sequence, index, tokens[index]))
            if not sequence.num_inflight_steps and sequence in self._leaving:
                self._leaving.remove(sequence)
                self._release(sequence)
        return deltas

    def _append(self, sequence: Sequence, token: int) -> None:
        if token < 0:
            self.finish(sequence, FinishReason.ERROR)
            return
        sequence.token_ids.append(token)
        if token in sequence.stop_token_ids:
            asked_for = token in (sequence.request.sampling_params.stop_token_ids or ())
            self.finish(sequence, FinishReason.STOP, token if asked_for else None)
        elif len(sequence.token_ids) >= sequence.max_tokens_total:
            self.finish(sequence, FinishReason.LENGTH)

    def check(self) -> None:
        """Asserts the invariants; for tests, after any call."""
        holders = [*self._running, *self._leaving]
        self.pool.check(holders)
        slots = [sequence.slot for sequence in holders]
        assert sorted(slots + self._free_slots) == list(range(self.limits.max_num_seqs)), "slots lost or given twice"
        for sequence in holders:
            assert 0 <= sequence.num_pending <= sequence.num_inflight_steps <= self.limits.max_inflight_steps
            assert sequence.num_computed <= len(sequence.pages) * self.limits.page_size, "computed without a page"
        for sequence in self._running:
            assert sequence.status is Status.RUNNING
            assert sequence.num_computed <= sequence.num_tokens <= sequence.max_tokens_total
        for sequence in self._leaving:
            assert sequence.num_inflight_steps > 0 and sequence.status is not Status.RUNNING
