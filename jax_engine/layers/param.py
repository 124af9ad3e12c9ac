"""How a layer declares a weight."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx


def declare(
    shape: Sequence[int], dtype: jnp.dtype, axes: Sequence[str | None], init: str = "normal", *, inputs: int = 0
) -> nnx.Param:
    """A weight of the given shape; its values come from the checkpoint.

    Models are only ever built under `nnx.eval_shape`, so nothing is allocated here.

    Args:
        axes: the logical axis of each dimension; see sharding.RULES.
        init: what dummy weights hold: `normal`, `ones` or `zeros`.
        inputs: how many of the last dimensions a product with the weight sums over. Such a weight may come as a
            QuantizedWeight, which the functions of linear.py know; 0: it is none, and is never quantised.
    """
    return nnx.Param(jnp.zeros(tuple(shape), dtype), axes=tuple(axes), sizes=tuple(shape), init=init, inputs=inputs)
