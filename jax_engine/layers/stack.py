"""Running the layers of a model one after the other, unrolled or in a loop."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_engine.layers.linear import WeightByLayer


def run_layers(layers: Sequence[nnx.Module], carry: tuple, *shared: Any, unroll: bool) -> tuple:
    """Threads `carry` through `layer(*carry, *shared, index)` for every layer; all are of one kind.

    Args:
        carry: what a layer takes first, and returns.
        shared: what every layer gets besides.
        unroll: write every layer out: what accelerators run fastest, as one graph of launches. Otherwise a loop, which
            compiles ten times faster; right on a CPU, where each fused operation of each layer is compiled anew.
    """
    splits = [nnx.split(layer) for layer in layers]
    graph = splits[0][0]
    states = [nnx.to_pure_dict(state) for _, state in splits]
    if unroll:
        # One inner jit for all layers: they are traced and lowered once.
        for index, state in enumerate(states):
            carry = _apply(graph, state, carry, shared, jnp.int32(index))
        return carry

    def body(index: jax.Array, carry: tuple) -> tuple:
        return nnx.merge(graph, jax.tree.map(functools.partial(_choose, index), *states))(*carry, *shared, index)

    return jax.lax.fori_loop(0, len(layers), body, carry)


@functools.partial(jax.jit, static_argnums=0)
def _apply(graph: nnx.GraphDef, state: dict, carry: tuple, shared: tuple, index: jax.Array) -> tuple:
    return nnx.merge(graph, state)(*carry, *shared, index)


def _choose(index: jax.Array, *weights: jax.Array) -> Any:
    # Vectors are small enough to stack; see WeightByLayer for the rest.
    return jnp.stack(weights)[index] if weights[0].ndim == 1 else WeightByLayer(weights, index)
