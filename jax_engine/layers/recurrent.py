"""Gated delta net: attention's place taken by a state of fixed size per sequence (arXiv 2412.06464).

The state lies in the place of the sequence's slot, and lives as its pages do: a slot is a sequence's own from its
admission until no step in flight has a row of it; a sequence that starts at position 0, for the first time or again
after it was preempted, starts from zeros. So no state ever has to be cleared, copied or rolled back.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jax_engine.layers.context import StepContext
from jax_engine.layers.linear import matmul, small
from jax_engine.layers.mlp import FUNCTIONS
from jax_engine.layers.norm import RMSNorm
from jax_engine.layers.param import declare
from jax_engine.model_config import ModelConfig

_NORM_EPS = 1e-6


class RecurrentCache(NamedTuple):
    """What a model with recurrent layers keeps. S slots and one place for rows of padding; R recurrent layers.

    Attributes:
        pages: the attention layers' pool.
        inputs: [R, S + 1, K, W - 1, C] the latest inputs of each convolution of width W.
        states: [R, S + 1, K, V, key size, value size] float32, K key heads, each with V value heads.
    """

    pages: Array
    inputs: Array
    states: Array


class GatedDeltaNet(nnx.Module):
    """A short causal convolution, then for each head a matrix that maps keys to values, corrected token by token.

    Tokens are taken one after the other, in the same way however a sequence is cut into steps, so that its results do
    not depend on the cut.
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype):
        delta = config.delta
        assert delta is not None
        embed, heads, group = config.hidden_size, delta.num_key_heads, delta.num_value_heads // delta.num_key_heads
        channels = 2 * delta.key_dim + group * delta.value_dim
        self.project = declare(
            (heads, channels + group * delta.value_dim, embed), dtype, ("heads", "head_dim", "embed"), inputs=1
        )
        self.project_gates = declare((heads, 2 * group, embed), dtype, ("heads", "group", "embed"))
        self.convolution = declare((heads, channels, delta.width), dtype, ("heads", "head_dim", None))
        wide = jnp.dtype(jnp.float32)
        self.log_decay = declare((heads, group), wide, ("heads", "group"), init="zeros")
        self.time_bias = declare((heads, group), wide, ("heads", "group"), init="ones")
        self.norm = RMSNorm(delta.value_dim, config.norm_eps, dtype)
        self.output = declare((embed, heads, group * delta.value_dim), dtype, ("embed", "heads", "head_dim"), inputs=2)
        self.delta, self.group, self.activation = delta, group, config.activation

    def __call__(
        self, x: Float[Array, "T D"], cache: RecurrentCache, context: StepContext, place: Array
    ) -> tuple[Float[Array, "T D"], RecurrentCache]:
        """As Attention; `place` is the layer's number among the recurrent ones."""
        tokens, delta = x.shape[0], self.delta
        heads, channels, _ = self.convolution.shape
        projected = matmul(x, self.project).reshape(tokens, heads, -1)
        mixed, cache = self._convolve(projected[:, :, :channels], cache, context, place)
        query, key, value = jnp.split(mixed.astype(jnp.float32), [delta.key_dim, 2 * delta.key_dim], axis=-1)
        write, decay = self._gates(x)
        inputs = _Inputs(
            _unit(query) * delta.key_dim**-0.5,
            _unit(key),
            value.reshape(tokens, heads, self.group, delta.value_dim),
            write,
            decay,
        )
        out, states = _run(inputs, cache.states, context, place)
        gate = projected[:, :, channels:].reshape(out.shape).astype(jnp.float32)
        out = (self.norm(out.astype(x.dtype)) * FUNCTIONS[self.activation](gate)).astype(x.dtype)
        return matmul(out.reshape(tokens, -1), self.output), cache._replace(states=states)

    def _gates(self, x: Float[Array, "T D"]) -> tuple[Array, Array]:
        """How much of a token is written, and what is left of the state before it: [T, K, V] float32, in (0, 1)."""
        heads, both, _ = self.project_gates.shape
        gates = matmul(x, self.project_gates).reshape(-1, heads, both).astype(jnp.float32)
        write, time = jnp.split(gates, 2, axis=-1)
        time = jax.nn.softplus(time + small(self.time_bias))
        return jax.nn.sigmoid(write), jnp.exp(-jnp.exp(small(self.log_decay)) * time)

    def _convolve(
        self, x: Float[Array, "T K C"], cache: RecurrentCache, context: StepContext, place: Array
    ) -> tuple[Float[Array, "T K C"], RecurrentCache]:
        """Each channel's causal convolution over its row's latest inputs, and the cache with the newest of them."""
        taps = small(self.convolution)
        history = taps.shape[-1] - 1
        plan, starts = context.plan, context.query_starts
        before = cache.inputs[place, context.slots]
        before = jnp.where(_starts_anew(context)[:, None, None, None], 0, before)
        offset = jnp.arange(x.shape[0]) - starts[plan.rows]

        def input_at(back: int) -> Array:
            here = jnp.roll(x, back, axis=0)
            earlier = before[plan.rows, :, jnp.clip(history + offset - back, 0, max(history - 1, 0))]
            return jnp.where((offset >= back)[:, None, None], here, earlier) if back else here

        out = sum(input_at(back).astype(jnp.float32) * taps[:, :, history - back] for back in range(history + 1))
        lengths = starts[1:] - starts[:-1]
        index = lengths[:, None] + jnp.arange(history)  # in the row's earlier inputs and its new ones, joined
        new = x[jnp.clip(starts[:-1, None] + index - history, 0, x.shape[0] - 1)].swapaxes(1, 2)
        old = jnp.take_along_axis(before, jnp.minimum(index, history - 1)[:, None, :, None], axis=2)
        latest = jnp.where((index >= history)[:, None, :, None], new, old)
        inputs = cache.inputs.at[place, context.slots].set(latest.astype(cache.inputs.dtype))
        return FUNCTIONS[self.activation](out).astype(x.dtype), cache._replace(inputs=inputs)


