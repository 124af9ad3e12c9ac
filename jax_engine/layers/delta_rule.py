"""The gated delta rule over ragged rows: how each token changes the state of its sequence, and what it finds there.

recurrent.py makes the inputs and keeps the states. Rows of one token advance together. Longer rows come one after
another, and in each a block of tokens at a time, in matrix products; or, where a token's bits may not depend on how its
sequence was cut into steps, token by token. All in float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jax_engine.layers.context import StepContext

#: Tokens of a block, a power of two. Work within a block grows with its square; an accelerator's steps are fewer.
BLOCK_ON_CPU, BLOCK = 32, 64


class DeltaInputs(NamedTuple):
    """What the rule takes of each token, float32. T tokens, K key heads, V value heads of each, sizes H and O.

    Attributes:
        query, key: of length one, but for the scale of the scores.
        write: how much of what is new is written, in (0, 1).
        log_decay: logarithm of what is left of the state that the token finds, at most 0.
    """

    query: Float[Array, "T K H"]
    key: Float[Array, "T K H"]
    value: Float[Array, "T K V O"]
    write: Float[Array, "T K V"]
    log_decay: Float[Array, "T K V"]


def delta_rule(
    inputs: DeltaInputs, states: Float[Array, "R S K V H O"], context: StepContext, place: Int32[Array, ""]
) -> tuple[Float[Array, "T K V O"], Float[Array, "R S K V H O"]]:
    """Takes every row's tokens from its state on.

    Args:
        place: of the layer, in the first axis of `states`; the second is the slot.

    Returns:
        What each token's query finds, anything for tokens of padding; and the states after the rows' last tokens.
    """
    starts, slots, anew = context.query_starts, context.slots, context.starts_anew
    tokens = inputs.query.shape[0]
    num_rows = min(slots.shape[0], tokens)
    single = jnp.arange(num_rows) < context.num_decodes
    before = jnp.where(anew[:num_rows, None, None, None, None], 0, states[place, slots[:num_rows]])
    after, found = _advance(before, jax.tree.map(lambda part: part[:num_rows], inputs))
    states = states.at[place, jnp.where(single, slots[:num_rows], states.shape[1])].set(after, mode="drop")
    if context.decode_only:
        return found, states

    # A last block may reach past its row: what it writes there is overwritten by the row it belongs to, or is padding.
    size = 1 if context.one_way else _block_size(context.platform, tokens)
    inputs = jax.tree.map(lambda part: jnp.pad(part, [(0, size)] + [(0, 0)] * (part.ndim - 1)), inputs)
    out = jnp.zeros((tokens + size, *found.shape[1:]), found.dtype).at[:num_rows].set(found)
    take = _advance_block if size > 1 else _advance_token

    def run_row(row: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        states, out = carry

        def run_block(number: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            state, out = carry
            first = starts[row] + number * size
            block = jax.tree.map(lambda part: jax.lax.dynamic_slice_in_dim(part, first, size), inputs)
            state, found = take(state, block, starts[row + 1] - first)
            return state, jax.lax.dynamic_update_slice_in_dim(out, found, first, axis=0)

        state = jnp.where(anew[row], 0, states[place, slots[row]])
        num_blocks = (starts[row + 1] - starts[row] + size - 1) // size
        state, out = jax.lax.fori_loop(0, num_blocks, run_block, (state, out))
        return states.at[place, slots[row]].set(state), out

    end = jnp.sum(starts[1:] > starts[:-1])
    states, out = jax.lax.fori_loop(context.num_decodes, end, run_row, (states, out))
    return out[:tokens], states


def _block_size(platform: str, num_tokens: int) -> int:
    return min(BLOCK_ON_CPU if platform == "cpu" else BLOCK, 1 << (num_tokens - 1).bit_length())


def _advance(state: Array, token: DeltaInputs) -> tuple[Array, Array]:
    """The state [..., K, V, H, O] after a token, and what its query finds there [..., K, V, O]."""
    key, query = token.key[..., None, :, None], token.query[..., None, :, None]
    state = state * jnp.exp(token.log_decay)[..., None, None]
    known = jnp.sum(state * key, axis=-2)
    state = state + key * ((token.value - known) * token.write[..., None])[..., None, :]
    return state, jnp.sum(state * query, axis=-2)


def _advance_token(state: Array, block: DeltaInputs, num_tokens: Array) -> tuple[Array, Array]:
    """The same for a block of one token; `num_tokens`, which blocks of more need, is not looked at."""
    del num_tokens
    state, found = _advance(state, jax.tree.map(lambda part: part[0], block))
    return state, found[None]


def _advance_block(state: Array, block: DeltaInputs, num_tokens: Array) -> tuple[Array, Array]:
    """The same for the first `num_tokens` of a block of C tokens: arXiv 2412.06464, section 3.3, its UT transform.

    What token i writes is key_i times new_i, and new_i depends on what the earlier tokens of the block wrote:
    new + A new = write * (value - what is left of the state at the block's start, at the key), where A_ij = write_i *
    decay from j to i * key_i key_j for j < i. So `new` of all tokens is one solution of a triangular system.
    """
    size = block.query.shape[0]
    index = jnp.arange(size)
    inside = (index < num_tokens)[:, None, None]
    write, log_decay = (jnp.where(inside, part, 0).transpose(1, 2, 0) for part in (block.write, block.log_decay))
    earlier = index[:, None] > index
    # The sums over (j, i] are made of their own terms: a difference of two sums would lose the small beside the large.
    steps = jnp.where(earlier, log_decay[..., :, None], 0)
    left = jnp.where(earlier | jnp.eye(size, dtype=bool), jnp.exp(jnp.cumsum(steps, axis=-2)), 0)  # [K, V, i, j]
    from_start = jnp.exp(jnp.cumsum(log_decay, axis=-1))[..., None]

    near = _product("ikh,jkh->kij", block.key, block.key)
    inverse = _invert(jnp.where(earlier, write[..., None] * left * near[:, None], 0))
    known = from_start * _product("ikh,kvho->kvio", block.key, state)
    value = jnp.where(inside[..., None], block.value, 0).transpose(1, 2, 0, 3)
    new = _product("kvij,kvjo->kvio", inverse, write[..., None] * (value - known))

    scores = left * _product("ikh,jkh->kij", block.query, block.key)[:, None]
    found = from_start * _product("ikh,kvho->kvio", block.query, state) + _product("kvij,kvjo->kvio", scores, new)
    left_at_end = left[:, :, -1, :, None]
    state = from_start[:, :, -1:] * state + _product("jkh,kvjo->kvho", block.key, left_at_end * new)
    return state, found.transpose(2, 0, 1, 3)


def _invert(lower: Float[Array, "K V C C"]) -> Float[Array, "K V C C"]:
    """The inverse of the identity plus a strictly lower triangular matrix; C is a power of two.

    Neighbours among the inverted blocks on the diagonal are joined to blocks of twice the size. Unlike powers of the
    matrix, which are huge where keys are alike and cancel out in the end, every part is as small as the inverse itself.
    """
    *heads, size, _ = lower.shape
    inverse = jnp.ones((*heads, size, 1, 1), lower.dtype)
    width = 1
    while width < size:
        pairs = size // (2 * width)
        blocks = lower.reshape(*heads, pairs, 2, width, pairs, 2, width)[..., 1, :, :, 0, :]
        below = jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)  # between the two blocks of each pair
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        below = -_product("...ij,...jk->...ik", second, _product("...ij,...jk->...ik", below, first))
        above = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([above, jnp.concatenate([below, second], axis=-1)], axis=-2)
        width *= 2
    return inverse[..., 0, :, :]


def _product(subscripts: str, *arrays: Array) -> Array:
    return jnp.einsum(subscripts, *arrays, precision=jax.lax.Precision.HIGHEST)
