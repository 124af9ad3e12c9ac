"""Engine: requests in, outputs out, one step at a time. The loop over a ring of steps in flight.

`llm.py` runs it in the caller's thread, `async_engine.py` in a thread of its own. One thread at a time; only
`make_request` may be called from anywhere.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from jax_engine.batch import Batch, BatchBuilder, StepResult
from jax_engine.config import EngineConfig, Limits
from jax_engine.errors import InvalidRequest, QueueFull
from jax_engine.grammar import GrammarStates
from jax_engine.intake import Intake
from jax_engine.metrics import Gauges, Metrics
from jax_engine.output import OutputState, position_logprobs, unit_vector
from jax_engine.request import FinishReason, Request, RequestMetrics, RequestOutput
from jax_engine.request_queue import RequestQueue
from jax_engine.schedule import NO_TOKEN_ALLOWED, Copies, Row, Schedule, TokenDelta
from jax_engine.scheduler import Scheduler
from jax_engine.sequence import Sequence
from jax_engine.step_log import StepLog
from jax_engine.timeline import Timeline
from jax_engine.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

_SEED_STRIDE = 0x9E3779B97F4A7C15  # odd, so that the seeds of 2^64 sequences differ
_MASK64 = 2**64 - 1


class StepHandle(Protocol):
    """A step in flight."""

    def is_ready(self) -> bool: ...

    def result(self) -> StepResult: ...


class Builder(Protocol):
    """Makes of a schedule what the runner is given."""

    def build(self, schedule: Schedule) -> Any: ...


class Runner(Protocol):
    """What the engine needs of the device side."""

    limits: Limits

    def dispatch(self, batch: Any) -> StepHandle: ...

    def sample(self, handle: Any, batch: Batch, mask: np.ndarray) -> None: ...

    def copy_pages(self, copies: Copies) -> None: ...


class Engine:
    """The loop, and the life of requests from `submit` to their last output. Requests are made by `make_request`, which
    is intake.Intake's.

    Args:
        runner: runs the steps.
        tokenizer: None for a model without one; prompts are then token ids, and text is empty.
        vocab_size: token ids are below it.
        eos_token_ids: end a sequence, unless the request ignores them.
        config: policy, seed and the bounds of the queue are read from it.
        clock: seconds; of the requests' arrival times, of all metrics and of the step log.
        step_log: where steps are written down; by default in memory only.
        builder: makes what the runner is given; by default batches.
        sampling_defaults: SamplingParams fields that the model's generation_config sets. Callers offer them to users;
            the engine itself applies none to a request.
        queue: shared with the other replicas of the model; by default its own.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None,
        *,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        config: EngineConfig,
        clock: Callable[[], float] = time.monotonic,
        step_log: StepLog | None = None,
        builder: Builder | None = None,
        sampling_defaults: Mapping[str, Any] | None = None,
        queue: RequestQueue | None = None,
    ):
        self.limits = runner.limits
        self.make_request = Intake(runner.limits, tokenizer, vocab_size, eos_token_ids, clock).make_request
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos_token_ids = frozenset(eos_token_ids)
        self.sampling_defaults = dict(sampling_defaults or {})
        self.scheduler = Scheduler(runner.limits, config.policy)
        self.queue = RequestQueue(config) if queue is None else queue
        self.metrics = Metrics(clock)
        self.step_log = StepLog() if step_log is None else step_log
        self.timeline = Timeline()
        self._runner = runner
        self._builder = BatchBuilder(runner.limits, vocab_size) if builder is None else builder
        self._grammars = GrammarStates(vocab_size)
        self._ring: deque[tuple[Schedule, StepHandle]] = deque()
        self._unsampled: tuple[Schedule, Batch] | None = None  # the last of the ring, where it waits for masks
        self._states: dict[str, OutputState] = {}
        self._seed = config.seed
        self._num_seeds = 0
        self._last_result: float | None = None  # when the last step was read back, unless the work had ended with it
        self.clock = clock

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.has_work or bool(self._ring)

    @property
    def num_requests(self) -> int:
        """Requests that have not finished."""
        return len(self._states)

    @property
    def gauges(self) -> Gauges:
        """What the engine holds now; may be read from any thread."""
        pool = self.scheduler.pool
        return Gauges(
            running=self.scheduler.num_running,
            waiting=self.scheduler.num_waiting,
            inflight_steps=len(self._ring),
            max_inflight_steps=self.limits.max_inflight_steps,
            used_pages=pool.num_pages - pool.num_free,
            num_pages=pool.num_pages,
        )

    def page_references(self) -> list[int]:
        """How many sequences hold each KV page; -1 for one that is kept in the prefix cache alone."""
        return self.scheduler.pool.references()

    def draw_seed(self, request: Request) -> int:
        """The seed of the request's first sequence: its own, or the next of this engine's."""
        params = request.sampling_params
        if params.seed is not None:
            return params.seed
        seed = self._seed + self._num_seeds * _SEED_STRIDE
        self._num_seeds += params.n
        return seed

    def submit(self, request: Request, *, bounded: bool = False, seed: int | None = None) -> None:
        """Puts a request in line.

        Args:
            bounded: keep to the bounds of the queue.
            seed: of its first sequence, where one engine draws for all replicas; by default drawn here.

        Raises:
            InvalidRequest: its id is in use.
            QueueFull: too many wait.
        """
        if request.request_id in self._states:
            raise InvalidRequest(f"request id {request.request_id!r} is in use", "request_id")
        self.queue.join(request, self.clock(), bounded=bounded)
        params = request.sampling_params
        seed = self.draw_seed(request) if seed is None else seed
        stops = frozenset(params.stop_token_ids or ()) | (frozenset() if params.ignore_eos else self.eos_token_ids)
        limit = self.limits.max_model_len
        if params.max_tokens is not None:
            limit = min(limit, len(request.prompt_token_ids) + params.max_tokens)
        sequences = [
            Sequence(request, index, limit, stops, (seed + index * _SEED_STRIDE) & _MASK64) for index in range(params.n)
        ]
        for sequence in sequences:
            self.scheduler.add(sequence)
            self._grammars.add(sequence)
        self.step_log.added(request, sequences)
        self._states[request.request_id] = OutputState(request, sequences, self.tokenizer)

    def refuse_expired(self) -> list[tuple[str, QueueFull]]:
        """Ends the requests that have waited too long for their first step, and says what to tell their callers."""
        refused = []
        for request_id in self.queue.expired(self.clock()):
            if self.abort(request_id) is None:
                continue  # another replica's
            problem = f"the request waited {self.queue.timeout_s:g} s without being served; try again later"
            refused.append((request_id, QueueFull(problem, max(1.0, self.queue.retry_after()))))
        return refused

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request; returns its last output, or None if there is no such request."""
        state = self._states.get(request_id)
        if state is None:
            return None
        self._end_all(state, FinishReason.ABORT)
        self._finish(state)
        return state.output()

    def stop(self, request_id: str, index: int, stop_string: str) -> RequestOutput | None:
        """Ends a completion in whose text its reader has found a stop string; returns what there is to tell."""
        state = self._states.get(request_id)
        if state is None:
            return None
        self._end(state.sequences[index], FinishReason.STOP, stop_string)
        return next(iter(self._outputs([state])), None)

    def reset_prefix_cache(self) -> None:
        """Lets no later sequence use what the KV pages hold now."""
        self.scheduler.pool.clear_index()
        self.step_log.cache_reset()

    def _end_all(self, state: OutputState, reason: FinishReason) -> None:
        for sequence in state.sequences:
            self._end(sequence, reason)

    def _end(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Ends a sequence from outside the scheduler."""
        self.scheduler.finish(sequence, reason, stop_reason)
        self.step_log.ended(sequence, reason, stop_reason)

    def step(self) -> list[RequestOutput]:
        """One turn: dispatches a step if there is work for one; then, if the ring is full or there was no work, takes
        in the oldest step. Returns the outputs that changed."""
        try:
            return self._turn()
        finally:
            self.step_log.end_turn(idle=not self.has_work)

    def _turn(self) -> list[RequestOutput]:
        schedule = self._timed("schedule", self.scheduler.schedule, self.clock())
        self._note_decisions(schedule)
        batch = self._timed("build", self._builder.build, schedule) if schedule.rows else None
        failed = self._sample()
        if (copies := schedule.copies) is not None:
            self._timed("dispatch", self._runner.copy_pages, copies)
        if batch is None:
            self.step_log.scheduled(schedule, None, self.scheduler, self.metrics.compiles_after_ready)
        else:
            handle = self._timed("dispatch", self._runner.dispatch, batch)
            self._ring.append((schedule, handle))
            self._note_dispatch(schedule, batch)
            self.step_log.scheduled(schedule, batch.bucket, self.scheduler, self.metrics.compiles_after_ready)
        outputs = self._fail(failed)
        if batch is not None and batch.structured:
            return outputs + self._take_before(schedule, batch)
        if not self._ring or (schedule.rows and len(self._ring) < self.limits.max_inflight_steps):
            return outputs
        return outputs + self._take_oldest()

    def _take_before(self, schedule: Schedule, batch: Batch) -> list[RequestOutput]:
        """Takes in the steps before a structured one, on whose tokens its masks depend, while its model runs. The masks
        are made while the last of them is committed, and the step after is scheduled and built."""
        outputs: list[RequestOutput] = []
        while len(self._ring) > 2:
            outputs += self._take_oldest()
        self._unsampled = schedule, batch
        if len(self._ring) > 1:
            outputs += self._take_oldest()
        else:
            self._timed("grammar", self._begin_masks)
        if self._grammars.masks_are_made:
            outputs += self._fail(self._sample())
        return outputs if len(self._ring) < self.limits.max_inflight_steps else outputs + self._take_oldest()

    def _take_oldest(self) -> list[RequestOutput]:
        outputs = self._fail(self._sample()) if len(self._ring) == 1 else []
        schedule, handle = self._ring.popleft()
        waits = not handle.is_ready()
        result = self._timed("wait", handle.result)
        now = self.clock()
        self.metrics.histograms["step"].observe(self.timeline.add_result(now))
        if self._grammars:
            self._timed("grammar", self._grammars.advance, schedule.rows, result.tokens)
        if self._unsampled is not None and len(self._ring) == 1:
            self._timed("grammar", self._begin_masks)
        # What streams wait for: the device, and the host where it is slower. While there is no work nobody waits.
        seconds = now - (schedule.time if self._last_result is None else self._last_result)
        outputs += self._timed("commit", self._commit, schedule, result, waits, seconds)
        self._last_result = now if self.has_work else None
        return outputs

    def _begin_masks(self) -> None:
        assert self._unsampled is not None
        schedule, batch = self._unsampled
        self._grammars.begin_masks(schedule.rows, batch.bucket.num_seqs)

    def _sample(self) -> list[tuple[Sequence, str]]:
        """Dispatches the sampling of the structured step that waits for its masks, if there is one; returns the
        sequences whose grammar has come to an end that is no match."""
        if self._unsampled is None:
            return []
        (_, batch), self._unsampled = self._unsampled, None
        mask, failed = self._timed("grammar", self._grammars.end_masks)
        self._timed("dispatch", self._runner.sample, self._ring[-1][1], batch, mask)
        return failed

    def _fail(self, failed: list[tuple[Sequence, str]]) -> list[RequestOutput]:
        """Ends the requests of sequences that no token can follow; returns their outputs."""
        changed = {}
        for sequence, message in failed:
            state = self._states[sequence.request.request_id]
            state.fail(f"structured_outputs: {message}", "structured_outputs")
            self._end_all(state, FinishReason.ERROR)
            changed[state.request.request_id] = state
        return self._outputs(changed.values())

    def _timed(self, phase: str, function: Callable, *args):
        started = self.clock()
        idle = phase != "wait" and (not self._ring or self._ring[-1][1].is_ready())
        if idle:
            self.timeline.seen_ready(started)
        result = function(*args)
        ended = self.clock()
        self.metrics.add_phase(phase, ended - started, idle)
        self.step_log.timed(phase, started, ended)
        self.timeline.add_phase(phase, started, ended)
        return result

    def _note_decisions(self, schedule: Schedule) -> None:
        for sequence in schedule.admitted:
            metrics = self._states[sequence.request.request_id].metrics
            if not sequence.num_preemptions:
                self.metrics.add_lookup(sequence.num_prompt_tokens, sequence.num_cached or 0)
            if metrics.first_scheduled_time is None:
                metrics.first_scheduled_time = schedule.time
                self.metrics.histograms["queue"].observe(schedule.time - metrics.arrival_time)
                self.queue.admit(sequence.request.request_id, schedule.time)
        for preemption in schedule.preempted:
            self._states[preemption.sequence.request.request_id].metrics.num_preemptions += 1
            self.metrics.preemptions_by_way[preemption.way] += 1
        self.metrics.preemptions += len(schedule.preempted)

    def _note_dispatch(self, schedule: Schedule, batch: Batch) -> None:
        singles = schedule.rows[: schedule.num_single]
        num_decodes = sum([row[1] >= row[0].num_prompt_tokens for row in singles])  # a list: faster than a generator
        self.metrics.add_step(batch.bucket, schedule.num_tokens, num_decodes)
        gauges = self.gauges
        self.timeline.add_dispatch(
            self.clock(),
            schedule.num_tokens,
            batch.bucket.num_tokens,
            num_decodes,
            len(schedule.rows),
            gauges.running,
            gauges.waiting,
            gauges.used_pages,
        )

    def _commit(self, schedule: Schedule, result: StepResult, waited: bool, seconds: float) -> list[RequestOutput]:
        now = self.clock()
        changed: dict[str, OutputState] = {}
        if result.prompt_logprobs is not None:
            self._take_prompt_logprobs(schedule.rows, result.prompt_logprobs)
        deltas = self.scheduler.commit(schedule, result.tokens, seconds)
        self.step_log.committed(result.tokens[: len(schedule.rows)], waited, seconds)
        self.metrics.tokens["generated"] += len(deltas)
        for delta in deltas:
            request_id = delta[0].request.request_id
            state = changed[request_id] = self._states[request_id]
            self._take_token(state, delta, result, now)
        return self._outputs(changed.values())

    def _outputs(self, changed: Iterable[OutputState]) -> list[RequestOutput]:
        outputs = []
        for state in changed:
            output = state.output()
            if output is None:
                continue
            if output.finished:
                self._finish(state)
            outputs.append(output)
        return outputs

    def _take_token(self, state: OutputState, delta: TokenDelta, result: StepResult, now: float) -> None:
        sequence = delta.sequence
        if sequence.finish_reason is FinishReason.ERROR:
            if delta.token_id == NO_TOKEN_ALLOWED:
                param = "allowed_token_ids" if state.request.grammar is None else "structured_outputs"
                state.fail(f"{param}, bad_words, logit_bias and min_tokens together allow no token", param)
            else:
                state.fail("the model gave a result that is not a number")
            return
        if state.request.embed:
            assert result.hidden is not None
            state.embedding = unit_vector(result.hidden[delta.row])
        self._note_token(state.metrics, now)
        wanted = state.request.sampling_params.logprobs
        logprobs = None
        if wanted is not None:
            assert result.logprobs is not None
            logprobs = position_logprobs(delta.token_id, wanted, *(part[delta.row] for part in result.logprobs))
        try:
            stop = state.append(sequence, delta.token_id, logprobs)
        except Exception:  # a tokenizer that cannot make text of its own tokens fails the one request that has them
            _log.exception("request %s: no text can be made of its tokens", state.request.request_id)
            state.fail("no text can be made of the tokens")
            self._end_all(state, FinishReason.ERROR)
            return
        if stop is not None or self._grammars.is_complete(sequence):
            self._end(sequence, FinishReason.STOP, stop)

    def _note_token(self, metrics: RequestMetrics, now: float) -> None:
        if metrics.first_token_time is None:
            metrics.first_token_time = now
            self.metrics.histograms["time_to_first_token"].observe(now - metrics.arrival_time)
        elif now != metrics.last_token_time:  # once per step, also where a request has several completions
            self.metrics.histograms["inter_token"].observe(now - (metrics.last_token_time or now))
        metrics.last_token_time = now

    def _take_prompt_logprobs(self, rows: list[Row], arrays: tuple[np.ndarray, ...]) -> None:
        offset = 0
        for sequence, start, count, _ in rows:
            state = self._states.get(sequence.request.request_id)
            wanted = sequence.request.sampling_params.prompt_logprobs
            if state is not None and wanted is not None and sequence.scores_prompt:
                following = sequence.prompt_targets(start, count)
                entries = [
                    position_logprobs(token, wanted, *(part[offset + i] for part in arrays))
                    for i, token in enumerate(following)
                ]
                state.add_prompt_logprobs(start + 1, entries)
            offset += count

    def _finish(self, state: OutputState) -> None:
        """Forgets a request that has ended."""
        del self._states[state.request.request_id]
        self.queue.leave(state.request.request_id)
        state.metrics.finished_time = now = self.clock()
        histograms = self.metrics.histograms
        histograms["end_to_end"].observe(now - state.metrics.arrival_time)
        histograms["prompt_tokens"].observe(len(state.request.prompt_token_ids))
        for sequence in state.sequences:
            self._grammars.drop(sequence)
            self.metrics.requests[str(sequence.finish_reason)] += 1
            histograms["output_tokens"].observe(sequence.num_output_tokens)
