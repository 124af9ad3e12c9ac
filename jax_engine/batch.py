"""Batch: one step's work as arrays of a fixed size, built on the host with numpy.

The engine asks a BatchBuilder for a Batch; model_runner.py uploads it; step.py reads it through `BatchLayout`. Nearly
all of it is one int32 array, because one upload costs a tenth of twelve. Never imports jax.

What changes only when a sequence joins or grows (sampling settings, page table) is kept in tables by slot, so that
building a step is a few numpy gathers and one short loop.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from jax_engine.buckets import Bucket, buckets
from jax_engine.config import Limits
from jax_engine.constraints import Constraints, ConstraintTable
from jax_engine.features import Feature
from jax_engine.sampling_params import MAX_LOGIT_BIASES, MAX_STOP_TOKEN_IDS
from jax_engine.schedule import Schedule
from jax_engine.sequence import Sequence

#: Per-sequence settings, int32 or float32 by their bits, one row of the table for each.
INT_FIELDS = ("prompt_len", "top_k", "seed_low", "seed_high")
FLOAT_FIELDS = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
#: Most (token, value, until) triples of a sequence: its logit biases, and its stop and end tokens under min_tokens.
MAX_ADJUSTMENTS = MAX_LOGIT_BIASES + MAX_STOP_TOKEN_IDS + 20
#: Stop tokens of a sequence that the device knows. A sequence that ends by another one does some work in vain.
NUM_STOP_IDS = 8
_FOREVER = 2**31 - 1


@dataclass(frozen=True)
class BatchLayout:
    """Where each part of a step lies in the packed int32 array.

    Parts, for T tokens, B sequences and P pages per sequence:
        token_ids [T]: at least 0: the id; below 0: the token that slot -id - 1 sampled last. It comes first, so that
            what follows, `rows`, lies in the same way in all buckets of B sequences.
        query_starts [B + 1]: row i's tokens are [query_starts[i], query_starts[i + 1]).
        starts [B]: position of the row's first token.
        slots [B]: the row's slot; max_num_seqs for padding rows.
        settings [10, B]: INT_FIELDS, then FLOAT_FIELDS by their bits.
        stop_ids [8, B]: tokens that end the row's sequence, the lowest of them; -1 where there are fewer.
        page_table [B, G * P]: ids of the row's pages, a table of P pages for each of the G groups of layers.
        scalars [2]: rows that take the path of single tokens; the features in use.
    """

    bucket: Bucket
    max_pages_per_seq: int
    num_tables: int = 1

    @classmethod
    def of(cls, bucket: Bucket, limits: Limits) -> "BatchLayout":
        """The layout of a bucket's packed array under these limits."""
        return cls(bucket, limits.max_pages_per_seq, limits.page_groups.num)

    @cached_property
    def parts(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Name -> (offset, shape)."""
        seqs = self.bucket.num_seqs
        shapes = {
            "token_ids": (self.bucket.num_tokens,),
            "query_starts": (seqs + 1,),
            "starts": (seqs,),
            "slots": (seqs,),
            "settings": (len(INT_FIELDS) + len(FLOAT_FIELDS), seqs),
            "stop_ids": (NUM_STOP_IDS, seqs),
            "page_table": (seqs, self.num_tables * self.max_pages_per_seq),
            "scalars": (2,),
        }
        parts, offset = {}, 0
        for name, shape in shapes.items():
            parts[name] = (offset, shape)
            offset += math.prod(shape)
        return parts

    @cached_property
    def size(self) -> int:
        """Elements of the packed array."""
        offset, shape = self.parts["scalars"]
        return offset + math.prod(shape)

    def unpack(self, packed):
        """Name -> part, as views of a numpy array or slices of a traced one."""
        return {
            name: packed[offset : offset + math.prod(shape)].reshape(shape)
            for name, (offset, shape) in self.parts.items()
        }


class Adjustments(NamedTuple):
    """Changes to single logits: `value` is added to the logit of `ids` at positions below `until`. All [B, A].

    Ids of -1 are unused. On the host numpy arrays; in step.py the same on the device.
    """

    ids: Any
    values: Any
    until: Any


class Batch(NamedTuple):
    """One step's work. Adjustments, prompt targets and constraints are None in the many steps that have none.

    prompt_targets [T]: the prompt token that follows each token, -1 where its log-probability is not asked for.
    structured: some row has a grammar: the step is sampled by a call of its own, when the grammar's mask is known.
    """

    bucket: Bucket
    packed: np.ndarray
    adjustments: Adjustments | None
    prompt_targets: np.ndarray | None
    constraints: Constraints | None = None
    structured: bool = False


class StepResult(NamedTuple):
    """What came of a batch, on the host, an entry per row. Log-probabilities are None where nobody asked for any.

    Attributes:
        tokens: B ids; schedule.INVALID_TOKEN where the logits held a NaN, NO_TOKEN_ALLOWED where constraints exclude
            every token.
        logprobs: (logprob [B], rank [B], top ids [B, K], top log-probabilities [B, K]) of the tokens.
        prompt_logprobs: the same of the prompt targets, [T] and [T, K].
        hidden: [B, D] float32, the last hidden state of each row's last token; None where nobody asked for it.
    """

    tokens: list[int]
    logprobs: tuple[np.ndarray, ...] | None = None
    prompt_logprobs: tuple[np.ndarray, ...] | None = None
    hidden: np.ndarray | None = None


def no_adjustments(num_seqs: int) -> Adjustments:
    """Adjustments that change nothing."""
    shape = (num_seqs, MAX_ADJUSTMENTS)
    return Adjustments(np.full(shape, -1, np.int32), np.zeros(shape, np.float32), np.zeros(shape, np.int32))


class BatchBuilder:
    """Turns schedules into batches; keeps the tables by slot up to date from what the schedules say has changed."""

    def __init__(self, limits: Limits, vocab_size: int):
        self.limits = limits
        num_slots = limits.max_num_seqs
        self._settings = np.zeros((len(INT_FIELDS) + len(FLOAT_FIELDS), num_slots), np.int32)
        self._features = np.zeros(num_slots, np.int32)
        self._stop_ids = np.full((NUM_STOP_IDS, num_slots), -1, np.int32)
        self._page_table = np.zeros((num_slots, limits.page_groups.num * limits.max_pages_per_seq), np.int32)
        self._adjustments: dict[int, Adjustments] = {}
        self._constraints = ConstraintTable(vocab_size)
        self._layouts = {bucket: BatchLayout.of(bucket, limits) for bucket in buckets(limits)}

    def layout(self, bucket: Bucket) -> BatchLayout:
        """The layout of a bucket's packed array."""
        return self._layouts[bucket]

    def build(self, schedule: Schedule) -> Batch:
        """The batch of a schedule that has rows. The arrays are new ones: a transfer may still read the last."""
        for sequence in schedule.admitted:
            self._set_slot(sequence)
        for sequence, first, pages in schedule.grown:
            self._page_table[sequence.slot, first : first + len(pages)] = pages
        rows, num_single = schedule.rows, schedule.num_single
        num_rows = len(rows)
        bucket = schedule.bucket
        assert bucket is not None
        layout = self._layouts[bucket]
        # The page table is by far the largest part, and what lies past a row's pages is never read: it stays as it is.
        packed = np.empty(layout.size, np.int32)
        packed[: layout.parts["page_table"][0]] = 0
        parts = layout.unpack(packed)

        slots = np.array([row[0].slot for row in rows], np.int32)  # by index: a third faster than by name
        starts = np.array([row[1] for row in rows], np.int32)
        counts = np.ones(num_rows, np.int32)
        counts[num_single:] = [row[2] for row in rows[num_single:]]
        parts["starts"][:num_rows] = starts
        parts["slots"][:] = self.limits.max_num_seqs
        parts["slots"][:num_rows] = slots
        np.add.accumulate(counts, dtype=np.int32, out=parts["query_starts"][1 : num_rows + 1])
        parts["query_starts"][num_rows + 1 :] = schedule.num_tokens
        parts["settings"][:, :num_rows] = self._settings.take(slots, axis=1)
        parts["stop_ids"][:, :num_rows] = self._stop_ids.take(slots, axis=1)
        width = -(-int((starts + counts).max()) // self.limits.page_size)
        for first in range(0, self._page_table.shape[1], self.limits.max_pages_per_seq):
            table = slice(first, first + width)
            parts["page_table"][:num_rows, table] = self._page_table[:, table].take(slots, axis=0)
        parts["token_ids"][: schedule.num_tokens] = np.array(_token_ids(schedule), np.int32)
        features = Feature(int(np.bitwise_or.reduce(self._features[slots])))
        parts["scalars"][:] = 0 if self.limits.one_way else num_single, features
        return Batch(
            bucket,
            packed,
            self._gather_adjustments(bucket.num_seqs, slots) if Feature.ADJUST in features else None,
            _prompt_targets(schedule, bucket.num_tokens) if Feature.PROMPT_LOGPROBS in features else None,
            self._constraints.gather(
                slots, bucket.num_seqs, bans=Feature.BANS in features, mask=Feature.MASK in features
            ),
            Feature.GRAMMAR in features,
        )

    def _set_slot(self, sequence: Sequence) -> None:
        params = sequence.request.sampling_params
        seed = np.array([sequence.seed], np.uint64).view(np.int32)  # little-endian: low word first
        top_k = max(params.top_k, 0)
        temperature = 0.0 if params.greedy else params.temperature
        self._settings[: len(INT_FIELDS), sequence.slot] = (sequence.num_prompt_tokens, top_k, *seed)
        floats = [temperature, *(getattr(params, name) for name in FLOAT_FIELDS[1:])]
        self._settings[len(INT_FIELDS) :, sequence.slot] = np.array(floats, np.float32).view(np.int32)
        stop_ids = sorted(sequence.stop_token_ids)[:NUM_STOP_IDS]
        self._stop_ids[:, sequence.slot] = stop_ids + [-1] * (NUM_STOP_IDS - len(stop_ids))
        adjustments = _adjustments(sequence)
        self._adjustments[sequence.slot] = adjustments
        features = Feature.NONE
        if not params.greedy:
            features |= Feature.RANDOM
            if top_k or params.top_p < 1 or params.min_p > 0:
                features |= Feature.TRUNCATE
        if params.penalized:
            features |= Feature.PENALTIES
        if adjustments.ids.size:
            features |= Feature.ADJUST
        if params.logprobs is not None:
            features |= Feature.LOGPROBS
        if sequence.scores_prompt:
            features |= Feature.PROMPT_LOGPROBS
        self._constraints.set_slot(sequence)
        if sequence.request.bad_token_ids:
            features |= Feature.BANS
        if params.allowed_token_ids is not None:
            features |= Feature.MASK
        if sequence.request.embed:
            features |= Feature.HIDDEN
        if sequence.request.grammar is not None:
            features |= Feature.GRAMMAR
        self._features[sequence.slot] = features

    def _gather_adjustments(self, num_seqs: int, slots: np.ndarray) -> Adjustments:
        gathered = no_adjustments(num_seqs)
        for row, slot in enumerate(slots):
            own = self._adjustments[int(slot)]
            for target, values in zip(gathered, own, strict=True):
                target[row, : values.size] = values
        return gathered


def _token_ids(schedule: Schedule) -> list[int]:
    """The packed tokens; one that is still on the device is named by its slot."""
    tokens = [
        sequence.token_ids[start] if start < len(sequence.token_ids) else -1 - sequence.slot
        for sequence, start, _, _ in schedule.rows[: schedule.num_single]
    ]
    for sequence, start, count, _ in schedule.rows[schedule.num_single :]:
        tokens += sequence.token_ids[start : start + count]  # longer rows are prompts, which the host knows
    return tokens


def _adjustments(sequence: Sequence) -> Adjustments:
    """The sequence's own adjustments, as 1-D arrays of one length."""
    params = sequence.request.sampling_params
    triples = [(token, value, _FOREVER) for token, value in (params.logit_bias or {}).items()]
    if params.min_tokens:
        # The token at position p is output number p - num_prompt_tokens + 1, so the first `min_tokens` outputs lie
        # below this position.
        until = sequence.num_prompt_tokens + params.min_tokens
        triples += [(token, -math.inf, until) for token in sorted(sequence.stop_token_ids)]
    ids, values, untils = zip(*triples, strict=True) if triples else ((), (), ())
    return Adjustments(np.array(ids, np.int32), np.array(values, np.float32), np.array(untils, np.int32))


def _prompt_targets(schedule: Schedule, num_tokens: int) -> np.ndarray:
    targets = np.full(num_tokens, -1, np.int32)
    offset = 0
    for sequence, start, count, _ in schedule.rows:
        if sequence.scores_prompt:
            following = sequence.prompt_targets(start, count)
            targets[offset : offset + len(following)] = following
        offset += count
    return targets
