"""Running the layers of a model one after the other, unrolled or in a loop."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from checkpoints.quantized_weight import QuantizedWeight
from jax_engine.layers.context import StepContext
from jax_engine.layers.linear import WeightByLayer
from jax_engine.layers.parallel import sums_take


class _Kind(NamedTuple):
    """Layers that differ only in the values of their weights: one program serves them all."""

    graph: nnx.GraphDef
    states: list[dict]


def run_layers(
    layers: Sequence[nnx.Module], carry: tuple, context: StepContext, *, places: Sequence[tuple[int, int]], unroll: bool
) -> tuple:
    """Threads `carry` through `layer(*carry, context, place)` for every layer.

    Args:
        carry: what a layer takes first, and returns.
        context: what every layer gets besides, with the plan of the layer's group.
        places: for each layer its group, and where in the cache it keeps what it keeps.
        unroll: write every layer out: what accelerators run fastest, as one graph of launches. Otherwise a loop, which
            compiles ten times faster; right on a CPU, where each fused operation of each layer is compiled anew.
    """
    kinds, of_layer = _group(layers)
    if unroll:
        # One inner jit for all layers of a kind: they are traced and lowered once.
        for (kind, index), (group, place) in zip(of_layer, places, strict=True):
            own = replace(context, plan=context.plans[group])
            carry = _apply(kinds[kind].graph, kinds[kind].states[index], carry, own, jnp.int32(place))
        return carry
    kind_of, index_of = np.array(of_layer, np.int32).T
    group_of, place_of = np.array(places, np.int32).T
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *context.plans) if len(context.plans) > 1 else None
    for start, end in _stretches(kind_of.tolist()):
        present, choice_of = np.unique(kind_of[start:end], return_inverse=True)

        def body(layer: jax.Array, carry: tuple, start=start, choice_of=choice_of, present=present) -> tuple:
            index, place = jnp.asarray(index_of)[layer], jnp.asarray(place_of)[layer]
            own = context
            if stacked is not None:
                group = jnp.asarray(group_of)[layer]
                own = replace(context, plan=jax.tree.map(lambda parts: parts[group], stacked))
            branches = [functools.partial(_apply_chosen, kinds[kind], context=own) for kind in present]
            choice = jnp.asarray(choice_of, jnp.int32)[layer - start]
            return jax.lax.switch(choice, branches, index, place, carry)

        carry = jax.lax.fori_loop(start, end, body, carry)
    return carry


def _stretches(kind_of: list[int]) -> Iterator[tuple[int, int]]:
    """Half-open ranges of layers, as short as can be, of which no two share a kind.

    Each becomes a loop of its own. Where dense layers and layers of experts are branches of one loop, XLA copies the
    whole KV pool in each turn.
    """
    last = {kind: layer for layer, kind in enumerate(kind_of)}
    start = end = 0
    for layer, kind in enumerate(kind_of):
        end = max(end, last[kind] + 1)
        if layer + 1 == end:
            yield start, end
            start = end


def _group(layers: Sequence[nnx.Module]) -> tuple[list[_Kind], list[tuple[int, int]]]:
    """The kinds of layers, and for each layer its kind and its place among those of its kind."""
    kinds: dict[Any, int] = {}
    found: list[_Kind] = []
    of_layer = []
    for layer in layers:
        graph, state = nnx.split(layer)
        weights = nnx.to_pure_dict(state)
        shapes = tuple((array.shape, array.dtype) for array in jax.tree.leaves(weights))
        kind = kinds.setdefault((graph, shapes), len(found))
        if kind == len(found):
            found.append(_Kind(graph, []))
        of_layer.append((kind, len(found[kind].states)))
        found[kind].states.append(weights)
    return found, of_layer


@functools.partial(jax.jit, static_argnums=0)
def _apply(graph: nnx.GraphDef, state: dict, carry: tuple, context: StepContext, place: jax.Array) -> tuple:
    with sums_take(context.peers):
        return nnx.merge(graph, state)(*carry, context, place)


def _apply_chosen(kind: _Kind, index: jax.Array, place: jax.Array, carry: tuple, *, context: StepContext) -> tuple:
    choose = functools.partial(_choose, index)
    weights = jax.tree.map(choose, *kind.states, is_leaf=lambda leaf: isinstance(leaf, QuantizedWeight))
    return nnx.merge(kind.graph, weights)(*carry, context, place)


def _choose(index: jax.Array, *weights: Any) -> Any:
    # Vectors are small enough to stack; see WeightByLayer for the rest.
    return jnp.stack(weights)[index] if weights[0].ndim == 1 else WeightByLayer(weights, index)
