"""Matrix products with weights, and the two forms a layer's weight comes in."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float


class WeightByLayer:
    """The weights of one place in every layer, of which a traced index picks one.

    A loop over the layers meets weights in this form. The choice is made by `lax.switch` around the product itself, so
    no weight is copied, as slicing a stack of them would.
    """

    def __init__(self, weights: Sequence[Array], index: Array):
        self._weights = weights
        self._index = index
        self.shape = weights[0].shape

    def matmul(self, x: Float[Array, "T D"]) -> Float[Array, "T F"]:
        """x times the chosen weight."""
        return jax.lax.switch(self._index, [lambda x, w=w: _matmul(x, w) for w in self._weights], x)


def matmul(x: Float[Array, "T D"], weight: nnx.Param) -> Float[Array, "T F"]:
    """x times a weight stored outputs first, inputs last, as checkpoints do: F and D are its flattened axes."""
    value: Any = weight.get_value()
    return value.matmul(x) if isinstance(value, WeightByLayer) else _matmul(x, value)


def _matmul(x: Array, weight: Array) -> Array:
    return jax.lax.dot_general(x, weight.reshape(-1, x.shape[-1]), (((1,), (1,)), ((), ())))