class _Inputs(NamedTuple):
    """Of each token (leading axes [T, K] or, for one token, [K]): query and key; value, and gates by value head."""

    query: Array
    key: Array
    value: Array
    write: Array
    decay: Array


def _starts_anew(context: StepContext) -> Bool[Array, " B"]:
    """Rows whose first token is their sequence's first; anything for rows of padding."""
    first = jnp.minimum(context.query_starts[:-1], context.plan.positions.shape[0] - 1)
    return context.plan.positions[first] == 0


def _unit(x: Float[Array, "T K H"]) -> Float[Array, "T K H"]:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _NORM_EPS)


def _advance(state: Array, token: _Inputs) -> tuple[Array, Array]:
    """The state [..., K, V, key, value] after a token, and what its query finds there [..., K, V, value]."""
    key, query = token.key[..., None, :, None], token.query[..., None, :, None]
    state = state * token.decay[..., None, None]
    known = jnp.sum(state * key, axis=-2)
    state = state + key * ((token.value - known) * token.write[..., None])[..., None, :]
    return state, jnp.sum(state * query, axis=-2)


def _run(inputs: _Inputs, states: Array, context: StepContext, place: Array) -> tuple[Array, Array]:
    """Takes every row's tokens from its state on. Returns what each token finds, [T, K, V, value], and the states."""
    starts, slots = context.query_starts, context.slots
    tokens = inputs.query.shape[0]
    rows = min(slots.shape[0], tokens)
    fresh = _starts_anew(context)

    # Rows of one token, which come first, all at once.
    single = jnp.arange(rows) < context.num_decodes
    before = jnp.where(fresh[:rows, None, None, None, None], 0, states[place, slots[:rows]])
    after, found = _advance(before, jax.tree.map(lambda part: part[:rows], inputs))
    states = states.at[place, jnp.where(single, slots[:rows], states.shape[1])].set(after, mode="drop")
    out = jnp.zeros((tokens, *found.shape[1:]), found.dtype).at[:rows].set(found)
    if context.decode_only:
        return out, states

    def run_row(row: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        states, out = carry

        def run_token(token: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            state, out = carry
            state, found = _advance(state, jax.tree.map(lambda part: part[token], inputs))
            return state, out.at[token].set(found)

        state = jnp.where(fresh[row], 0, states[place, slots[row]])
        state, out = jax.lax.fori_loop(starts[row], starts[row + 1], run_token, (state, out))
        return states.at[place, slots[row]].set(state), out

    num_rows = jnp.sum(starts[1:] > starts[:-1])
    states, out = jax.lax.fori_loop(context.num_decodes, num_rows, run_row, (states, out))
    return out, states
