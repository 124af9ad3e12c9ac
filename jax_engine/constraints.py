"""Constraints: which tokens a row may not, or may only, choose: bad words and allowed token ids, as arrays.

batch.py gathers them per step from what each slot's request asks for; the sampler applies them. Never imports jax.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from jax_engine.sampling_params import MAX_BAD_WORDS
from jax_engine.sequence import Sequence

#: Token sequences of one request's bad words: each word with and without a space before it.
MAX_BANS = 2 * MAX_BAD_WORDS
#: Tokens of the longest of them.
MAX_BAN_TOKENS = 16


class Constraints(NamedTuple):
    """On the host numpy arrays, or None where no row of the step has any; on the device both.

    Attributes:
        bans: [B, MAX_BANS, MAX_BAN_TOKENS] int32 token ids. The last is forbidden where the output ends with those
            before it; -1 in front matches anything, -1 at the end marks an unused entry.
        mask: [B, ceil(V / 32)] int32; bit `id % 32` of word `id // 32`: the token may be chosen.
    """

    bans: Any
    mask: Any


def no_bans(num_seqs: int) -> np.ndarray:
    """Bans of nothing."""
    return np.full((num_seqs, MAX_BANS, MAX_BAN_TOKENS), -1, np.int32)


def full_mask(num_seqs: int, vocab_size: int) -> np.ndarray:
    """A mask that allows every token."""
    return np.full((num_seqs, math.ceil(vocab_size / 32)), -1, np.int32)


def unconstrained(num_seqs: int, vocab_size: int) -> Constraints:
    """Constraints that change nothing."""
    return Constraints(no_bans(num_seqs), full_mask(num_seqs, vocab_size))


class ConstraintTable:
    """What the request in each slot asks for."""

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size
        self._bans: dict[int, np.ndarray] = {}
        self._masks: dict[int, np.ndarray] = {}

    def set_slot(self, sequence: Sequence) -> None:
        """Takes over a sequence that was given a slot."""
        slot, request = sequence.slot, sequence.request
        self._bans.pop(slot, None)
        self._masks.pop(slot, None)
        if request.bad_token_ids:
            bans = np.full((len(request.bad_token_ids), MAX_BAN_TOKENS), -1, np.int32)
            for row, tokens in zip(bans, request.bad_token_ids, strict=True):
                row[-len(tokens) :] = tokens
            self._bans[slot] = bans
        allowed = request.sampling_params.allowed_token_ids
        if allowed is not None:
            ids = np.array(allowed, np.int64)
            mask = np.zeros(math.ceil(self._vocab_size / 32), np.uint32)
            np.bitwise_or.at(mask, ids // 32, np.uint32(1) << (ids % 32).astype(np.uint32))
            self._masks[slot] = mask.view(np.int32)

    def gather(self, slots: np.ndarray, num_seqs: int, *, bans: bool, mask: bool) -> Constraints | None:
        """The constraints of a step whose rows hold `slots`; None when neither kind is wanted."""
        if not bans and not mask:
            return None
        gathered_bans = no_bans(num_seqs) if bans else None
        gathered_mask = full_mask(num_seqs, self._vocab_size) if mask else None
        for row, slot in enumerate(slots.tolist()):
            if gathered_bans is not None and slot in self._bans:
                own = self._bans[slot]
                gathered_bans[row, : len(own)] = own
            if gathered_mask is not None and slot in self._masks:
                gathered_mask[row] = self._masks[slot]
        return Constraints(gathered_bans, gathered_mask)
