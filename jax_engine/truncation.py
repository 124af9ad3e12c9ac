"""Truncation: where top-k, top-p and min-p draw the line in each row of weights, without a sort.

The sampler calls `least_weight` inside its jitted program. Nothing here knows of tokens, seeds or requests.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

_ONE = 0x3F800000  # the bits of 1.0f
_TOP_K, _MASS, _TOP_P, _DONE = range(4)


class _Search(NamedTuple):
    """Per row: the stage, the half-closed bracket of the threshold's bits, and the sum that stage has to reach.

    The bits of a non-negative float32, read as an integer, are in the order of the floats.
    """

    stage: jax.Array
    low: jax.Array
    high: jax.Array
    target: jax.Array


def least_weight(
    weights: Float[Array, "B V"],
    active: Bool[Array, "B"],
    min_p: Float[Array, "B"],
    top_k: Int32[Array, "B"],
    top_p: Float[Array, "B"],
) -> Float[Array, "B"]:
    """The smallest weight each row keeps after min_p, top_k and top_p; float32.

    The threshold is searched by its bits. One loop serves all rows and both truncations; each pass over the vocabulary
    gives every row sums over several bounds, of ones in the top_k stage and of weights in the top_p stage. Float32 sums
    of ones are exact up to 2 ** 24 tokens; a fixed order of summation makes the sums of weights monotone.

    Args:
        weights: float32 in [0, 1], the largest of a row exactly 1; a row with NaN keeps anything.
        active: rows of which the result matters. min_p, top_k, top_p: as in sampler.SamplingInputs.
    """
    active = active & ~jnp.isnan(weights.max(axis=-1))
    given = (active & (top_p < 1), active & (top_k > 0) & (top_k < weights.shape[1]), min_p, top_k, top_p)
    # Where a pass is bound by memory, more bounds cost nothing: 11 passes instead of 31 for each truncation.
    return jax.lax.platform_dependent(
        weights, *given, cpu=functools.partial(search, ways=2), default=functools.partial(search, ways=8)
    )


def search(weights, by_mass, by_count, min_p, top_k, top_p, *, ways):
    """The same for rows cut by count, by mass or both; a pass leaves one of `ways` parts of a row's bracket."""
    floor = jax.lax.bitcast_convert_type(jnp.clip(min_p, 0, 1), jnp.int32)

    def after_count(low):
        return jnp.where(by_mass, _MASS, _DONE), jnp.maximum(low, floor)

    stage, low = after_count(jnp.zeros_like(floor))
    stage, low = jnp.where(by_count, _TOP_K, stage), jnp.where(by_count, 0, low)
    start = _Search(stage, low, jnp.full_like(floor, _ONE), top_k.astype(jnp.float32))
    found = jax.lax.while_loop(
        lambda search: (search.stage != _DONE).any(),
        lambda search: _one_pass(search, weights, top_p, after_count, ways),
        start,
    )
    return jax.lax.bitcast_convert_type(found.low, jnp.float32)


def _one_pass(search, weights, top_p, after_count, ways):
    """The search after one pass over each row's weights."""
    stage, low, high, target = search
    searching = (stage == _TOP_K) | (stage == _TOP_P)
    part = jnp.where(searching, -((low - high) // ways), 0)  # rounded up
    bounds = [
        jnp.minimum(low + part * number, high) for number in range(1, ways)
    ]  # a row that sums has them all at low
    bounds = [jnp.where(searching, bound, low) for bound in bounds]
    totals = _totals(weights, bounds, stage == _TOP_K)
    last_low, last_high, last_total = low, high, jnp.full_like(target, jnp.inf)
    for bound, total in zip(reversed(bounds), reversed(totals), strict=True):
        # From the highest bound down: the first that is reached is the new low, the one above it ends the bracket.
        reached, settled = total >= target, last_low > low
        last_high = jnp.where(searching & ~reached & ~settled, bound - 1, last_high)
        last_low = jnp.where(searching & reached & ~settled, bound, last_low)
        last_total = jnp.where(searching & reached & ~settled, total, last_total)
    low, high = last_low, last_high
    # A count that is met exactly settles top_k, wherever between two weights the bound lies.
    counted = (stage == _TOP_K) & ((low == high) | (last_total == target))
    summed, found = stage == _MASS, (stage == _TOP_P) & (low == high)
    next_stage, next_low = after_count(low)
    return _Search(
        stage=jnp.where(counted, next_stage, jnp.where(summed, _TOP_P, jnp.where(found, _DONE, stage))),
        low=jnp.where(counted, next_low, low),
        high=jnp.where(counted, _ONE, high),
        target=jnp.where(summed, top_p * totals[0], target),
    )


def _totals(weights, bounds, is_count):
    """[B] for each of bounds [B]: how many of a row's weights reach it, or their sum, in one pass over the weights."""
    values = jnp.where(is_count[:, None], 1.0, weights)
    reals = [jax.lax.bitcast_convert_type(bound, jnp.float32)[:, None] for bound in bounds]
    return [jnp.where(weights >= real, values, 0.0).sum(axis=-1) for real in reals]
