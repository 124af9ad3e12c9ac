"""Gated delta net: attention's place taken by a state of fixed size per sequence (arXiv 2412.06464).

delta_rule.py says how tokens change the state. It lies in the place of the sequence's slot, and lives as the sequence's
pages do: a slot is a sequence's own from its admission until no step in flight has a row of it; a sequence that starts
at position 0, for the first time or again after it was preempted, starts from zeros. So no state ever has to be
cleared, copied or rolled back.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_engine.layers.context import StepContext
from jax_engine.layers.delta_rule import DeltaInputs, delta_rule
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
    """A short causal convolution, then for each head a matrix that maps keys to values, corrected token by token."""

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
        write, log_decay = self._gates(x)
        inputs = DeltaInputs(
            _unit(query) * delta.key_dim**-0.5,
            _unit(key),
            value.reshape(tokens, heads, self.group, delta.value_dim),
            write,
            log_decay,
        )
        out, states = delta_rule(inputs, cache.states, context, place)
        gate = projected[:, :, channels:].reshape(out.shape).astype(jnp.float32)
        out = (self.norm(out.astype(x.dtype)) * FUNCTIONS[self.activation](gate)).astype(x.dtype)
        return matmul(out.reshape(tokens, -1), self.output), cache._replace(states=states)

    def _gates(self, x: Float[Array, "T D"]) -> tuple[Array, Array]:
        """DeltaInputs' write and log_decay."""
        heads, both, _ = self.project_gates.shape
        gates = matmul(x, self.project_gates).reshape(-1, heads, both).astype(jnp.float32)
        write, time = jnp.split(gates, 2, axis=-1)
        time = jax.nn.softplus(time + small(self.time_bias))
        return jax.nn.sigmoid(write), -jnp.exp(small(self.log_decay)) * time

    def _convolve(
        self, x: Float[Array, "T K C"], cache: RecurrentCache, context: StepContext, place: Array
    ) -> tuple[Float[Array, "T K C"], RecurrentCache]:
        """Each channel's causal convolution over its row's latest inputs, and the cache with the newest of them."""
        taps = small(self.convolution)
        history = taps.shape[-1] - 1
        plan, starts = context.plan, context.query_starts
        before = cache.inputs[place, context.slots]
        before = jnp.where(context.starts_anew[:, None, None, None], 0, before)
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


def _unit(x: Float[Array, "T K H"]) -> Float[Array, "T K H"]:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _NORM_EPS)
