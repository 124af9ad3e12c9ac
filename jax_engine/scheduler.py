"""Scheduler: which tokens of which sequences go into the next step.

The engine calls `schedule`, dispatches what comes out, and calls `commit` with the sampled tokens, in the order of
dispatch, one or more steps later. Sequence counters are written here and nowhere else. No clock, no device, no I/O:
the same calls give the same decisions.
"""

import itertools
import math
from collections.abc import Sequence as AbstractSequence

from jax_engine.buckets import choose_bucket, fill
from jax_engine.config import Limits
from jax_engine.errors import prompt_too_long
from jax_engine.page_pool import PagePool
from jax_engine.policies import POLICIES
from jax_engine.request import FinishReason
from jax_engine.schedule import INVALID_TOKEN, PageCopy, Preemption, Row, Schedule, TokenDelta, make_delta, make_row
from jax_engine.sequence import Sequence, Status
from jax_engine.step_time import StepTime
from jax_engine.swap_space import SwapSpace


class Scheduler:
    """Iteration-level scheduling (Orca, OSDI 2022) with chunked prefill under one token budget (Sarathi-Serve,
    arXiv 2403.02310) over a paged KV pool (vLLM, arXiv 2309.06180).

    Running sequences are served before waiting ones, single tokens before prompt chunks. A sequence that needs a page
    when none is free takes those of a sequence that ranks behind it in the policy's order.
    """

    def __init__(self, limits: Limits, policy: str = "fcfs"):
        self.limits = limits
        groups, step_tokens = limits.page_groups, limits.max_num_batched_tokens
        self.pool = PagePool(limits.num_pages, limits.page_size, limits.enable_prefix_caching, groups, step_tokens)
        self.swap_space = SwapSpace(limits)
        self.step_time = StepTime(limits.token_buckets)
        self._most_prefills = limits.max_concurrent_prefills or limits.max_num_seqs
        self._policy = POLICIES[policy](limits)  # the line of those who wait
        self._running: dict[Sequence, None] = {}  # in order of admission
        self._prefilling: dict[Sequence, None] = {}  # those of them that lacked more than one token when last looked at
        self._leaving: set[Sequence] = set()  # keep slot and pages until their last step in flight is committed
        # Of a request with several sequences, the others get in line when the prompt of the first can be shared.
        self._followers: dict[Sequence, list[Sequence]] = {}
        self._following: set[Sequence] = set()
        self._last_leader: Sequence | None = None
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self._num_added = 0
        self._dropped_tickets: list[int] = []
        self._batch_is_closed = False  # in static scheduling nobody joins a closed batch until it has ended

    @property
    def num_waiting(self) -> int:
        """Sequences in line."""
        return len(self._policy) + len(self._following)

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot and still get work."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._running) or self.num_waiting > 0

    def add(self, sequence: Sequence) -> None:
        """Puts a new sequence in line. The sequences of one request are added one after the other.

        Raises:
            InvalidRequest: it could not run even alone.
        """
        longest = min(self.limits.max_model_len, self.limits.most_tokens(self.limits.num_pages))
        if sequence.num_prompt_tokens >= longest:
            raise prompt_too_long(sequence.num_prompt_tokens, longest)
        sequence.max_tokens_total = min(sequence.max_tokens_total, longest)
        sequence.order = self._num_added
        self._num_added += 1
        leader = self._last_leader
        if sequence.index == 0:
            self._last_leader = sequence
        elif leader is not None and leader.request is sequence.request and self._can_lead(leader):
            self._followers.setdefault(leader, []).append(sequence)
            self._following.add(sequence)
            return
        self._policy.push(sequence)

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Ends a sequence; what is in flight for it will be dropped. Finishing twice changes nothing."""
        if sequence.status is Status.FINISHED:
            return
        if sequence.status is Status.RUNNING:
            self._leave(sequence)
        else:
            line = self._following if sequence in self._following else self._policy
            line.discard(sequence)
        self._drop_swap(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        sequence.stop_reason = stop_reason
        self._let_follow(sequence)

    def schedule(self, now: float = 0.0) -> Schedule:
        """Decides the next step. No rows means: nothing can be done before a step in flight is committed.

        Args:
            now: seconds on the clock of the requests' arrival times.
        """
        self._policy.tell_time(now)
        dropped, self._dropped_tickets = self._dropped_tickets, []
        work = Schedule([], 0, 0, None, [], [], [], [], [], dropped, now)
        chunks: list[Row] = []
        self._schedule_decodes(work)
        if self._prefilling or len(self._policy):
            budget = self._prompt_budget(work.rows)
            for sequence in list(self._prefilling):
                if sequence not in self._prefilling:
                    continue  # it gave way to one before it
                if budget and len(sequence.token_ids) - sequence.num_computed > 1:
                    budget -= self._take(sequence, budget, work, chunks)
                elif len(sequence.token_ids) == sequence.num_computed:
                    del self._prefilling[sequence]
            self._admit(budget, work, chunks)
            # Only now, so that whoever finds these pages reads them in a later step than the one that writes them.
            for sequence in {row.sequence: None for row in chunks} | dict.fromkeys(work.admitted):
                self.pool.index(sequence, sequence.num_computed)
                if sequence.num_computed >= sequence.num_prompt_tokens:
                    self._let_follow(sequence)
        num_single = len(work.rows)
        work.rows.extend(chunks)
        num_tokens = num_single + sum(row.count for row in chunks)
        bucket = choose_bucket(self.limits, num_tokens, num_single, len(work.rows)) if work.rows else None
        return work._replace(num_single=num_single, num_tokens=num_tokens, bucket=bucket)

    def _schedule_decodes(self, work: Schedule) -> None:
        """One token for every running sequence that lacks just one."""
        rows = work.rows
        charge = self._policy.charge if self._policy.charges else None
        for sequence in list(self._running):
            start = sequence.num_computed
            num_tokens = len(sequence.token_ids) + sequence.num_pending
            # A victim of this very step lacks all its tokens, which are more than one.
            if num_tokens - start != 1 or num_tokens >= sequence.max_tokens_total:
                continue
            if start >= sequence.num_places and not self._make_room(sequence, work, []):
                continue
            rows.append(make_row((sequence, start, 1, True)))
            sequence.num_computed = start + 1
            sequence.num_pending += 1
            sequence.num_inflight_steps += 1
            if charge is not None:
                charge(sequence, 0, 1)

    def _prompt_budget(self, decodes: list[Row]) -> int:
        """How many prompt tokens the step may have beside the single ones."""
        limits, num_decodes = self.limits, len(decodes)
        room = limits.max_num_batched_tokens - num_decodes
        budget = min(self._wanted(room), room, limits.prefill_token_budget or room)
        if limits.max_decode_gap_s is not None and num_decodes and budget > 0:
            start = next((sequence.num_computed for sequence in self._prefilling), 0)
            pairs = sum(row.start + 1 for row in decodes)
            budget = self.step_time.largest(limits.max_decode_gap_s, num_decodes, budget, start, pairs)
        return fill(limits, num_decodes, budget) if limits.fill_buckets else budget

    def _wanted(self, enough: int) -> int:
        """Prompt tokens of those who run, and of those in line for whom there are slots; no further than `enough`."""
        wanted = sum(len(sequence.token_ids) - sequence.num_computed for sequence in self._prefilling)
        places = min(len(self._free_slots), self._most_prefills - len(self._prefilling))
        for sequence in itertools.islice(self._policy.upcoming(), max(places, 0)):
            if wanted >= enough:
                break
            wanted += len(sequence.token_ids)
        return wanted

    def _make_room(self, sequence: Sequence, work: Schedule, chunks: list[Row]) -> bool:
        """Gives a running sequence the pages of its next token, if need be at the cost of one that ranks behind it."""
        count = max(len(sequence.pages), self.pool.pages_for(sequence.num_computed + 1))
        while self.pool.price(sequence, count) > self.pool.num_free:
            if any(leaving.pages for leaving in self._leaving):
                return False  # pages come back with a step in flight; no need to take anybody's
            victim = self._victim(sequence, work.rows + chunks)
            if victim is None:
                return False
            self._preempt(victim, sequence, work)
        self._grow(sequence, count, work)
        return True

    def _victim(self, sequence: Sequence, rows: list[Row]) -> Sequence | None:
        """Who gives way to a sequence: of those ranked behind it, the least entitled, then the cheapest to bring back,
        then the last to come. The first in rank is never a victim, so the engine always gets on."""
        rank, level, scheduled = self._policy.rank, self._policy.level, {row.sequence for row in rows}
        own = rank(sequence)
        behind = [other for other in self._running if other not in scheduled and rank(other) > own]
        if not behind:
            return None
        lowest = max(map(level, behind))
        cost = self.swap_space.seconds_to_bring_back
        return min((other for other in behind if level(other) == lowest), key=lambda other: (cost(other), -other.order))

    def _grow(self, sequence: Sequence, count: int, work: Schedule) -> None:
        width = self.limits.max_pages_per_seq
        for group, first, pages in self.pool.grow(sequence, count):
            work.grown.append((sequence, group * width + first, pages))

    def _cover(self, sequence: Sequence, count: int, work: Schedule, chunks: list[Row]) -> int:
        """How many of a running sequence's next `count` tokens have pages, in sliding groups too when their windows
        have moved on as far as they can."""
        start, pool = sequence.num_computed, self.pool
        if start + count > sequence.num_places:
            if pool.price(sequence, len(sequence.pages)) <= pool.num_free:
                self._grow(sequence, len(sequence.pages), work)
            elif start >= sequence.num_places and not self._make_room(sequence, work, chunks):
                return 0
        return min(count, sequence.num_places - start)

    def _take(self, sequence: Sequence, budget: int, work: Schedule, chunks: list[Row]) -> int:
        """Schedules as much of the sequence's gap as budget and pages allow. Returns the tokens."""
        start = sequence.num_computed
        gap = len(sequence.token_ids) - start
        count = self._cover(sequence, min(gap, budget), work, chunks)
        if not count:
            return 0
        row = Row(sequence, start, count, count == gap)
        (work.rows if count == 1 else chunks).append(row)
        if self._policy.charges:
            new = min(start + count, sequence.num_prompt_tokens) - max(start, sequence.num_reached)
            self._policy.charge(sequence, max(0, new), int(row.samples))
        sequence.num_computed = start + count
        sequence.num_reached = max(sequence.num_reached, sequence.num_computed)
        sequence.num_pending += row.samples
        sequence.num_inflight_steps += 1
        if row.samples:
            self._prefilling.pop(sequence, None)
        return count

    def _admit(self, budget: int, work: Schedule, chunks: list[Row]) -> None:
        """Lets waiting sequences join, in the policy's order, while slots, pages and budget last."""
        if work.preempted or (self.limits.scheduling == "static" and self._batch_is_closed and self._running):
            return  # who gave way in this step is not to come back in it
        no_room = False
        while budget > 0 and self._free_slots and len(self._prefilling) < self._most_prefills:
            sequence = self._policy.peek()
            if sequence is None:
                break
            # Preempted with steps in flight: its last tokens are not known yet. Or: its pages are not to be had.
            if sequence in self._leaving or not self._give_pages(sequence, work):
                no_room = True
                break
            self._policy.pop()
            sequence.status = Status.RUNNING
            sequence.slot = self._free_slots.pop()
            self._running[sequence] = None
            self._prefilling[sequence] = None
            work.admitted.append(sequence)
            budget -= self._take(sequence, budget, work, chunks)
        # A static batch stays open only while nothing but the budget of one step keeps others from joining.
        self._batch_is_closed = no_room or not self._free_slots or not len(self._policy)

    def _give_pages(self, sequence: Sequence, work: Schedule) -> bool:
        """Gives a waiting sequence pages for all its tokens, if there are enough, and says what of it is computed.

        All pages of what is known are taken at once, in sliding groups of what the first step can add to the window, so
        a prefill does not stall half-way; a page of each group for each running sequence stays free, so that joining
        does not at once lead to preemption.
        """
        pool, width = self.pool, self.limits.max_pages_per_seq
        reserve = len(self._running) * pool.groups.num
        if pool.num_free <= reserve:
            return False
        # At least one token is computed, for its logits; and every prompt token once that is to be judged.
        most = len(sequence.token_ids) - 1
        found = pool.match(sequence, min(most, sequence.num_reached) if sequence.scores_prompt else most)
        count, num_found = pool.pages_for(len(sequence.token_ids)), len(found[0])
        start = num_found * self.limits.page_size
        comes_back = sequence.swap is not None and sequence.num_swapped > start
        start = sequence.num_swapped if comes_back else start
        if pool.price_to_join(found, count, start) + reserve > pool.num_free:
            return False
        pool.share(sequence, found)
        sequence.num_computed = start
        if sequence.num_cached is None:
            sequence.num_cached = num_found * self.limits.page_size
        pool.grow(sequence, count)
        work.grown.extend((sequence, group * width, pages) for group, pages in enumerate(pool.shown(sequence)))
        if comes_back:
            work.swapped_in.extend(self.swap_space.copies_back(sequence, num_found))
        self._drop_swap(sequence)
        return True

    def _preempt(self, sequence: Sequence, beneficiary: Sequence, work: Schedule) -> None:
        space = self.swap_space
        way = "swap" if space.prefers_swap(sequence) else "recompute"
        swap_seconds = space.seconds_to_swap(sequence)
        prices = (space.seconds_to_recompute(sequence), swap_seconds if math.isfinite(swap_seconds) else None)
        work.preempted.append(Preemption(sequence, beneficiary, way, sequence.num_computed, *prices))
        if way == "swap":
            sequence.swap, pages = space.take(sequence)
            sequence.num_swapped = sequence.num_computed
            work.swapped_out.append(PageCopy(sequence.swap, 0, pages))
        self._leave(sequence)
        sequence.status = Status.WAITING
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self._policy.push(sequence)
        self._let_follow(sequence)

    def _drop_swap(self, sequence: Sequence) -> None:
        if sequence.swap is not None:
            self.swap_space.give_back(sequence.swap)
            self._dropped_tickets.append(sequence.swap)
            sequence.swap = None

    def _can_lead(self, sequence: Sequence) -> bool:
        """Whether waiting for the sequence's prompt saves others of its request from computing it too."""
        shares = self.pool.caching and sequence.num_prompt_tokens > self.limits.page_size
        return shares and sequence.status is Status.WAITING and self.limits.scheduling != "static"

    def _let_follow(self, leader: Sequence) -> None:
        """Lets those get in line who waited for a sequence."""
        for sequence in self._followers.pop(leader, ()):
            if sequence in self._following:
                self._following.remove(sequence)
                self._policy.push(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Takes a sequence out of the running ones; it keeps slot and pages while a step in flight writes to them."""
        del self._running[sequence]
        self._prefilling.pop(sequence, None)
        if sequence.num_inflight_steps:
            self._leaving.add(sequence)
        else:
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1

    def commit(
        self, schedule: Schedule, tokens: AbstractSequence[int], seconds: float | None = None
    ) -> list[TokenDelta]:
        """Takes in the result of the oldest step in flight.

        Args:
            schedule: what was dispatched.
            tokens: one per row; read only where the row samples.
            seconds: how long streams waited for this result, where it was measured: since the one before it, or since
                the step was scheduled if there was none.

        Returns:
            The tokens that were accepted. Those of sequences that had ended meanwhile are dropped.
        """
        if seconds is not None and self.limits.max_decode_gap_s is not None:
            self._learn(schedule, seconds)
        page_size, leaving = self.limits.page_size, self._leaving
        deltas = []
        # By position, which is faster than by name; and there may be more tokens than rows, those of padding.
        for index, ((sequence, start, count, samples), token) in enumerate(zip(schedule.rows, tokens, strict=False)):
            sequence.num_inflight_steps -= 1
            alive = sequence.status is not Status.FINISHED
            # Of a finished sequence these are surplus steps, which need not have written anything.
            if alive and not (start + count) % page_size and token != INVALID_TOKEN:
                self.pool.index(sequence, start + count)
            if samples:
                sequence.num_pending -= 1
                if alive:
                    self._append(sequence, token)
                    deltas.append(make_delta((sequence, index, token)))
            if leaving and not sequence.num_inflight_steps and sequence in leaving:
                leaving.remove(sequence)
                self._release(sequence)
        return deltas

    def _append(self, sequence: Sequence, token: int) -> None:
        if token < 0:
            if token == INVALID_TOKEN:
                self.pool.forget(sequence)
            self.finish(sequence, FinishReason.ERROR)
            return
        sequence.token_ids.append(token)
        if token in sequence.stop_token_ids:
            asked_for = token in (sequence.request.sampling_params.stop_token_ids or ())
            self.finish(sequence, FinishReason.STOP, token if asked_for else None)
        elif len(sequence.token_ids) >= sequence.max_tokens_total:
            self.finish(sequence, FinishReason.LENGTH)

    def _learn(self, schedule: Schedule, seconds: float) -> None:
        bucket = schedule.bucket
        if bucket is not None and not bucket.decode_only:
            pairs = sum(row.count * (row.start + row.count) for row in schedule.rows)
            self.step_time.learn(bucket.num_tokens, pairs, seconds)

    def check(self) -> None:
        """Asserts the invariants; for tests, after any call."""
        holders = [*self._running, *self._leaving]
        self.pool.check(holders)
        known = {*holders, *self._policy, *self._following}
        self.swap_space.check({sequence.swap for sequence in known if sequence.swap is not None})
        waiting = [sequence for sequence in known if sequence.status is Status.WAITING]
        assert len(waiting) == self.num_waiting
        assert self._following == {sequence for group in self._followers.values() for sequence in group} & known
        assert self._prefilling.keys() <= self._running.keys() and self._followers.keys() <= known
        assert len(self._prefilling) <= self._most_prefills
        slots = [sequence.slot for sequence in holders]
        assert sorted(slots + self._free_slots) == list(range(self.limits.max_num_seqs)), "slots lost or given twice"
        for sequence in holders:
            assert 0 <= sequence.num_pending <= sequence.num_inflight_steps <= self.limits.max_inflight_steps
            assert sequence.num_computed <= sequence.num_places, "computed without a page"
        for sequence in self._running:
            assert sequence.status is Status.RUNNING
            still_seen = self.limits.page_groups.first_kept(sequence.num_computed, self.limits.page_size)
            assert sequence.num_dropped <= still_seen, "a page was given back that is still looked at"
            assert sequence.num_computed <= sequence.num_tokens <= sequence.max_tokens_total
        for sequence in self._leaving:
            assert sequence.num_inflight_steps > 0 and sequence.status is not Status.RUNNING
