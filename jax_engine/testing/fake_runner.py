"""FakeRunner: a device side whose answers can be computed by hand.

It keeps the tokens that steps "compute" at their places in the page pool and derives each new token from the whole
history as the page table shows it. So a page that is lost, shared by mistake or given away too early changes tokens.
"""

from collections.abc import Sequence

import numpy as np

from jax_engine.batch import Batch, BatchLayout, StepResult
from jax_engine.buckets import Bucket
from jax_engine.config import Limits
from jax_engine.features import Feature
from jax_engine.schedule import Copies

#: What stands in a place of the pool that nothing was written to.
_UNWRITTEN = -(10**9)


def next_token(history: Sequence[int] | np.ndarray, vocab_size: int) -> int:
    """The token that follows a history."""
    weights = np.arange(1, len(history) + 1, dtype=np.int64)
    return int((np.asarray(history, np.int64) * weights % 9973).sum() * 31 + len(history)) % vocab_size


class FakeHandle:
    """A step that is ready at once, or after `result` was asked for, as the runner was told."""

    def __init__(self, tokens: list[int], ready: bool, sampled: bool = True, extras: tuple = (None, None, None)):
        self.tokens = tokens
        self.sampled = sampled
        self._extras = extras
        self._ready = ready

    def is_ready(self) -> bool:
        """Whether the step counts as finished before anybody waits for it."""
        return self._ready

    def result(self) -> StepResult:
        """The step's tokens."""
        assert self.sampled, "the result of a structured step was asked for before it was sampled"
        return StepResult(self.tokens, *self._extras)


class FakeRunner:
    """Runs batches on numpy arrays.

    Args:
        limits: as for a real runner.
        vocab_size: tokens are below it.
        check: derive tokens from the whole history (slow, exact) or return token 1 for every row (fast).
    """

    def __init__(self, limits: Limits, vocab_size: int = 256, check: bool = True):
        self.limits = limits
        self.vocab_size = vocab_size
        self._check = check
        self._pool = np.full(limits.num_pages * limits.page_size, _UNWRITTEN, np.int64)
        self._last_tokens = np.full(limits.max_num_seqs + 1, _UNWRITTEN, np.int64)
        self._kept: dict[int, np.ndarray] = {}

    def dispatch(self, batch: Batch) -> FakeHandle:
        """Computes a step."""
        bucket = batch.bucket
        if not self._check:
            return FakeHandle([1] * bucket.num_seqs, ready=False)
        parts = BatchLayout.of(bucket, self.limits).unpack(batch.packed)
        tokens = [_UNWRITTEN] * bucket.num_seqs
        for row, slot in enumerate(parts["slots"]):
            first, last = parts["query_starts"][row : row + 2]
            if slot == self.limits.max_num_seqs:
                assert first == last, "a padding row has tokens"
                continue
            ids = parts["token_ids"][first:last].astype(np.int64)
            ids = np.where(ids >= 0, ids, self._last_tokens[np.maximum(-1 - ids, 0)])
            assert (ids >= 0).all(), "a token was read before it was sampled"
            start = int(parts["starts"][row])
            positions = np.arange(start + len(ids))
            size = self.limits.page_size
            tables = parts["page_table"][row].reshape(self.limits.page_groups.num, -1)
            places = tables[:, positions // size] * size + positions % size
            self._pool[places[:, start:]] = ids
            history = self._pool[places[0]]
            assert (history >= 0).all(), "attention would read a place that was never written"
            # What the earliest of the row's tokens sees.
            seen = slice(max(0, start - self.limits.page_groups.window + 1), None)
            for sliding in places[self.limits.page_groups.num_full :]:
                assert (self._pool[sliding[seen]] == history[seen]).all(), "a window holds something else"
            tokens[row] = next_token(history, self.vocab_size)
        self._last_tokens[parts["slots"]] = _UNWRITTEN if batch.structured else tokens
        extras = _extras(bucket, Feature(int(parts["scalars"][1])))
        return FakeHandle(tokens, ready=False, sampled=not batch.structured, extras=extras)

    def sample(self, handle: FakeHandle, batch: Batch, mask: np.ndarray) -> None:
        """Samples a structured step: the token, or the next greater one that its row's mask allows, going round."""
        allowed = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little")[:, : self.vocab_size]
        for row, token in enumerate(handle.tokens):
            if token != _UNWRITTEN:
                handle.tokens[row] = int((token + np.argmax(np.roll(allowed[row], -token))) % self.vocab_size)
        slots = BatchLayout.of(batch.bucket, self.limits).unpack(batch.packed)["slots"]
        self._last_tokens[slots] = handle.tokens
        handle.sampled = True

    def copy_pages(self, copies: Copies) -> None:
        """Carries out a schedule's copies."""
        pool = self._pool.reshape(-1, self.limits.page_size)
        for ticket in copies.dropped_tickets:
            del self._kept[ticket]
        for ticket, _, pages in copies.swapped_out:
            self._kept[ticket] = pool[pages]
        for ticket, first, pages in copies.swapped_in:
            pool[pages] = self._kept[ticket][first : first + len(pages)]


def _extras(bucket: Bucket, features: Feature) -> tuple:
    """Log-probabilities of zero and hidden states of one, where somebody asked for any."""

    def logprobs(count: int) -> tuple[np.ndarray, ...]:
        top_ids = np.tile(np.arange(20, dtype=np.int32), (count, 1))
        return np.zeros(count), np.ones(count, np.int32), top_ids, np.zeros((count, 20))

    return (
        logprobs(bucket.num_seqs) if Feature.LOGPROBS in features else None,
        logprobs(bucket.num_tokens) if Feature.PROMPT_LOGPROBS in features else None,
        np.ones((bucket.num_seqs, 4), np.float32) if Feature.HIDDEN in features else None,
    )
