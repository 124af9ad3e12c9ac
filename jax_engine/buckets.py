"""Bucket: the compiled sizes of a step, and which of them a step takes.

The scheduler chooses with it and fills buckets by it; the runner compiles every one. Never imports jax.
"""

from typing import NamedTuple

from jax_engine.config import Limits


class Bucket(NamedTuple):
    """A compiled size: packed tokens, sequences, and whether every sequence has one token."""

    num_tokens: int
    num_seqs: int
    decode_only: bool


def buckets(limits: Limits) -> list[Bucket]:
    """Every size a step can take, those of decode first."""
    decode = [Bucket(size, size, True) for size in limits.decode_buckets]
    return decode + [Bucket(size, min(size, limits.max_num_seqs), False) for size in limits.token_buckets]


def choose_bucket(limits: Limits, num_tokens: int, num_single: int, num_rows: int) -> Bucket:
    """The smallest bucket that holds the step."""
    if num_single == num_rows:
        for size in limits.decode_buckets:
            if size >= num_rows:
                return Bucket(size, size, True)
    size = next(size for size in limits.token_buckets if size >= num_tokens)
    return Bucket(size, min(size, limits.max_num_seqs), False)


def fill(limits: Limits, num_decodes: int, num_prompt_tokens: int) -> int:
    """How many of the prompt tokens to take, so that little of the bucket is padding.

    A step that spills over a bucket by less than half of the way to the next one is cut back to fill the bucket; the
    rest of the prompt goes with the next step.
    """
    total, below = num_decodes + num_prompt_tokens, 0
    for size in limits.token_buckets:
        if size >= total:
            if num_decodes < below < total and 2 * (total - below) < size - below:
                return below - num_decodes
            break
        below = size
    return num_prompt_tokens
